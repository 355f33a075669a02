"""Owns the declarations of attention over paged KV; never computes it.

Legend: T tokens, Q query heads, H KV heads, D elements of a head, X elements of a part, P pages,
C positions of a page, E elements of a latent, V those of them that are its value; where a head's
value is made of these, they are L, and V its own.
"""

import torch

from tokenspeed.kernels.kv_formats import pool_format
from tokenspeed.kernels.ops.gemm import HeadMatrices
from tokenspeed.kernels.registry import declare_op
from tokenspeed.kernels.rows import PagedRows

__all__ = [
    "join_heads",
    "paged_mha",
    "paged_mla",
    "partial_mha",
    "partial_mla",
    "project_parts",
    "prompt_mla",
]


@declare_op("attention.paged_mha", traits=("head_dim",))
def paged_mha(
    q_TQD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    window: int | None = None,
    sinks_Q: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v for every row of a mixed batch; gives out_TQD.

    The KV of the step's own tokens is in the pages already. A token at position p of its row
    attends to positions 0..p of it, or to the last `window` of these; what pages that no token of
    the row sees hold does not matter. Query head i reads KV head i * H // Q (grouped-query
    attention, Ainslie et al. 2023). A head's sink, float32, is one more score that takes its part
    of the softmax, is not scaled, and gives nothing (gpt-oss, 2025). Softmax and sums are float32.
    With a soft cap c, scores, scaled already, become c tanh(score / c) (Gemma 2, 2024, section 2);
    sinks stay as they are. A row's result does not depend on the other rows.

    Traits:
        head_dim: D.
    """
    kernel = paged_mha.best(q_TQD, format_name=pool_format(k_PCHD), head_dim=q_TQD.shape[2])
    return kernel(
        q_TQD, k_PCHD, v_PCHD, rows, scale, window=window, sinks_Q=sinks_Q, soft_cap=soft_cap
    )


@declare_op("attention.partial_mha", traits=("head_dim",))
def partial_mha(
    q_TQD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    window: int | None = None,
    sinks_Q: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `paged_mha` gives of the positions that pages hold where ranks share a context
    (`rows.share`); gives parts_TQX in float32, X = D + 1.

    The first D elements are the mean of the values seen here, 0 where there are none, the last is
    the logarithm of the sum that softmax divided by, -inf where there are none. Parts of all ranks
    are the whole when means are weighted by their exponents. Pages hold this rank's positions of a
    row one after the other. A head's sink counts as one position, and is the first rank's alone.

    Traits:
        head_dim: D.
    """
    kernel = partial_mha.best(q_TQD, format_name=pool_format(k_PCHD), head_dim=q_TQD.shape[2])
    return kernel(q_TQD, k_PCHD, v_PCHD, rows, scale, window=window, sinks_Q=sinks_Q)


@declare_op("attention.join_heads")
def join_heads(front_TQA: torch.Tensor, behind_TQB: torch.Tensor) -> torch.Tensor:
    """Of each head one vector and behind it another, [T, Q, A + B], both of one type: a query over
    latents, and a latent with one head, of what is rotated and what is not."""
    return join_heads.best(front_TQA)(front_TQA, behind_TQB)


@declare_op("attention.paged_mla", traits=("latent_dim", "value_dim"))
def paged_mla(
    q_TQE: torch.Tensor,
    latents_PCE: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    value_dim: int,
) -> torch.Tensor:
    """Multi-head latent attention (DeepSeek-V2, 2024, section 2.1) in its absorbed form, for every
    row of a mixed batch; gives out_TQV, of the type of q.

    A position's latent is the compressed KV that all heads share (V elements, normalised) and
    behind it its rotated key (E - V elements): both K and V of every query head. A query is the
    head's own part times the up-projection of K, so that it meets compressed KV as it is, and
    behind it the rotated part: [q_nope W_UK, q_rope]. What comes out is, for each head, the mean
    of compressed KV; the head's up-projection of V is left to the caller, and so is the scale,
    which is that of the dimensions before absorption: (nope + rope) ** -0.5, times what YaRN asks.

    The latents of the step's own tokens are in the pages already. A token at position p of its row
    attends to positions 0..p of it. Softmax and sums are float32. A row's result does not depend
    on the other rows; with native kernels nor on how its prompt was cut, so one token decoded and
    the same token in a prompt are the same bits.

    Traits:
        latent_dim: E.
        value_dim: V.
    """
    kernel = paged_mla.best(
        q_TQE,
        format_name=pool_format(latents_PCE),
        latent_dim=q_TQE.shape[2],
        value_dim=value_dim,
    )
    return kernel(q_TQE, latents_PCE, rows, scale, value_dim=value_dim)


@declare_op("attention.partial_mla", traits=("latent_dim", "value_dim"))
def partial_mla(
    q_TQE: torch.Tensor,
    latents_PCE: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    value_dim: int,
) -> torch.Tensor:
    """What `paged_mla` gives of the positions that pages hold where ranks share a context
    (`rows.share`); gives parts_TQX in float32, X = V + 1, as `partial_mha` does.

    Traits:
        latent_dim: E.
        value_dim: V.
    """
    kernel = partial_mla.best(
        q_TQE,
        format_name=pool_format(latents_PCE),
        latent_dim=q_TQE.shape[2],
        value_dim=value_dim,
    )
    return kernel(q_TQE, latents_PCE, rows, scale, value_dim=value_dim)


@declare_op("attention.project_parts")
def project_parts(parts_TQX: torch.Tensor, weight_QVL: HeadMatrices) -> torch.Tensor:
    """Parts of an attention whose means are each head's product of what they were, [T, Q, V + 1] of
    [T, Q, L + 1]; logarithms of sums stay as they are. float32 both, where a kernel may round means
    to the weight's type for the product.

    A weighted mean of products is the product of the mean, so it does not matter whether parts are
    put together before or after, but for what moves.
    """
    if isinstance(weight_QVL, torch.Tensor):
        return project_parts.best(weight_QVL)(parts_TQX, weight_QVL)
    return project_parts.best(parts_TQX, weight=weight_QVL[0])(parts_TQX, weight_QVL)


@declare_op("attention.prompt_mla", traits=("latent_dim", "value_dim"))
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
    """The attention of one prompt's new tokens that `paged_mla` and the up-projections around it
    give, over keys and values that are made of latents; gives out_LHV, of the type of q.

    A query of D = N + E - K elements is not absorbed: its head's part, and behind it the rotated
    one. Of each position every head gets a key, its up-projection of the K elements of compressed
    KV with the rotated key behind, and a value [V]. Fewer operations are needed for each pair of a
    token and a position, and some for each position: it pays where many tokens see each. Bits are
    not those that `paged_mla` gives. A model calls it where a kernel does better than absorbed
    queries, and does without elsewhere.

    Args:
        q_LHD: of L tokens, whose latents are in the pages already.
        k_up_HKN, v_up_HVK: up-projections of each head.
        latents_PCE: the pool.
        pages_A: integers, the prompt's pages in order.
        context_len: positions before the first token.
        scale: of scores.

    Traits:
        latent_dim: E.
        value_dim: K, elements of compressed KV.
    """
    kernel = prompt_mla.best(
        q_LHD,
        format_name=pool_format(latents_PCE),
        latent_dim=latents_PCE.shape[2],
        value_dim=k_up_HKN.shape[1],
    )
    operands = (q_LHD, k_up_HKN, v_up_HVK, latents_PCE, pages_A)
    return kernel(*operands, context_len=context_len, scale=scale)
