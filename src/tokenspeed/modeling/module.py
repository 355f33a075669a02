"""Modules: named parts of a model that hold weights and compute a `forward`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from tokenspeed.kernels import KernelSelector
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

    Attributes:
        data: the tensor.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        dims: tuple[str, ...],
        kernels: KernelSelector,
        parts: Mapping[str, int] | None = None,
        shard: Shard | None = None,
    ) -> None:
        assert len(dims) == len(shape)
        assert shard is None or shard.dim in dims
        assert parts is None or sum(parts.values()) == shape[0]
        self.dims = dims
        self.shard = shard
        self.data = torch.empty(tuple(shape), dtype=kernels.dtype)
        self._parts = dict(parts or {})

    @property
    def parts(self) -> tuple[str | None, ...]:
        """Names of what a checkpoint must bring: the stacked parts, or None for the whole."""
        return tuple(self._parts) or (None,)

    def part(self, name: str | None) -> torch.Tensor:
        """The place of a part within `data`; None is the whole."""
        if name is None:
            return self.data
        before = list(self._parts).index(name)
        start = sum(list(self._parts.values())[:before])
        return self.data.narrow(0, start, self._parts[name])


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
