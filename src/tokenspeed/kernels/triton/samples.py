"""A call of every kernel of the solution, at sizes of models it is meant for.

Legend: T tokens, M model features, Q query heads, H KV heads, D elements of a head, P pages,
C positions of a page, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from tokenspeed.kernels.quantised import (
    FLOAT4_GROUP,
    FLOAT4_GROUPS,
    FLOAT8_BLOCKS,
    INT4_GROUPS,
    Float4Groups,
    Float8Blocks,
    Int4Groups,
    QuantisedMatrix,
)
from tokenspeed.kernels.quantised_weight import QuantisedWeight
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.kernels.triton import (
    activation,
    attention,
    embedding,
    gemm,
    kvcache,
    latent,
    latent_prompt,
    moe,
    norm,
    quantised,
    rope,
    sampling,
)

__all__ = ["Sample", "samples"]

_PAGES = 8
_BFLOAT16 = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One call.

    Attributes:
        op: what is called.
        name: its sizes, in words.
        call: makes operands and runs the kernel.
    """

    op: str
    name: str
    call: Callable[[], object]


def samples() -> Iterator[Sample]:
    """Llama-3-8B's, DeepSeek-V3's and gpt-oss's sizes."""
    tokens, features = 4, 4096
    x_TM = torch.zeros(tokens, features, dtype=_BFLOAT16)
    weight_M = torch.zeros(features, dtype=_BFLOAT16)
    sum_TM = torch.zeros(tokens, features)
    yield _sample("norm.rms_norm", "4096", norm.rms_norm, x_TM, weight_M, 1e-5)
    yield _sample("norm.add_rms_norm", "4096", norm.add_rms_norm, x_TM, sum_TM, weight_M, 1e-5)
    yield _sample("activation.silu_and_mul", "2 x 2048", activation.silu_and_mul, x_TM)
    yield _sample("activation.gelu_tanh_and_mul", "2 x 2048", activation.gelu_tanh_and_mul, x_TM)
    indices_T = torch.zeros(tokens, dtype=torch.int64)
    yield _sample("embedding.lookup", "4096", embedding.lookup, indices_T, x_TM)
    yield _sample("embedding.take", "4096", embedding.take, x_TM, indices_T)
    cos_TE = torch.zeros(tokens, 64)
    yield _sample("rope.angles", "64", rope.angles, indices_T, cos_TE[0])
    heads_TQD = torch.zeros(tokens, 40, 128, dtype=_BFLOAT16)
    yield _sample("rope.rotate", "40 x 128", rope.rotate, heads_TQD, cos_TE, cos_TE)
    weight_OI = torch.zeros(64, features, dtype=_BFLOAT16)
    yield _sample("gemm.linear", "4096", gemm.linear, x_TM, weight_OI, weight_OI[:, 0])
    yield _sample("gemm.logits", "4096", gemm.logits, x_TM, weight_OI)
    weight_HOI = torch.zeros(40, 512, 128, dtype=_BFLOAT16)
    yield _sample("gemm.heads", "40 x 128 x 512", gemm.heads, heads_TQD, weight_HOI)
    yield from _quantised()
    yield from _attention()
    yield from _latents()
    yield from _experts()
    yield from _sampling()


