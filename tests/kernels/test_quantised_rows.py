"""Rows quantised by the op that computes them: the very bits that a product makes of float32 rows.

Legend: T tokens, M model features, F features of the MLP, O outputs.
"""

from collections.abc import Callable

import pytest
import torch

from tokenspeed import _cpu
from tokenspeed.core.errors import KernelError
from tokenspeed.kernels import (
    PACKED,
    QUANTISED_ROWS,
    KernelSelector,
    PackedWeight,
    QuantisedRows,
    ops,
)
from tokenspeed.kernels.cpu import CpuRuntime, supported_isas
from tokenspeed.kernels.cpu.activation import silu_and_mul, silu_and_mul_quantised
from tokenspeed.kernels.cpu.gemm import linear, logits
from tokenspeed.kernels.cpu.norm import (
    add_rms_norm,
    add_rms_norm_quantised,
    rms_norm,
    rms_norm_quantised,
)
from tokenspeed.kernels.verify.blocks import packed_weight
from tokenspeed.kernels.verify.case import noise

# One step of quantisation and a part of one; every tile of few rows, more than are streamed, many.
FEATURES = 544
ROW_COUNTS = [*range(1, 14), 15, 17, 19, 32, 33, 70]
OUTPUTS = (("Q4_1", 24), ("Q8_0", 16))


def weights(runtime: CpuRuntime) -> PackedWeight:
    return packed_weight(OUTPUTS, FEATURES, dtype=torch.float32, runtime=runtime)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", supported_isas())
def test_quantising_where_rows_are_computed_gives_the_bits_of_float32_rows(
    isa: str, dtype: torch.dtype
) -> None:
    best = CpuRuntime(threads=1, isa=None)
    x, weight = noise(70, 2 * FEATURES, dtype=dtype), noise(FEATURES, dtype=dtype, seed=1)
    half, residual = x[:, :FEATURES].contiguous(), 3 * noise(70, FEATURES, dtype=torch.float32)
    wide, packed = weight.float(), weights(best)

    def products(rows: torch.Tensor) -> torch.Tensor:
        return linear(rows, packed, None, runtime=best).to(dtype)

    normed, stream = add_rms_norm(half, residual, wide, 1e-5, runtime=best)
    expected = (
        products(rms_norm(half, wide, 1e-5, runtime=best)),
        products(normed),
        products(silu_and_mul(x.float(), runtime=best)),
    )
    for threads in (1, 2):
        on = CpuRuntime(threads=threads, isa=isa)
        theirs = weights(on)
        for count in ROW_COUNTS:
            first = len(x) - count
            rows = slice(first, None)
            added, total = add_rms_norm_quantised(
                half[rows], residual[rows], weight, 1e-5, runtime=on
            )
            assert torch.equal(total, stream[rows])
            found = (
                rms_norm_quantised(half[rows], weight, 1e-5, runtime=on),
                added,
                silu_and_mul_quantised(x[rows], runtime=on),
            )
            for ours, whole in zip(found, expected, strict=True):
                assert len(ours) == count
                y = linear(ours, theirs, None, runtime=on)
                assert torch.equal(y, whole[rows]), (threads, count)


def test_gates_of_few_wide_rows_are_cut_into_stretches_of_features() -> None:
    features = 8960
    x = noise(6, 2 * features, dtype=torch.float32)
    best = CpuRuntime(threads=1, isa=None)
    expected = silu_and_mul(x, runtime=best)
    for isa in supported_isas():
        on = CpuRuntime(threads=2, isa=isa)
        weight, _ = packed_weight((("Q4_1", 16),), features, dtype=torch.float32, runtime=on)
        products = linear(expected, weight, None, runtime=on)
        for count in (1, 2, 6):
            assert torch.equal(silu_and_mul(x[:count], runtime=on), expected[:count])
            rows = silu_and_mul_quantised(x[:count], runtime=on)
            assert torch.equal(linear(rows, weight, None, runtime=on), products[:count])


