"""Sampling from logits.

Legend: S rows, V vocabulary, K likeliest tokens, L tokens seen, W 32-bit words of V bits.
"""

import torch

from tokenspeed.kernels.triton.lazy import DeviceCode
from tokenspeed.kernels.triton.registration import next_power_of_2, triton_kernel

__all__ = ["apply_bitmask", "argmax", "draw", "logprobs", "penalise"]

_device = DeviceCode("sampling")
_FORMATS = ("float32",)
_BLOCK_MAX = 4096
_SEEN_BLOCK = 256


@triton_kernel("sampling.argmax", formats=_FORMATS)
def argmax(logits_SV: torch.Tensor) -> torch.Tensor:
    """Chunks of the vocabulary side by side, then the chunks."""
    rows, size = logits_SV.shape
    tokens_S = torch.zeros(rows, dtype=torch.int64, device=logits_SV.device)
    if not rows:
        return tokens_S
    block = min(_BLOCK_MAX, next_power_of_2(size))
    chunks = -(-size // block)
    peaks = torch.empty((rows, chunks), dtype=torch.float32, device=logits_SV.device)
    places = torch.empty((rows, chunks), dtype=torch.int32, device=logits_SV.device)
    _device.argmax_chunks[(rows, chunks)](
        logits_SV, peaks, places, size, logits_SV.stride(0), chunks, BLOCK=block, num_warps=8
    )
    _device.argmax_rows[(rows,)](
        peaks, places, tokens_S, chunks, BLOCK=next_power_of_2(chunks), num_warps=1
    )
    return tokens_S


@triton_kernel("sampling.draw", formats=_FORMATS)
def draw(
    logits_SV: torch.Tensor,
    uniforms_S: torch.Tensor,
    *,
    temperatures_S: torch.Tensor,
    top_ks_S: torch.Tensor,
    top_ps_S: torch.Tensor,
    min_ps_S: torch.Tensor,
) -> torch.Tensor:
    """A program for each row, all filters in one launch.

    Parameters may be on the device already, as they are where a step is captured.
    """
    rows, size = logits_SV.shape
    tokens_S = torch.zeros(rows, dtype=torch.int64, device=logits_SV.device)
    if not rows:
        return tokens_S
    columns = (
        column_S.to(logits_SV.device, non_blocking=True)
        for column_S in (uniforms_S, temperatures_S, top_ks_S, top_ps_S, min_ps_S)
    )
    _device.draw[(rows,)](
        logits_SV,
        *columns,
        tokens_S,
        size,
        logits_SV.stride(0),
        BLOCK=min(_BLOCK_MAX, next_power_of_2(size)),
        num_warps=16,
    )
    return tokens_S


@triton_kernel("sampling.logprobs", formats=_FORMATS)
def logprobs(
    logits_SV: torch.Tensor, tokens_S: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A program for each row, one pass for each of the likeliest."""
    rows, size = logits_SV.shape
    device = logits_SV.device
    chosen_S = torch.empty(rows, dtype=torch.float32, device=device)
    ids_SK = torch.empty((rows, count), dtype=torch.int64, device=device)
    values_SK = torch.empty((rows, count), dtype=torch.float32, device=device)
    if rows:
        _device.logprobs[(rows,)](
            logits_SV,
            tokens_S,
            chosen_S,
            ids_SK,
            values_SK,
            size,
            logits_SV.stride(0),
            count,
            BLOCK=min(_BLOCK_MAX, next_power_of_2(size)),
            num_warps=16,
        )
    return chosen_S, ids_SK, values_SK


@triton_kernel("sampling.penalise", formats=_FORMATS)
def penalise(
    logits_V: torch.Tensor,
    seen_L: torch.Tensor,
    output_counts_L: torch.Tensor,
    *,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    """Tokens seen are distinct, so each is one element's work."""
    if len(seen_L):
        _device.penalise[(-(-len(seen_L) // _SEEN_BLOCK),)](
            logits_V,
            seen_L,
            output_counts_L,
            len(seen_L),
            repetition,
            presence,
            frequency,
            BLOCK=_SEEN_BLOCK,
            num_warps=4,
        )


@triton_kernel("sampling.apply_bitmask", formats=_FORMATS)
def apply_bitmask(logits_SV: torch.Tensor, bitmask_SW: torch.Tensor) -> None:
    """Only what is excluded is written."""
    rows, size = logits_SV.shape
    block = min(_BLOCK_MAX, next_power_of_2(max(1, size)))
    if logits_SV.numel():
        _device.apply_bitmask[(rows, -(-size // block))](
            logits_SV,
            bitmask_SW,
            size,
            logits_SV.stride(0),
            bitmask_SW.shape[1],
            BLOCK=block,
            num_warps=4,
        )
