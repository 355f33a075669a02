"""Modules: named parts of a model that hold weights and compute a `forward`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from tokenspeed.core.errors import KernelError
from tokenspeed.kernels import PACKED, PANELS, BlockMatrix, KernelSelector, Matrix, PackedWeight
from tokenspeed.modeling.placement import Boundary, Shard

__all__ = ["Module", "Weight"]


class Weight:
    """A tensor that a module owns: declared when the module is made, filled from a checkpoint.

    It lies on torch's default device, which `build_model` sets for as long as it builds.

    Args:
        shape: sizes.
        dims: what each dimension is, in the words of `Shard`.
        kernels: gives the element type.
        parts: sizes of named pieces stacked along the first dimension, where a checkpoint
            keeps as several tensors what one product reads at once.
        shard: how ranks divide it; each part by itself.
        format_name: how it lies in memory, as the kernels that read it want it; None for a tensor
            of the selector's element type.

    Attributes:
        data: what a kernel takes as its weight.
        format_name: the name of its format.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        dims: tuple[str, ...],
        kernels: KernelSelector,
        parts: Mapping[str, int] | None = None,
        shard: Shard | None = None,
        format_name: str | None = None,
    ) -> None:
        assert len(dims) == len(shape)
        assert shard is None or shard.dim in dims
        assert parts is None or sum(parts.values()) == shape[0]
        self.dims = dims
        self.shard = shard
        self.shape = tuple(shape)
        self.format_name = format_name
        self._parts = dict(parts or {})
        self.data: Matrix
        if format_name == PACKED or format_name in PANELS:
            outputs, inputs = shape
            self.data = PackedWeight(
                (outputs, inputs),
                parts=tuple(self._parts.values()) or (outputs,),
                dtype=kernels.dtype,
                runtime=kernels.runtime,
            )
        else:
            self.data = torch.empty(self.shape, dtype=kernels.dtype)

    @property
    def tensor(self) -> torch.Tensor:
        """The weight of an op that takes none but tensors."""
        assert isinstance(self.data, torch.Tensor)
        return self.data

    @property
    def parts(self) -> tuple[str | None, ...]:
        """Names of what a checkpoint must bring: the stacked parts, or None for the whole."""
        return tuple(self._parts) or (None,)

    def part_shape(self, name: str | None) -> tuple[int, ...]:
        """Sizes of a part; None is the whole."""
        return self.shape if name is None else (self._parts[name], *self.shape[1:])

    def fill(self, name: str | None, value: torch.Tensor | BlockMatrix) -> None:
        """Take over a part of the right shape, in the format that `data` has.

        Raises:
            KernelError: the part is not of a type that can be packed.
        """
        index = 0 if name is None else list(self._parts).index(name)
        if self.format_name == PACKED:
            assert isinstance(self.data, PackedWeight)
            if isinstance(value, torch.Tensor):
                raise KernelError(
                    f"a matrix of {value.dtype} cannot be packed; "
                    "--kernel gemm.linear=reference keeps it as it is"
                )
            self.data.pack(index, value.quant_name, value.blocks)
            return
        values = value if isinstance(value, torch.Tensor) else value.to_float()
        if isinstance(self.data, PackedWeight):
            self.data.pack_dense(index, values)
            return
        start = sum(list(self._parts.values())[:index])
        self.data.narrow(0, start, len(values)).copy_(values)


class Module:
    """A part of a model. Subclasses define `forward`; children and weights are attributes.

    Calling a module runs `forward`. The call is the seam where data crosses a boundary: between
    ranks, whatever turns what comes into what the boundary asks for belongs here, never in a
    `forward`. With one rank every placement is the same, and nothing happens.
    """

    boundary: ClassVar[Boundary | None] = None
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def children(self) -> Iterator[tuple[str, "Module"]]:
        """Direct children by name; members of a tuple as `name.index`."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, tuple):
                for index, member in enumerate(value):
                    if isinstance(member, Module):
                        yield f"{name}.{index}", member

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """All weights by dotted name; one that modules share comes under each of its names."""
        for name, value in vars(self).items():
            if isinstance(value, Weight):
                yield name, value
        for name, child in self.children():
            for inner, weight in child.weights():
                yield f"{name}.{inner}", weight
