"""Attention over paged latents, and writes to them.

Legend: T tokens, L tokens of a row, N positions a row has in the cache, Q query heads, E elements
of a latent, V those of them that are its value, P pages, C positions of a page.
"""

import torch

from tokenspeed.kernels.kv_formats import FLOAT8
from tokenspeed.kernels.reference.gemm import DENSE
from tokenspeed.kernels.reference.kvcache import scatter
from tokenspeed.kernels.registry import ANY, Priority, kernel
from tokenspeed.kernels.rows import PagedRows

__all__ = ["append_latents", "join_heads", "paged_mla", "prompt_mla"]

_FORMATS = (*DENSE, FLOAT8)
_TRAITS = {"latent_dim": ANY, "value_dim": ANY}


@kernel("attention.join_heads", solution="reference", formats=DENSE, priority=Priority.REFERENCE)
def join_heads(front_TQA: torch.Tensor, behind_TQB: torch.Tensor) -> torch.Tensor:
    """A copy of both."""
    return torch.cat((front_TQA, behind_TQB), dim=-1)


@kernel(
    "attention.paged_mla",
    solution="reference",
    formats=_FORMATS,
    traits=_TRAITS,
    priority=Priority.REFERENCE,
    batch_dependent=True,
)
def paged_mla(
    q_TQE: torch.Tensor,
    latents_PCE: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    value_dim: int,
) -> torch.Tensor:
    """Gather each row's latents, then attend in float32 with a mask that says who sees what."""
    out_TQV = q_TQE.new_empty(*q_TQE.shape[:2], value_dim)
    for row in rows.by_row:
        length = row.context_len + row.end - row.start
        latents_NE = latents_PCE.index_select(0, row.pages_P).flatten(0, 1)[:length].float()
        scores_LQN = q_TQE[row.start : row.end].float() @ latents_NE.T * scale
        if row.allowed_LN is not None:
            scores_LQN = scores_LQN.masked_fill(~row.allowed_LN[:, None], -torch.inf)
        out_TQV[row.start : row.end] = scores_LQN.softmax(-1) @ latents_NE[:, :value_dim]
    return out_TQV


@kernel(
    "kvcache.append_latents",
    solution="reference",
    formats=_FORMATS,
    traits={"latent_dim": ANY},
    priority=Priority.REFERENCE,
)
def append_latents(
    latents_TE: torch.Tensor, latents_PCE: torch.Tensor, kv_slots_T: torch.Tensor
) -> None:
    """A scatter into the pool seen as one long row of slots, which may be of another type."""
    scatter(latents_TE, latents_PCE, kv_slots_T)


@kernel(
    "attention.prompt_mla",
    solution="reference",
    formats=_FORMATS,
    traits=_TRAITS,
    priority=Priority.REFERENCE,
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
    """All keys and values at once, in float32."""
    tokens, heads, query_dim = q_LHD.shape
    rank, plain_dim = k_up_HKN.shape[1:]
    latents_NE = latents_PCE[pages_A.long()].flatten(0, 1)[: context_len + tokens].float()
    compressed_NK, rotated_NR = latents_NE[:, :rank], latents_NE[:, rank:]
    plain_HNN = torch.matmul(compressed_NK, k_up_HKN.float())
    keys_HND = torch.cat((plain_HNN, rotated_NR.expand(heads, -1, -1)), dim=-1)
    assert keys_HND.shape[2] == query_dim == plain_dim + rotated_NR.shape[1]
    scores_HLN = torch.matmul(q_LHD.float().transpose(0, 1), keys_HND.transpose(1, 2)) * scale
    at_N = torch.arange(context_len + tokens, device=q_LHD.device)
    scores_HLN = scores_HLN.masked_fill(at_N > at_N[context_len:, None], -torch.inf)
    values_HNV = torch.matmul(compressed_NK, v_up_HVK.float().transpose(1, 2))
    out_HLV = torch.matmul(scores_HLN.softmax(-1), values_HNV)
    return out_HLV.transpose(0, 1).to(q_LHD.dtype)
