"""Matrices of quantised safetensors checkpoints: dequantised where they are indexed, or as they are
for kernels that read them so.

Each format is what its makers have published: FP8 in blocks (DeepSeek-V3, 2024, section 3.3),
GPTQ (Frantar et al. 2022) and AWQ (Lin et al. 2023) as their tools write them, compressed-tensors,
and MXFP4 (OCP Microscaling Formats 1.0, 2023). Values are computed in float32.

Legend: O outputs, I inputs, E experts, G groups of inputs that share a scale.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenspeed.core.errors import CorruptCheckpoint
from tokenspeed.kernels.quantised import (
    FLOAT4_GROUP,
    GROUP_MIN,
    Float4Groups,
    Float8Blocks,
    Int4Groups,
    QuantisedMatrix,
)

__all__ = ["Raw", "awq", "compressed_int4", "fp8_blocks", "gptq", "mxfp4"]

# Which output of eight each four bits of an AWQ word hold, from the lowest on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_IN_ORDER = tuple(range(8))
_WORD = 8

_Span = tuple[int, int]


class Raw(Protocol):
    """A tensor of a file, read where it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor:
        """first:end of each dimension."""


@dataclass(frozen=True, slots=True)
class _Stacked:
    """A `kernels.Stored` of the matrices of all experts, [E, I, O], and a `kernels.QuantisedStored`
    where it is indexed by one of them.

    Attributes:
        shape: (E, I, O).
        read: numbers and scales of an expert, of a span of outputs, and of groups of inputs.
    """

    shape: tuple[int, ...]
    read: Callable[[int, _Span, slice], Float4Groups]

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        """first:end of each dimension, as float32."""
        experts, columns, rows = _spans(self.shape, index)
        groups = _whole(columns, FLOAT4_GROUP)
        first = columns[0] - groups.start * FLOAT4_GROUP
        inputs = slice(first, first + columns[1] - columns[0])
        values_EIO = torch.empty([end - start for start, end in (experts, columns, rows)])
        for place, expert in enumerate(range(*experts)):
            values_EIO[place] = self.read(expert, rows, groups).to_float()[:, inputs].T
        return values_EIO

    def quantised(self, index: tuple[slice, ...]) -> Float4Groups | None:
        """Of one expert, as [O, I]; None where a group of inputs would be cut."""
        (expert, _), columns, rows = _spans(self.shape, index)
        if any(at % FLOAT4_GROUP for at in columns):
            return None
        return self.read(expert, rows, _whole(columns, FLOAT4_GROUP))