def test_logits_of_quantised_rows_are_float32() -> None:
    on = CpuRuntime(threads=1, isa=None)
    x, weight = noise(3, FEATURES, dtype=torch.float32), noise(FEATURES, dtype=torch.bfloat16)
    rows = rms_norm_quantised(x, weight, 1e-5, runtime=on)
    normed = rms_norm(x, weight.float(), 1e-5, runtime=on)
    found = logits(rows, weights(on), runtime=on)
    assert torch.equal(found, logits(normed, weights(on), runtime=on))


def test_no_rows_are_no_work() -> None:
    on = CpuRuntime(threads=1, isa=None)
    rows = silu_and_mul_quantised(torch.empty(0, 2 * FEATURES), runtime=on)
    assert linear(rows, weights(on), None, runtime=on).shape == (0, 40)
    normed = rms_norm_quantised(torch.empty(0, FEATURES), torch.ones(FEATURES), 1e-5, runtime=on)
    assert logits(normed, weights(on), runtime=on).shape == (0, 40)


def test_room_for_many_rows_is_room_for_fewer() -> None:
    for isa in supported_isas():
        on = CpuRuntime(threads=1, isa=isa)
        sizes = [_cpu.quantised_size_bytes(on, rows, FEATURES) for rows in range(1, 100)]
        assert sizes == sorted(sizes)
        # A row is a byte for each input, and 16 for each 32 of them.
        assert all(size >= rows * FEATURES * 3 // 2 for rows, size in enumerate(sizes, 1))


def dense_product(run: CpuRuntime) -> None:
    weight = PackedWeight((16, 32), parts=(16,), dtype=torch.float32, runtime=run)
    weight.pack_dense(0, torch.ones(16, 32))
    rows = QuantisedRows.empty(2, 32, dtype=torch.float32, runtime=run)
    _cpu.linear(run, rows.memory, weight.matrices, None, torch.empty(2, 16))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda run: silu_and_mul_quantised(torch.ones(2, 80), runtime=run),
            "rows of 40 elements cannot be quantised",
        ),
        (
            lambda run: _cpu.gate(
                run, "silu", torch.ones(2, 64), torch.empty(95, dtype=torch.uint8)
            ),
            "95 bytes, but 2 quantised rows of 32",
        ),
        (
            lambda run: linear(
                QuantisedRows.empty(2, 32, dtype=torch.float32, runtime=run),
                weights(run),
                None,
                runtime=run,
            ),
            "quantised rows of 544 elements take",
        ),
        (dense_product, "a product of quantised x cannot have weights in f32"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[CpuRuntime], object], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        call(CpuRuntime(threads=1, isa=None))


def selector(**given: object) -> KernelSelector:
    options = {"weight_formats": (PACKED,), "activation_formats": (QUANTISED_ROWS,)} | given
    return KernelSelector(device=torch.device("cpu"), dtype=torch.bfloat16, **options)  # type: ignore[arg-type]


def test_what_ops_pass_on_is_what_both_sides_can() -> None:
    norms = (ops.norm.rms_norm, ops.norm.add_rms_norm)

    def passed(kernels: KernelSelector, format_name: str = PACKED) -> str:
        reads = kernels.reads(ops.gemm.linear, format_name=format_name, traits={"bias": True})
        return kernels.result_format(*norms, reads=reads)

    assert passed(selector()) == QUANTISED_ROWS
    # The reader takes tensors only, one producer gives nothing else, or nobody asked for more.
    assert passed(selector(), "bfloat16_panels") == "bfloat16"
    assert passed(selector(), "bfloat16") == "bfloat16"
    assert passed(selector(overrides={"norm.rms_norm": "reference"})) == "bfloat16"
    assert passed(selector(activation_formats=None)) == "bfloat16"
    assert passed(selector().with_tensors_only()) == "bfloat16"
