"""Attention of prompts over paged latents, whose keys and values are made first.

Legend: L tokens of the prompt, H heads, D elements of a query, N those that are not rotated,
E elements of a latent, K those of them that are compressed KV, V elements of a value, P pages,
C positions of a page, A pages of the prompt.
"""

import math

import torch

from tokenspeed.kernels.triton.attention import dot_precision
from tokenspeed.kernels.triton.lazy import DeviceCode
from tokenspeed.kernels.triton.registration import KV_FORMATS, next_power_of_2, triton_kernel
from tokenspeed.kernels.triton.tuning import tuned

__all__ = ["prompt_mla"]

_device = DeviceCode("latent_prompt")
_OP = "attention.prompt_mla"
_LOG2_E = math.log2(math.e)
# Keys and values of so many positions are kept at once: 268 MB of 128 heads.
CHUNK = 4096


@triton_kernel(
    _OP,
    formats=KV_FORMATS,
    traits={"latent_dim": range(2, 641), "value_dim": range(1, 513)},
    batch_dependent=True,
)
def prompt_mla(
    q_LHD: torch.Tensor,
    k_up_HKN: torch.Tensor,
    v_up_HVK: torch.Tensor,
    latents_PCE: torch.Tensor,
    pages_A: torch.Tensor,
    *,
    context_len: int,
    scale: float,
) -> torch.Tensor:
    """A chunk of positions after the other: keys and values by the library's products, then
    attention, which merges what it finds with the chunks before by logarithms of sums."""
    tokens, heads, query_dim = q_LHD.shape
    _, rank, plain_dim = k_up_HKN.shape
    value_dim = v_up_HVK.shape[1]
    page_size, latent_dim = latents_PCE.shape[1:]
    if q_LHD.stride(-1) != 1:
        q_LHD = q_LHD.contiguous()
    out_LHV = q_LHD.new_empty((tokens, heads, value_dim))
    if not out_LHV.numel():
        return out_LHV
    length = context_len + tokens
    chunk = max(1, CHUNK // page_size) * page_size
    kept = tokens * heads if length > chunk else 0
    means = torch.empty((kept, value_dim), dtype=torch.float32, device=q_LHD.device)
    lses = torch.empty(kept, dtype=torch.float32, device=q_LHD.device)
    single = q_LHD.dtype == torch.float32
    sizes = tuned(
        _OP,
        f"{query_dim} and {value_dim}, {q_LHD.dtype}",
        q_LHD.device,
        block=32 if single else 64,
        warps=4 if single else 8,
        stages=2,
    )
    rows = 32 if single else 128
    for begin in range(0, length, chunk):
        end = min(begin + chunk, length)
        pages = pages_A[begin // page_size : -(-end // page_size)].long()
        # Numbers of 8 bits are gathered as bytes.
        found = latents_PCE.view(torch.uint8) if latents_PCE.dtype.itemsize == 1 else latents_PCE
        latents_NE = found[pages].view(latents_PCE.dtype).view(-1, latent_dim)[: end - begin]
        latents_NE = latents_NE.to(q_LHD.dtype)
        compressed_HNK = latents_NE[:, :rank].expand(heads, -1, -1)
        _device.attend_made[(-(-tokens // rows), heads)](
            q_LHD,
            torch.bmm(compressed_HNK, k_up_HKN),
            latents_NE[:, rank:],
            torch.bmm(compressed_HNK, v_up_HVK.transpose(1, 2)),
            means,
            lses,
            out_LHV,
            tokens,
            context_len,
            begin,
            end,
            q_LHD.stride(0),
            q_LHD.stride(1),
            latents_NE.stride(0),
            heads,
            scale * _LOG2_E,
            PLAIN_DIM=plain_dim,
            ROTATED_DIM=query_dim - plain_dim,
            VALUE_DIM=value_dim,
            FIRST=begin == 0,
            LAST=end == length,
            M=rows,
            N=sizes["block"],
            P=max(16, next_power_of_2(plain_dim)),
            R=max(16, next_power_of_2(query_dim - plain_dim)),
            V=max(16, next_power_of_2(value_dim)),
            PRECISION=dot_precision(q_LHD.dtype),
            num_warps=sizes["warps"],
            num_stages=sizes["stages"],
        )
    return out_LHV
