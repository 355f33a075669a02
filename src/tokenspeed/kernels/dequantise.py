"""From ggml's block formats to float32.

A block holds 32 (Q*_0, Q*_1) or 256 (Q*_K) elements of a row: small integers with one scale, and
in some formats one minimum, per 32 or 16 of them. The formats are those of ggml's quantised
types; the arithmetic is float32, scale by scale in the order ggml has it, so the results are
the same bits.

Legend of sizes: N blocks, B bytes of a block.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["dequantise_blocks"]


def dequantise_blocks(raw_NB: Tensor, quant_name: str) -> Tensor:
    """Dequantise whole blocks.

    Args:
        raw_NB: [N, B] uint8, contiguous.
        quant_name: ggml's name of the format, one of `QUANT_TYPES`.

    Returns:
        [N, elements of a block], float32.
    """
    return _FORMATS[quant_name](raw_NB)


def _halves(raw_NB: Tensor, start: int) -> Tensor:
    """The float16 at a byte of each block: [N, 1] float32."""
    return raw_NB[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(raw_NB: Tensor, start: int) -> Tensor:
    """The low and then the high nibbles of the 16 bytes from `start`: [N, 32] uint8."""
    packed = raw_NB[:, start : start + 16]
    return torch.cat((packed & 15, packed >> 4), dim=1)


def _fifth_bits(raw_NB: Tensor, start: int) -> Tensor:
    """The 32 bits of the 4 bytes from `start`, each worth 16: [N, 32] uint8."""
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = raw_NB[:, start : start + 4, None] >> shifts & 1
    return bits.flatten(1) << 4


def _f32(raw_NB: Tensor) -> Tensor:
    return raw_NB.view(torch.float32)


def _f16(raw_NB: Tensor) -> Tensor:
    return raw_NB.view(torch.float16).float()


def _bf16(raw_NB: Tensor) -> Tensor:
    return raw_NB.view(torch.bfloat16).float()


def _q4_0(raw_NB: Tensor) -> Tensor:
    return _nibbles(raw_NB, 2).float().sub_(8).mul_(_halves(raw_NB, 0))


def _q4_1(raw_NB: Tensor) -> Tensor:
    return _nibbles(raw_NB, 4).float().mul_(_halves(raw_NB, 0)).add_(_halves(raw_NB, 2))


def _q5_0(raw_NB: Tensor) -> Tensor:
    q = _nibbles(raw_NB, 6) | _fifth_bits(raw_NB, 2)
    return q.float().sub_(16).mul_(_halves(raw_NB, 0))


def _q5_1(raw_NB: Tensor) -> Tensor:
    q = _nibbles(raw_NB, 8) | _fifth_bits(raw_NB, 4)
    return q.float().mul_(_halves(raw_NB, 0)).add_(_halves(raw_NB, 2))


def _q8_0(raw_NB: Tensor) -> Tensor:
    return raw_NB[:, 2:].view(torch.int8).float().mul_(_halves(raw_NB, 0))


def _six_bit_scales(raw_NB: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and minimums of Q4_K and Q5_K: [N, 8] float32 each.

    Twelve bytes from byte 4 hold eight 6-bit scales and eight 6-bit minimums: the first four of
    each in the low bits of bytes 0-3 and 4-7; of the others four bits lie in the nibbles of bytes
    8-11, and the upper two on top of bytes 0-3 and 4-7.
    """
    packed = raw_NB[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1).float()
    minimums = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1).float()
    return scales.mul_(_halves(raw_NB, 0)), minimums.mul_(_halves(raw_NB, 2))


def _k_nibbles(raw_NB: Tensor, start: int) -> Tensor:
    """[N, 8, 32] uint8 of 128 bytes: each 32 bytes hold two sub-blocks, low nibbles first."""
    packed = raw_NB[:, start : start + 128].reshape(-1, 4, 1, 32)
    return torch.cat((packed & 15, packed >> 4), dim=2).flatten(1, 2)


def _q4_k(raw_NB: Tensor) -> Tensor:
    scales, minimums = _six_bit_scales(raw_NB)
    q = _k_nibbles(raw_NB, 16).float()
    return q.mul_(scales[:, :, None]).sub_(minimums[:, :, None]).flatten(1)


def _q5_k(raw_NB: Tensor) -> Tensor:
    scales, minimums = _six_bit_scales(raw_NB)
    # Bit s of byte e is the fifth bit of element e of sub-block s.
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    fifth = (raw_NB[:, None, 16:48] >> shifts & 1) << 4
    q = (_k_nibbles(raw_NB, 48) | fifth).float()
    return q.mul_(scales[:, :, None]).sub_(minimums[:, :, None]).flatten(1)


def _q6_k(raw_NB: Tensor) -> Tensor:
    # Each half of a block has 64 bytes of low nibbles and 32 bytes of upper bit pairs; pair p of
    # byte e belongs to element e of the half's quarter p.
    low = raw_NB[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat((low & 15, low >> 4), dim=2).view(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = (raw_NB[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3) << 4
    q = (low | high).float().sub_(32).view(-1, 16, 16)
    scales = raw_NB[:, 192:208].view(torch.int8).float().mul_(_halves(raw_NB, 208))
    return q.mul_(scales[:, :, None]).flatten(1)


_FORMATS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
