"""What kernels are measured and tuned on: calls at the sizes of large models, with their bytes and
operations.

Legend: R rows, T tokens, Q query heads, H KV heads, D elements of a head, E elements of a latent,
V those that are its value, P pages, C positions of a page, M model features.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from tokenspeed.kernels import reference
from tokenspeed.kernels.quantised import (
    FLOAT4_GROUP,
    FLOAT4_GROUPS,
    FLOAT8_BLOCKS,
    INT4_GROUPS,
    QUANTISED,
    Float4Groups,
    Float8Blocks,
    Int4Groups,
    QuantisedMatrix,
)
from tokenspeed.kernels.quantised_weight import QuantisedWeight
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.kernels.triton import (
    attention,
    latent,
    latent_prompt,
    moe,
    norm,
    quantised,
    sampling,
)

__all__ = ["Attended", "Call", "Workload", "workloads"]

_LATENT, _VALUE = 576, 512
_QUERY_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128
_MODEL, _HIDDEN, _EXPERTS, _CHOSEN = 7168, 2048, 32, 8
_VOCABULARY = 128_256
_SCALE = 0.07
_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """Operands of an attention, for who computes it in another way.

    Attributes:
        q_TQD: queries, as many of each row.
        pools: K and V [P, C, H, D], or latents [P, C, E] alone.
        rows: on pages that no two of them share.
        scale: of scores.
        value_dim: V, of latents; None of K and V.
    """

    q_TQD: torch.Tensor
    pools: tuple[torch.Tensor, ...]
    rows: PagedRows
    scale: float
    value_dim: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call on operands of its own.

    Attributes:
        run: computes it.
        wanted: what the reference gives for its first row; None where nothing is compared.
        attended: the operands of an attention; None of other ops.
    """

    run: Callable[[], torch.Tensor]
    wanted: Callable[[], torch.Tensor] | None = None
    attended: Attended | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is measured.

    Attributes:
        op: what is called.
        name: its sizes, in words.
        size_bytes: read and written at least.
        operations: of the matrix unit.
        make: a call on a device with operands of a seed.
    """

    op: str
    name: str
    size_bytes: int
    operations: int
    make: Callable[[torch.device, int], Call]


def workloads(*, scale: int = 1) -> Iterator[Workload]:
    """Everything, the most telling first.

    Args:
        scale: what contexts and batches are divided by, to try it out.
    """
    for heads, new in ((16, 1), (16, 4), (128, 1)):
        for batch, context in ((64, 8192), (16, 32_768), (1, 131_072), (64, 131_072)):
            yield _mla(max(1, batch // scale), context // scale, heads, new, page_size=64)
    for batch, context in ((64, 8192), (16, 32_768), (1, 131_072)):
        yield _mha(max(1, batch // scale), context // scale, 1)
    yield _mha(1, 0, 8192 // scale)
    yield _mha(1, 50_000 // scale, 1024 // scale)
    yield _mla(1, 50_000 // scale, 16, 1024 // scale, page_size=64)
    for heads in (16, 128):
        yield _mla_prompt(50_000 // scale, heads, 1024 // scale, page_size=64)
    for tokens in (1, 16, 2048 // scale):
        for name in (FLOAT8_BLOCKS, INT4_GROUPS):
            yield _quantised(max(1, tokens), 4096 // scale, 14_336 // scale, name)
    yield from _experts(scale)
    yield from _rowwise(scale)


def _mla(batch: int, context: int, heads: int, new: int, *, page_size: int) -> Workload:
    positions = context + new
    pairs = batch * sum(context + token + 1 for token in range(new))

    def make(device: torch.device, seed: int) -> Call:
        rows, pages = _rows(batch, context, new, page_size=page_size, device=device)
        generator = torch.Generator(device).manual_seed(seed)
        q_TQE = _normal(batch * new, heads, _LATENT, generator=generator)
        pool_PCE = _normal(pages, page_size, _LATENT, generator=generator)
        first = partial(reference.latent.paged_mla, q_TQE[:new], pool_PCE, _first(rows), _SCALE)
        run = partial(latent.paged_mla, q_TQE, pool_PCE, rows, _SCALE, value_dim=_VALUE)
        attended = Attended(
            q_TQD=q_TQE, pools=(pool_PCE,), rows=rows, scale=_SCALE, value_dim=_VALUE
        )
        return Call(run=run, wanted=partial(first, value_dim=_VALUE), attended=attended)

    return Workload(
        op="attention.paged_mla",
        name=f"{batch} x {context}, {heads} heads, q_len {new}",
        size_bytes=_BYTES * batch * (positions * _LATENT + new * heads * (_LATENT + _VALUE)),
        operations=2 * pairs * heads * (_LATENT + _VALUE),
        make=make,
    )


def _mla_prompt(context: int, heads: int, new: int, *, page_size: int) -> Workload:
    positions = context + new
    pairs = sum(context + token + 1 for token in range(new))
    plain, value, rank, rotated = 128, 128, _VALUE, _LATENT - _VALUE

    def make(device: torch.device, seed: int) -> Call:
        rows, pages = _rows(1, context, new, page_size=page_size, device=device)
        generator = torch.Generator(device).manual_seed(seed)
        operands = (
            _normal(new, heads, plain + rotated, generator=generator),
            _normal(heads, rank, plain, generator=generator) / math.sqrt(rank),
            _normal(heads, value, rank, generator=generator) / math.sqrt(rank),
            _normal(pages, page_size, _LATENT, generator=generator),
            rows.page_table_XP[0],
        )
        run = partial(latent_prompt.prompt_mla, *operands, context_len=context, scale=_SCALE)
        return Call(run=run)

    return Workload(
        op="attention.prompt_mla",
        name=f"1 x {context}, {heads} heads, q_len {new}",
        size_bytes=_BYTES * (positions * _LATENT + new * heads * (plain + rotated + value)),
        operations=2
        * heads
        * (pairs * (plain + rotated + value) + positions * rank * (plain + value)),
        make=make,
    )


def _mha(batch: int, context: int, new: int) -> Workload:
    positions, page_size = context + new, 64
    pairs = batch * sum(context + token + 1 for token in range(new))

    def make(device: torch.device, seed: int) -> Call:
        rows, pages = _rows(batch, context, new, page_size=page_size, device=device)
        generator = torch.Generator(device).manual_seed(seed)
        q_TQD = _normal(batch * new, _QUERY_HEADS, _HEAD_DIM, generator=generator)
        shape = (pages, page_size, _KV_HEADS, _HEAD_DIM)
        k_PCHD, v_PCHD = (_normal(*shape, generator=generator) for _ in range(2))
        # The scores of a long prompt would take more memory than there is.
        short = new <= 8
        wanted = partial(
            reference.attention.paged_mha, q_TQD[:new], k_PCHD, v_PCHD, _first(rows), _SCALE
        )
        return Call(
            run=partial(attention.paged_mha, q_TQD, k_PCHD, v_PCHD, rows, _SCALE),
            wanted=wanted if short else None,
            attended=Attended(q_TQD=q_TQD, pools=(k_PCHD, v_PCHD), rows=rows, scale=_SCALE),
        )

    kv = 2 * positions * _KV_HEADS * _HEAD_DIM
    return Workload(
        op="attention.paged_mha",
        name=f"{batch} x {context}, q_len {new}",
        size_bytes=_BYTES * batch * (kv + 2 * new * _QUERY_HEADS * _HEAD_DIM),
        operations=4 * pairs * _QUERY_HEADS * _HEAD_DIM,
        make=make,
    )


def _packed(
    format_name: str, outputs: int, inputs: int, *, generator: torch.Generator, dtype: torch.dtype
) -> tuple[QuantisedWeight, QuantisedMatrix]:
    """A weight of one part, for a product or for experts, and its numbers as they come."""
    device = generator.device
    group = 128 if inputs % 128 == 0 else inputs
    numbers = torch.empty((outputs, inputs), dtype=torch.uint8, device=device)
    numbers.random_(0, 16, generator=generator)
    matrix: QuantisedMatrix
    if format_name == FLOAT4_GROUPS:
        powers_OG = torch.empty(outputs, inputs // FLOAT4_GROUP, dtype=torch.uint8, device=device)
        matrix = Float4Groups(
            numbers=numbers, powers_OG=powers_OG.random_(118, 124, generator=generator)
        )
    elif format_name == INT4_GROUPS:
        scales = torch.rand(outputs, inputs // group, device=device, generator=generator)
        matrix = Int4Groups(numbers=numbers, scales_OG=scales.to(dtype), zeros_OG=None, group=group)
    else:
        blocks_O = (torch.arange(outputs, device=device) // group).int()
        shape = (-(-outputs // group), inputs // group)
        matrix = Float8Blocks(
            values_OI=numbers.to(torch.float8_e4m3fn),
            scales_BG=torch.rand(shape, device=device, generator=generator),
            blocks_O=blocks_O,
            group=group,
        )
    weight = QuantisedWeight(
        (outputs, inputs),
        format_name=format_name,
        parts=(outputs,),
        dtype=dtype,
        device=device,
        uniform=True,
    )
    weight.pack(0, matrix)
    return weight, matrix


def _quantised(tokens: int, inputs: int, outputs: int, format_name: str) -> Workload:
    int4 = format_name == INT4_GROUPS

    def make(device: torch.device, seed: int) -> Call:
        generator = torch.Generator(device).manual_seed(seed)
        x_TI = _normal(tokens, inputs, generator=generator)
        weight, matrix = _packed(
            format_name, outputs, inputs, generator=generator, dtype=x_TI.dtype
        )
        call = quantised.linear_int4 if int4 else quantised.linear_float8

        def wanted() -> torch.Tensor:
            return x_TI[:1].float() @ matrix.to_float().T

        # Activations beside FP8 are rounded, which these are not.
        return Call(run=partial(call, x_TI, weight, None), wanted=wanted if int4 else None)

    return Workload(
        op="gemm.linear",
        name=f"{tokens} x {inputs} x {outputs}, {format_name}",
        size_bytes=outputs * inputs // (2 if int4 else 1) + _BYTES * tokens * (inputs + outputs),
        operations=2 * tokens * inputs * outputs,
        make=make,
    )


def _experts(scale: int) -> Iterator[Workload]:
    few, many = 16 // min(scale, 8), 2048 // scale
    # Whole groups of MXFP4.
    features, hidden = (
        -(-size // scale // FLOAT4_GROUP) * FLOAT4_GROUP for size in (_MODEL, _HIDDEN)
    )
    for tokens, format_name in (
        *((few, name) for name in ("bfloat16", *QUANTISED)),
        (many, "bfloat16"),
    ):
        yield _some_experts(tokens, features, hidden, format_name)


def _some_experts(tokens: int, features: int, hidden: int, format_name: str) -> Workload:
    def make(device: torch.device, seed: int) -> Call:
        generator = torch.Generator(device).manual_seed(seed)
        x_TM = _normal(tokens, features, generator=generator)

        def matrices(outputs: int, inputs: int) -> torch.Tensor | QuantisedWeight:
            if format_name not in QUANTISED:
                return _normal(_EXPERTS, outputs, inputs, generator=generator)
            rows = _EXPERTS * outputs
            return _packed(format_name, rows, inputs, generator=generator, dtype=x_TM.dtype)[0]

        chosen = torch.rand(tokens, _EXPERTS, device=device, generator=generator)
        experts_TK = chosen.argsort(-1)[:, :_CHOSEN].contiguous()
        weights_TK = torch.rand(tokens, _CHOSEN, device=device, generator=generator)
        both = matrices(2 * hidden, features), matrices(features, hidden)
        call = moe.experts_float8 if format_name == FLOAT8_BLOCKS else moe.experts
        return Call(run=partial(call, x_TM, *both, experts_TK, weights_TK, first=0))

    used = min(_EXPERTS, tokens * _CHOSEN)
    element_size = {FLOAT8_BLOCKS: 1.0, INT4_GROUPS: 0.5, FLOAT4_GROUPS: 0.5}
    in_words = f", {format_name}" if format_name in QUANTISED else ""
    return Workload(
        op="moe.experts",
        name=f"{tokens} tokens, {_CHOSEN} of {_EXPERTS} experts{in_words}",
        size_bytes=int(element_size.get(format_name, _BYTES) * used * 3 * features * hidden),
        operations=2 * tokens * _CHOSEN * 3 * features * hidden,
        make=make,
    )


def _rowwise(scale: int) -> Iterator[Workload]:
    tokens = 2048 // scale

    def normed(device: torch.device, seed: int) -> Call:
        generator = torch.Generator(device).manual_seed(seed)
        x_TM = _normal(tokens, _MODEL, generator=generator)
        weight_M = _normal(_MODEL, generator=generator)
        return Call(run=partial(norm.rms_norm, x_TM, weight_M, 1e-5))

    yield Workload(
        op="norm.rms_norm",
        name=f"{tokens} x {_MODEL}",
        size_bytes=2 * _BYTES * tokens * _MODEL,
        operations=0,
        make=normed,
    )
    rows = max(1, 64 // scale)

    def drawn(device: torch.device, seed: int) -> Call:
        generator = torch.Generator(device).manual_seed(seed)
        logits_SV = torch.randn(rows, _VOCABULARY // scale, device=device, generator=generator)
        ones_S = torch.ones(rows, dtype=torch.float64, device=device)
        draw = partial(
            sampling.draw,
            4 * logits_SV,
            ones_S / 2,
            temperatures_S=ones_S,
            top_ks_S=torch.full((rows,), 50, device=device),
            top_ps_S=0.9 * ones_S,
            min_ps_S=0 * ones_S,
        )
        return Call(run=draw)

    yield Workload(
        op="sampling.draw",
        name=f"{rows} x {_VOCABULARY // scale}, top-k 50, top-p 0.9",
        size_bytes=4 * rows * _VOCABULARY // scale,
        operations=0,
        make=drawn,
    )


def _normal(*shape: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return x.normal_(generator=generator)


def _rows(
    batch: int, context: int, new: int, *, page_size: int, device: torch.device
) -> tuple[PagedRows, int]:
    """Rows of as many tokens each, on pages in random order, and how many pages there are."""
    each = -(-(context + new) // page_size)
    order = np.random.default_rng(0).permutation(batch * each).astype(np.int32)
    rows = PagedRows(
        query_starts=np.arange(0, (batch + 1) * new, new, dtype=np.int32),
        context_lens=np.full(batch, context, dtype=np.int32),
        row_slots=np.arange(batch, dtype=np.int32),
        page_table_XP=torch.from_numpy(order.reshape(batch, each)).to(device),
        kv_slots_T=torch.zeros(batch * new, dtype=torch.int64, device=device),
        page_size=page_size,
    )
    return rows, batch * each


def _first(rows: PagedRows) -> PagedRows:
    """The first of the rows alone."""
    return PagedRows(
        query_starts=rows.query_starts[:2],
        context_lens=rows.context_lens[:1],
        row_slots=rows.row_slots[:1],
        page_table_XP=rows.page_table_XP,
        kv_slots_T=rows.kv_slots_T[: int(rows.query_starts[1])],
        page_size=rows.page_size,
    )