@dataclass(frozen=True, slots=True)
class _Grouped:
    """A `kernels.Stored`, and a `kernels.QuantisedStored`, whose inputs share scales in groups.

    Attributes:
        shape: (O, I).
        group: inputs of a group; the last one may be smaller.
        read: numbers of a span of outputs and of one of inputs, and scales of the groups that have
            a part of it.
    """

    shape: tuple[int, ...]
    group: int
    read: Callable[[_Span, _Span], QuantisedMatrix]

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        """first:end of each dimension, as float32."""
        rows, columns = _spans(self.shape, index)
        first = columns[0] // self.group * self.group
        end = min(-(-columns[1] // self.group) * self.group, self.shape[1])
        values_OI = self.read(rows, (first, end)).to_float()
        return values_OI[:, columns[0] - first : columns[1] - first]

    def quantised(self, index: tuple[slice, ...]) -> QuantisedMatrix | None:
        """first:end of each dimension; None where a group is cut that cannot be."""
        rows, columns = _spans(self.shape, index)
        if not any(at % self.group and at < self.shape[1] for at in columns):
            return self.read(rows, columns)
        # A part of a group is one or several groups, which have its scale.
        size = math.gcd(self.group, *columns)
        if size % GROUP_MIN:
            return None
        found = self.read(rows, columns)
        if not isinstance(found, Int4Groups):
            return None
        groups_G = torch.arange(*columns, size) // self.group - columns[0] // self.group
        return found.divided(groups_G, size)


def fp8_blocks(name: str, parts: Mapping[str, Raw], block: tuple[int, int]) -> _Grouped:
    """weight [O, I] of float8_e4m3, times weight_scale_inv, one for each block.

    Args:
        name: the tensor's, for errors.
        parts: by role.
        block: outputs and inputs of a block.

    Raises:
        CorruptCheckpoint: the parts do not fit together.
    """
    weight, scales = parts["weight"], parts["weight_scale_inv"]
    wanted = tuple(-(-size // of) for size, of in zip(weight.shape, block, strict=True))
    _require_shape(name, "weight_scale_inv", scales, wanted)
    of_rows, group = block

    def read(rows: _Span, columns: _Span) -> QuantisedMatrix:
        blocks = _whole(rows, of_rows)
        return Float8Blocks(
            values_OI=weight[slice(*rows), slice(*columns)],
            scales_BG=scales[blocks, _whole(columns, group)].float(),
            blocks_O=(torch.arange(*rows) // of_rows - blocks.start).int(),
            group=group,
        )

    return _Grouped(weight.shape, group, read)


def compressed_int4(name: str, parts: Mapping[str, Raw]) -> _Grouped:
    """weight_packed int32 [O, I / 8], eight inputs a word, less 8 or less weight_zero_point
    [O / 8, G], eight outputs a word; times weight_scale [O, G].

    Raises:
        CorruptCheckpoint: the parts do not fit together.
    """
    packed, scales, zeros = (
        parts["weight_packed"],
        parts["weight_scale"],
        parts.get("weight_zero_point"),
    )
    outputs, inputs = parts["weight_shape"][(slice(None),)].tolist()
    _require_shape(name, "weight_packed", packed, (outputs, -(-inputs // _WORD)))
    group = _group(name, inputs, scales.shape[1])
    _require_shape(name, "weight_scale", scales, (outputs, inputs // group))
    if zeros is not None:
        _require_shape(name, "weight_zero_point", zeros, (-(-outputs // _WORD), inputs // group))

    def read(rows: _Span, columns: _Span) -> QuantisedMatrix:
        groups = _whole(columns, group)
        zeros_OG = None
        if zeros is not None:
            zeros_OG = _unpacked(zeros[_whole(rows, _WORD), groups], 0, rows)
        return Int4Groups(
            numbers=_unpacked(packed[slice(*rows), _whole(columns, _WORD)], 1, columns),
            scales_OG=scales[slice(*rows), groups],
            zeros_OG=zeros_OG,
            group=group,
        )

    return _Grouped((outputs, inputs), group, read)


def gptq(name: str, parts: Mapping[str, Raw], zero_offset: int) -> _Grouped:
    """qweight int32 [I / 8, O], eight inputs a word, less qzeros [G, O / 8], eight outputs a word;
    times scales [G, O].

    Args:
        name: the tensor's, for errors.
        parts: by role.
        zero_offset: what is added to qzeros.

    Raises:
        CorruptCheckpoint: the parts do not fit together, or inputs are not in order.
    """
    packed, scales, zeros = parts["qweight"], parts["scales"], parts["qzeros"]
    inputs, outputs = packed.shape[0] * _WORD, packed.shape[1]
    group = _group(name, inputs, scales.shape[0])
    _require_shape(name, "scales", scales, (inputs // group, outputs))
    _require_shape(name, "qzeros", zeros, (inputs // group, -(-outputs // _WORD)))
    if "g_idx" in parts:
        groups_I = parts["g_idx"][(slice(None),)]
        if not torch.equal(groups_I.long(), torch.arange(inputs) // group):
            raise CorruptCheckpoint(
                f"{name}: g_idx puts inputs in another order, but the checkpoint says desc_act "
                "is false"
            )

    def read(rows: _Span, columns: _Span) -> QuantisedMatrix:
        groups = _whole(columns, group)
        return Int4Groups(
            numbers=_unpacked(packed[_whole(columns, _WORD), slice(*rows)], 0, columns).T,
            scales_OG=scales[groups, slice(*rows)].T,
            zeros_OG=_unpacked(zeros[groups, _whole(rows, _WORD)], 1, rows).T + zero_offset,
            group=group,
        )

    return _Grouped((outputs, inputs), group, read)


def awq(name: str, parts: Mapping[str, Raw]) -> _Grouped:
    """qweight int32 [I, O / 8], eight outputs a word in an order of their own, less qzeros
    [G, O / 8] likewise; times scales [G, O].

    Raises:
        CorruptCheckpoint: the parts do not fit together.
    """
    packed, scales, zeros = parts["qweight"], parts["scales"], parts["qzeros"]
    inputs, outputs = packed.shape[0], packed.shape[1] * _WORD
    group = _group(name, inputs, scales.shape[0])
    _require_shape(name, "scales", scales, (inputs // group, outputs))
    _require_shape(name, "qzeros", zeros, (inputs // group, packed.shape[1]))

    def read(rows: _Span, columns: _Span) -> QuantisedMatrix:
        words, groups = _whole(rows, _WORD), _whole(columns, group)
        return Int4Groups(
            numbers=_unpacked(packed[slice(*columns), words], 1, rows, _AWQ_ORDER).T,
            scales_OG=scales[groups, slice(*rows)].T,
            zeros_OG=_unpacked(zeros[groups, words], 1, rows, _AWQ_ORDER).T,
            group=group,
        )

    return _Grouped((outputs, inputs), group, read)


def mxfp4(name: str, parts: Mapping[str, Raw]) -> _Stacked:
    """blocks uint8 [E, O, G, 16], two elements a byte, the lower half first; times two to the power
    of scales uint8 [E, O, G] less 127. As models have it: [E, I, O].

    Raises:
        CorruptCheckpoint: the parts do not fit together.
    """
    blocks, scales = parts["_blocks"], parts["_scales"]
    group_size_bytes = FLOAT4_GROUP // 2
    if len(blocks.shape) != 4 or blocks.shape[3] != group_size_bytes:
        raise CorruptCheckpoint(f"{name}: blocks are {list(blocks.shape)}, not [E, O, G, 16]")
    _require_shape(name, "scales", scales, blocks.shape[:3])
    experts, outputs, groups, _ = blocks.shape

    def read(expert: int, rows: _Span, chosen: slice) -> Float4Groups:
        place = (slice(expert, expert + 1), slice(*rows), chosen)
        bytes_OGX = blocks[(*place, slice(0, group_size_bytes))][0]
        return Float4Groups(
            numbers=torch.stack((bytes_OGX & 15, bytes_OGX >> 4), dim=-1).flatten(1),
            powers_OG=scales[place][0],
        )

    return _Stacked((experts, groups * FLOAT4_GROUP, outputs), read)


def _spans(shape: Sequence[int], index: tuple[slice, ...]) -> list[_Span]:
    chosen = index or (slice(None),) * len(shape)
    return [of.indices(size)[:2] for of, size in zip(chosen, shape, strict=True)]


def _whole(span: _Span, of: int) -> slice:
    """Which groups or words of `of` elements have a part of a span."""
    return slice(span[0] // of, -(-span[1] // of))


def _unpacked(words: Tensor, dim: int, span: _Span, order: Sequence[int] = _IN_ORDER) -> Tensor:
    """The four-bit numbers of a span that lie in int32 words along a dimension, as uint8."""
    shifts = torch.tensor([4 * order.index(element) for element in range(_WORD)])
    apart = (words.unsqueeze(dim + 1) >> shifts.view(_WORD, *[1] * (1 - dim))) & 15
    first = span[0] % _WORD
    return apart.flatten(dim, dim + 1).narrow(dim, first, span[1] - span[0]).to(torch.uint8)


def _group(name: str, inputs: int, groups: int) -> int:
    if not groups or inputs % groups:
        raise CorruptCheckpoint(f"{name}: {inputs} inputs are no {groups} equal groups")
    return inputs // groups


def _require_shape(name: str, what: str, part: Any, wanted: tuple[int, ...]) -> None:
    if tuple(part.shape) != wanted:
        raise CorruptCheckpoint(f"{name}: {what} is {list(part.shape)}, not {list(wanted)}")
