"""Packs matrices as quantised checkpoints have them, written from the formats' descriptions.

Each packer gives the tensors of one matrix by the end of their name, and the values they stand for.
Legend: O outputs, I inputs, E experts, G groups.
"""

import torch

__all__ = ["Packed", "pack_awq", "pack_compressed", "pack_fp8", "pack_gptq", "pack_mxfp4"]

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]


def pack_fp8(values_OI: torch.Tensor, block: tuple[int, int]) -> Packed:
    """e4m3 with one scale a block, of which the last ones may be smaller."""
    outputs, inputs = values_OI.shape
    scales = torch.empty(-(-outputs // block[0]), -(-inputs // block[1]))
    stored = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn)
    exact = torch.empty_like(values_OI)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            at = (
                slice(row * block[0], (row + 1) * block[0]),
                slice(column * block[1], (column + 1) * block[1]),
            )
            scales[row, column] = values_OI[at].abs().max() / 448
            stored[at] = (values_OI[at] / scales[row, column]).to(torch.float8_e4m3fn)
            exact[at] = stored[at].float() * scales[row, column]
    return {"weight": stored, "weight_scale_inv": scales}, exact


def pack_compressed(values_OI: torch.Tensor, group: int, *, symmetric: bool) -> Packed:
    """Eight inputs a word from the lowest bits on; zero points eight outputs a word."""
    numbers, scales_OG, zeros_OG = _rounded(values_OI, group, symmetric=symmetric)
    parts = {
        "weight_packed": _words(numbers, dim=1),
        "weight_scale": scales_OG,
        "weight_shape": torch.tensor(values_OI.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = _words(zeros_OG, dim=0)
    return parts, _exact(numbers, scales_OG, zeros_OG, group)


def pack_gptq(values_OI: torch.Tensor, group: int, *, version: int = 1) -> Packed:
    """Transposed: eight inputs a word; zero points, of version 1 less one, eight outputs a word."""
    numbers, scales_OG, zeros_OG = _rounded(values_OI, group, symmetric=False, least=1)
    parts = {
        "qweight": _words(numbers.T, dim=0),
        "qzeros": _words(zeros_OG.T - int(version == 1), dim=1),
        "scales": scales_OG.T.contiguous(),
        "g_idx": (torch.arange(values_OI.shape[1]) // group).int(),
    }
    return parts, _exact(numbers, scales_OG, zeros_OG, group)


def pack_awq(values_OI: torch.Tensor, group: int) -> Packed:
    """Transposed: eight outputs a word, the even ones of eight first."""
    numbers, scales_OG, zeros_OG = _rounded(values_OI, group, symmetric=False)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    parts = {
        "qweight": _words(_shuffled(numbers.T, order), dim=1),
        "qzeros": _words(_shuffled(zeros_OG.T, order), dim=1),
        "scales": scales_OG.T.contiguous(),
    }
    return parts, _exact(numbers, scales_OG, zeros_OG, group)


def pack_mxfp4(values_EIO: torch.Tensor) -> Packed:
    """Groups of 32 inputs, two a byte, the first in the lower half; scales are powers of two."""
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    grouped = values_EIO.transpose(1, 2).unflatten(2, (-1, 32))
    powers = torch.ceil(torch.log2(grouped.abs().amax(-1).clamp(min=1e-9) / 6))
    scaled = grouped / torch.exp2(powers)[..., None]
    numbers = (scaled.abs()[..., None] - levels).abs().argmin(-1)
    exact = levels[numbers] * scaled.sign() * torch.exp2(powers)[..., None]
    numbers = numbers + 8 * (scaled < 0)
    parts = {
        "_blocks": (numbers[..., ::2] | numbers[..., 1::2] << 4).to(torch.uint8),
        "_scales": (powers + 127).to(torch.uint8),
    }
    return parts, exact.flatten(2).transpose(1, 2).contiguous()


def _rounded(
    values_OI: torch.Tensor, group: int, *, symmetric: bool, least: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers 0 to 15, scales in float16, and the number that stands for zero."""
    grouped = values_OI.unflatten(1, (-1, group))
    if symmetric:
        scales_OG = (grouped.abs().amax(-1) / 7).half()
        zeros_OG = torch.full(scales_OG.shape, 8)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales_OG = ((high - low) / 15).half()
        zeros_OG = (-low / scales_OG.float()).round().int().clamp(least, 15)
    numbers = (grouped / scales_OG.float()[..., None]).round() + zeros_OG[..., None]
    return numbers.clamp(0, 15).int().flatten(1), scales_OG, zeros_OG.int()


def _exact(
    numbers: torch.Tensor, scales_OG: torch.Tensor, zeros_OG: torch.Tensor, group: int
) -> torch.Tensor:
    grouped = numbers.unflatten(1, (-1, group))
    return ((grouped - zeros_OG[..., None]) * scales_OG.float()[..., None]).flatten(1)


def _words(numbers: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Eight numbers of four bits in each int32, the first in the lowest; zeros fill the last."""
    numbers = numbers.movedim(dim, -1).long()
    numbers = torch.nn.functional.pad(numbers, (0, -numbers.shape[-1] % 8))
    words = (numbers.unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.int().movedim(-1, dim).contiguous()


def _shuffled(numbers: torch.Tensor, order: list[int]) -> torch.Tensor:
    return numbers.unflatten(-1, (-1, 8))[..., order].flatten(-2)
