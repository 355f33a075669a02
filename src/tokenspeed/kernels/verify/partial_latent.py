"""Attention over a rank's share of each context's latents, and what becomes of its parts.

Legend: T tokens, L tokens of a row, N positions of a row, Q query heads, E elements of a latent,
V elements of a value, K those of the compressed KV that it is made of, X of a part of an attention,
P pages, C positions of a page.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.ops.gemm import HeadMatrices
from tokenspeed.kernels.rows import ContextShare, PagedRows
from tokenspeed.kernels.verify.attention import ROWS
from tokenspeed.kernels.verify.case import (
    TYPES,
    Call,
    Case,
    Compared,
    compare,
    equal,
    named,
    noise,
    stored,
)
from tokenspeed.kernels.verify.latent import LATENT_FORMATS, LATENT_SHAPES, LatentShape
from tokenspeed.kernels.verify.paging import scattered_rows, written_slots
from tokenspeed.kernels.weights import PANELS, PackedWeight

__all__ = ["partial_mla_cases", "project_parts_cases"]

_SHARES = (
    ContextShare(index=0, ranks=2),
    ContextShare(index=2, ranks=3),
)
# Tokens, heads, elements of what is projected and of what comes of it.
_PROJECTED = ((1, 1, 32, 16), (5, 3, 7, 9), (19, 16, 512, 128))


def partial_mla_cases() -> Iterator[Case]:
    """Decode and prompts over shares that hold much, little and nothing of a row."""
    for shape in LATENT_SHAPES:
        for format_name, dtype in LATENT_FORMATS:
            for share in _SHARES:
                for name, lengths in ROWS.items():
                    yield Case(
                        op="attention.partial_mla",
                        format_name=format_name,
                        dtype=dtype,
                        name=f"{name}, share {share.index} of {share.ranks}, {shape}",
                        traits={"latent_dim": shape.latent, "value_dim": shape.value},
                        check=partial(_partial_mla, shape, (format_name, dtype), (lengths, share)),
                    )


def project_parts_cases() -> Iterator[Case]:
    """Means of heads by themselves; one of nothing seen."""
    for dtype in TYPES:
        for format_name in (named(dtype), f"{named(dtype)}_panels"):
            for sizes in _PROJECTED:
                if format_name in (named(dtype), *PANELS):
                    tokens, heads, taken, given = sizes
                    yield Case(
                        op="attention.project_parts",
                        format_name=format_name,
                        dtype=dtype,
                        name=f"{tokens} x {heads} of {taken} x {given}",
                        check=partial(_project_parts, sizes, (format_name, dtype)),
                    )


def _partial_mla(
    shape: LatentShape,
    kind: tuple[str, torch.dtype],
    places: tuple[tuple[tuple[int, int], ...], ContextShare],
    kernel: Call,
    runtime: CpuRuntime,
) -> Iterator[Compared]:
    format_name, dtype = kind
    lengths, share = places
    whole_size = shape.page_size * share.ranks
    rows, pages = scattered_rows(lengths, page_size=whole_size, seed=len(lengths))
    q_TQE = noise(int(rows.query_starts[-1]), shape.heads, shape.latent, dtype=dtype)
    latents_PCE = torch.full((pages, whole_size, shape.latent), torch.nan, dtype=dtype)
    written = written_slots(rows)
    latents_NE = noise(len(written), shape.latent, dtype=dtype, seed=1)
    # Rounding is no error of attention's: numbers are those that the pages hold.
    latents_PCE.flatten(0, 1)[written] = stored(latents_NE, format_name).to(dtype)
    own = slice(share.index * shape.page_size, (share.index + 1) * shape.page_size)
    pool = stored(latents_PCE[:, own].contiguous(), format_name)
    scale = 1.3 / math.sqrt(shape.latent)
    means_TQV, log_sums_TQ = _exact(q_TQE, latents_PCE, rows, scale=scale, shape=shape, share=share)
    local = replace(rows, page_size=shape.page_size, share=share)
    found_TQX = kernel(q_TQE, pool, local, scale, value_dim=shape.value)
    seen_TQ = log_sums_TQ.isfinite()
    yield equal("what is seen", found_TQX[..., -1].isfinite(), seen_TQ)
    yield compare("means", found_TQX[..., :-1].contiguous(), means_TQV, torch.float32)
    yield compare(
        "logarithms of sums",
        found_TQX[..., -1].where(seen_TQ, 0.0),
        log_sums_TQ.where(seen_TQ, 0.0),
        torch.float32,
    )


def _exact(
    q_TQE: torch.Tensor,
    latents_PCE: torch.Tensor,
    rows: PagedRows,
    *,
    scale: float,
    shape: LatentShape,
    share: ContextShare,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in float64, over a pool of all ranks: means_TQV and logarithms of sums."""
    means, log_sums = [], []
    for row, slot in enumerate(rows.row_slots.tolist()):
        start, end = rows.query_starts[row : row + 2].tolist()
        context = int(rows.context_lens[row])
        at_N = torch.arange(context + end - start)
        pages_N = rows.page_table_XP[slot][at_N // rows.page_size].long()
        latents_NE = latents_PCE[pages_N, at_N % rows.page_size].double()
        scores_LQN = torch.einsum("lqe,ne->lqn", q_TQE[start:end].double(), latents_NE) * scale
        unseen_LN = at_N > at_N[context:, None]
        unseen_LN |= at_N // shape.page_size % share.ranks != share.index
        scores_LQN = scores_LQN.masked_fill(unseen_LN[:, None], -torch.inf)
        log_sums.append(scores_LQN.logsumexp(-1))
        weights_LQN = (scores_LQN - log_sums[-1][..., None]).exp()
        weights_LQN = weights_LQN.masked_fill(unseen_LN[:, None], 0.0)
        means.append(torch.einsum("lqn,nv->lqv", weights_LQN, latents_NE[:, : shape.value]))
    return torch.cat(means), torch.cat(log_sums)


def _project_parts(
    sizes: tuple[int, int, int, int],
    kind: tuple[str, torch.dtype],
    kernel: Call,
    runtime: CpuRuntime,
) -> Iterator[Compared]:
    tokens, heads, taken, given = sizes
    format_name, dtype = kind
    # Means that the weight's type holds, so that rounding to it is no error.
    means_TQK = noise(tokens, heads, taken, dtype=dtype).float()
    log_sums_TQ1 = noise(tokens, heads, 1, dtype=torch.float32, seed=1)
    means_TQK[0, 0], log_sums_TQ1[0, 0] = 0.0, -torch.inf
    values_QVK = noise(heads, given, taken, dtype=dtype, seed=2)
    weight_QVK: HeadMatrices = values_QVK
    if format_name in PANELS:
        weight_QVK = [_panels(values_VK, runtime) for values_VK in values_QVK]
    found_TQX = kernel(torch.cat((means_TQK, log_sums_TQ1), dim=-1), weight_QVK)
    exact_TQV = torch.einsum("tqk,qvk->tqv", means_TQK.double(), values_QVK.double())
    # How large sums are whose terms have random signs.
    size_TQV = torch.einsum(
        "tqk,qvk->tqv", means_TQK.double().square(), values_QVK.double().square()
    ).sqrt()
    means_TQV = found_TQX[..., :-1].contiguous()
    yield compare("means", means_TQV, exact_TQV, torch.float32, size=size_TQV)
    yield equal("logarithms of sums", found_TQX[..., -1:].contiguous(), log_sums_TQ1)


def _panels(values_VK: torch.Tensor, runtime: CpuRuntime) -> PackedWeight:
    outputs, inputs = values_VK.shape
    weight = PackedWeight(
        (outputs, inputs), parts=(outputs,), dtype=values_VK.dtype, runtime=runtime
    )
    weight.pack_dense(0, values_VK)
    return weight