def _weight(name: str, outputs: int, inputs: int, *, uniform: bool = False) -> QuantisedWeight:
    """Of zeros."""
    numbers = torch.zeros(outputs, inputs, dtype=torch.uint8)
    matrix: QuantisedMatrix
    if name == FLOAT8_BLOCKS:
        matrix = Float8Blocks(
            values_OI=numbers.view(torch.float8_e4m3fn),
            scales_BG=torch.zeros(-(-outputs // 128), -(-inputs // 128)),
            blocks_O=torch.zeros(outputs, dtype=torch.int32),
            group=128,
        )
    elif name == INT4_GROUPS:
        group = 128 if inputs % 128 == 0 else 64
        scales_OG = torch.zeros(outputs, inputs // group, dtype=torch.float16)
        zeros_OG = torch.zeros(outputs, inputs // group, dtype=torch.uint8)
        matrix = Int4Groups(numbers=numbers, scales_OG=scales_OG, zeros_OG=zeros_OG, group=group)
    else:
        powers_OG = torch.zeros(outputs, inputs // FLOAT4_GROUP, dtype=torch.uint8)
        matrix = Float4Groups(numbers=numbers, powers_OG=powers_OG)
    weight = QuantisedWeight(
        (outputs, inputs),
        format_name=name,
        parts=(outputs,),
        dtype=_BFLOAT16,
        device=torch.device("cpu"),
        uniform=uniform,
    )
    weight.pack(0, matrix)
    return weight


def _quantised() -> Iterator[Sample]:
    for name, call in (
        (INT4_GROUPS, quantised.linear_int4),
        (FLOAT8_BLOCKS, quantised.linear_float8),
    ):
        weight = _weight(name, 512, 4096)
        for tokens in (1, 512):
            x_TI = torch.zeros(tokens, 4096, dtype=_BFLOAT16)
            yield _sample("gemm.linear", f"{name}, {tokens} tokens", call, x_TI, weight, None)


def _attention() -> Iterator[Sample]:
    k_THD = torch.zeros(4, 8, 128, dtype=_BFLOAT16)
    pool = torch.zeros(_PAGES, 32, 8, 128, dtype=_BFLOAT16)
    slots_T = torch.arange(4)
    yield _sample("kvcache.append", "8 x 128", kvcache.append, k_THD, k_THD, pool, pool, slots_T)
    for pages in (pool, pool.to(torch.float8_e4m3fn)):
        q_TQD, cos_TE = torch.zeros(4, 32, 128, dtype=_BFLOAT16), torch.zeros(4, 64)
        call = partial(
            kvcache.rotate_and_append,
            *(q_TQD, k_THD, k_THD, cos_TE, cos_TE),
            k_PCHD=pages,
            v_PCHD=pages,
            kv_slots_T=slots_T,
        )
        name = f"32 and 8 x 128, {pages.dtype.itemsize} bytes"
        yield Sample(op="kvcache.rotate_and_append", name=name, call=call)
    for dim, heads, window, sinks in ((128, 32, None, False), (64, 64, 128, True)):
        k_PCHD = torch.zeros(_PAGES, 32, 8, dim, dtype=_BFLOAT16)
        sinks_Q = torch.zeros(heads) if sinks else None
        for name, lengths in (("decode", [(100, 1)] * 3), ("prefill", [(100, 90)])):
            rows = _rows(lengths, page_size=32)
            q_TQD = torch.zeros(int(rows.query_starts[-1]), heads, dim, dtype=_BFLOAT16)
            call = partial(
                attention.paged_mha,
                q_TQD,
                k_PCHD,
                k_PCHD,
                rows,
                0.1,
                window=window,
                sinks_Q=sinks_Q,
                soft_cap=30.0 if sinks else None,
            )
            yield Sample(op="attention.paged_mha", name=f"{heads} x {dim}, {name}", call=call)


def _latents() -> Iterator[Sample]:
    slots_T = torch.arange(4)
    latents_TE = torch.zeros(4, 576, dtype=_BFLOAT16)
    for page_size in (32, 64):
        pool = torch.zeros(_PAGES, page_size, 576, dtype=_BFLOAT16)
        for heads, new in ((128, 1), (16, 1), (16, 4)):
            rows = _rows([(100, new)] * 3, page_size=page_size)
            q_TQE = torch.zeros(int(rows.query_starts[-1]), heads, 576, dtype=_BFLOAT16)
            call = partial(latent.paged_mla, q_TQE, pool, rows, 0.1, value_dim=512)
            name = f"{heads} heads, q_len {new}, pages of {page_size}"
            yield Sample(op="attention.paged_mla", name=name, call=call)
    heads = 2
    prompt = partial(
        latent_prompt.prompt_mla,
        torch.zeros(90, heads, 192, dtype=_BFLOAT16),
        torch.zeros(heads, 512, 128, dtype=_BFLOAT16),
        torch.zeros(heads, 128, 512, dtype=_BFLOAT16),
        pool,
        torch.zeros(3, dtype=torch.int32),
        context_len=100,
        scale=0.1,
    )
    yield Sample(op="attention.prompt_mla", name="keys of 192, values of 128", call=prompt)
    yield _sample(
        "kvcache.append_latents", "576", kvcache.append_latents, latents_TE, pool, slots_T
    )


def _experts() -> Iterator[Sample]:
    tokens, features, hidden, held, chosen = 256, 7168, 2048, 32, 8
    route = partial(
        moe.route,
        torch.zeros(tokens, 256, dtype=_BFLOAT16),
        torch.zeros(256),
        chosen,
        scoring="sigmoid",
        normalise=True,
        scale=2.5,
        groups=8,
        groups_kept=4,
    )
    yield Sample(op="moe.route", name="8 of 256 experts", call=route)
    # The matrices' sizes without their memory.
    number = torch.zeros(1, dtype=_BFLOAT16)
    gate_up_E2FM = number.expand(held, 2 * hidden, features)
    down_EMF = number.expand(held, features, hidden)
    for count in (4, tokens):
        experts = partial(
            moe.experts,
            torch.zeros(count, features, dtype=_BFLOAT16),
            gate_up_E2FM,
            down_EMF,
            torch.zeros(count, chosen, dtype=torch.int64),
            torch.zeros(count, chosen),
            first=0,
        )
        yield Sample(op="moe.experts", name=f"{held} experts, {count} tokens", call=experts)
    # Of one expert, since kernels do not know how many there are.
    for name, call in (
        (FLOAT8_BLOCKS, moe.experts_float8),
        (INT4_GROUPS, moe.experts),
        (FLOAT4_GROUPS, moe.experts),
    ):
        gate_up = _weight(name, 2 * hidden, 2880, uniform=True)
        down = _weight(name, 2880, hidden, uniform=True)
        for count in (4, tokens):
            experts = partial(
                call,
                torch.zeros(count, 2880, dtype=_BFLOAT16),
                gate_up,
                down,
                torch.zeros(count, 4, dtype=torch.int64),
                torch.zeros(count, 4),
                first=0,
            )
            yield Sample(op="moe.experts", name=f"{name}, {count} tokens", call=experts)


def _sampling() -> Iterator[Sample]:
    rows, size = 2, 128_256
    logits_SV = torch.zeros(rows, size)
    tokens_S = torch.zeros(rows, dtype=torch.int64)
    ones_S = torch.ones(rows, dtype=torch.float64)
    yield _sample("sampling.argmax", f"{size}", sampling.argmax, logits_SV)
    draw = partial(
        sampling.draw,
        logits_SV,
        ones_S,
        temperatures_S=ones_S,
        top_ks_S=tokens_S,
        top_ps_S=ones_S,
        min_ps_S=ones_S,
    )
    yield Sample(op="sampling.draw", name=f"{size}", call=draw)
    yield _sample("sampling.logprobs", f"{size}, 20", sampling.logprobs, logits_SV, tokens_S, 20)
    bitmask_SW = torch.zeros(rows, -(-size // 32), dtype=torch.int32)
    yield _sample(
        "sampling.apply_bitmask", f"{size}", sampling.apply_bitmask, logits_SV, bitmask_SW
    )
    counts_L = torch.zeros(2, dtype=torch.int32)
    penalise = partial(
        sampling.penalise,
        logits_SV[0],
        tokens_S,
        counts_L,
        repetition=1.1,
        presence=0.1,
        frequency=0.1,
    )
    yield Sample(op="sampling.penalise", name="2 tokens", call=penalise)


def _sample(op: str, name: str, call: Callable[..., object], *args: object) -> Sample:
    return Sample(op=op, name=name, call=partial(call, *args))


def _rows(lengths: list[tuple[int, int]], *, page_size: int) -> PagedRows:
    """Rows of (context, new) tokens, all of them on the same pages."""
    return PagedRows(
        query_starts=np.cumsum([0, *(new for _, new in lengths)], dtype=np.int32),
        context_lens=np.array([context for context, _ in lengths], dtype=np.int32),
        row_slots=np.arange(len(lengths), dtype=np.int32),
        page_table_XP=torch.zeros(len(lengths), _PAGES, dtype=torch.int32),
        kv_slots_T=torch.zeros(sum(new for _, new in lengths), dtype=torch.int64),
        page_size=page_size,
    )
