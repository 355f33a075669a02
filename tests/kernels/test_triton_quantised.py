"""Triton's products with quantised weights, interpreted, against the formats' formulas."""

import pytest
import torch

from tests.kernels.triton_cases import GPU, SEED, drawn_cases, interpreting, verify_interpreted
from tests.support.triton_interpreter import needs_interpreter
from tokenspeed.kernels import KernelSelector, Platform
from tokenspeed.kernels.quantised import FLOAT4_GROUPS, FLOAT8_BLOCKS, INT4_GROUPS, QUANTISED
from tokenspeed.kernels.quantised_weight import QuantisedWeight
from tokenspeed.kernels.triton import quantised
from tokenspeed.kernels.verify.quantised import random_float8, random_int4

pytestmark = needs_interpreter
__all__ = ["interpreting"]

CPU = torch.device("cpu")


@pytest.mark.parametrize("format_name", [FLOAT8_BLOCKS, INT4_GROUPS])
def test_a_product_is_what_the_formula_says(format_name: str) -> None:
    for kernel, case in drawn_cases("gemm.linear", each=4):
        if case.format_name == format_name:
            verify_interpreted(kernel, case)


def test_activations_in_float8_are_rounded_by_groups_and_their_products_are_exact() -> None:
    torch.manual_seed(SEED)
    x_TI = (torch.randn(9, 300) * torch.logspace(-3, 3, 9)[:, None]).bfloat16()
    x_TI[2, 128:256] = 0
    values_TI, scales_TG = quantised.float8_rows(x_TI, 128)
    padded_TGX = torch.nn.functional.pad(x_TI.float(), (0, 84)).unflatten(1, (3, 128))
    most_TG = padded_TGX.abs().amax(-1)
    assert torch.equal(scales_TG, torch.where(most_TG == 0, 1.0, most_TG / 448))
    wanted_TGX = (padded_TGX / scales_TG[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(values_TI.float(), wanted_TGX.float().flatten(1)[:, :300])

    matrix = random_float8(150, 300, seed=SEED % 1000)
    rounded_TI = (wanted_TGX.double() * scales_TG[..., None].double()).flatten(1)[:, :300]
    exact_TO = rounded_TI @ matrix.to_float().double().T
    found_TO = quantised.linear_float8(x_TI.float(), weight_of(FLOAT8_BLOCKS, matrix), None)
    error = (found_TO.double() - exact_TO).norm(dim=1) / exact_TO.norm(dim=1)
    assert error.max() < 2e-6, error


def weight_of(format_name: str, matrix: object) -> QuantisedWeight:
    shape = matrix.shape  # type: ignore[attr-defined]
    weight = QuantisedWeight(
        shape, format_name=format_name, parts=(shape[0],), dtype=torch.float32, device=CPU
    )
    weight.pack(0, matrix)  # type: ignore[arg-type]
    return weight


def test_a_rows_bits_are_the_same_in_any_batch() -> None:
    torch.manual_seed(SEED)
    x_TI = torch.randn(70, 256)
    int4 = weight_of(INT4_GROUPS, random_int4(45, 256, 64, zeros=True))
    float8 = weight_of(FLOAT8_BLOCKS, random_float8(45, 256))
    for call, weight in (
        (quantised.linear_int4_fixed, int4),
        (quantised.linear_float8_fixed, float8),
    ):
        whole_TO = call(x_TI, weight, None)
        for part in (slice(0, 1), slice(64, 70), slice(13, 40)):
            assert torch.equal(call(x_TI[part], weight, None), whole_TO[part])


def test_neighbours_of_one_kind_are_one_launch_and_others_are_not() -> None:
    parts = [random_int4(outputs, 256, 64, zeros=True, seed=outputs) for outputs in (8, 24, 16)]
    other = random_int4(8, 256, 32, zeros=True)
    counts = [matrix.shape[0] for matrix in (*parts, other)]
    weight = QuantisedWeight(
        (sum(counts), 256), format_name=INT4_GROUPS, parts=counts, dtype=torch.float32, device=CPU
    )
    # In no order that they have.
    for index in (2, 0, 3, 1):
        weight.pack(index, (*parts, other)[index])
    above, below = weight.matrices
    assert not isinstance(above, torch.Tensor)
    assert torch.equal(above.to_float(), torch.cat([matrix.to_float() for matrix in parts]))
    assert not isinstance(below, torch.Tensor)
    assert torch.equal(below.to_float(), other.to_float())
    # Half a byte a number, and three bytes a group.
    assert weight.nbytes == 56 * 128 + 48 * 4 * 3 + 8 * 8 * 3


def test_groups_that_no_kernel_reads_are_dense() -> None:
    matrix = random_int4(8, 72, 24, zeros=False)
    weight = weight_of(INT4_GROUPS, matrix)
    (dense,) = weight.matrices
    assert isinstance(dense, torch.Tensor)
    assert torch.equal(dense, matrix.to_float())


@pytest.mark.parametrize("op", ["gemm.linear", "moe.experts"])
def test_a_gpu_reads_quantised_weights_and_one_without_float8_only_those_of_four_bits(
    op: str,
) -> None:
    older = Platform(device="cuda", features=frozenset({"triton"}), arch=(8, 0))
    # Checkpoints of MXFP4 have experts and nothing else.
    four_bits = (INT4_GROUPS,) if op == "gemm.linear" else (INT4_GROUPS, FLOAT4_GROUPS)
    traits = {"bias": True} if op == "gemm.linear" else {}
    for deterministic in (False, True):
        for platform, formats in ((GPU, (FLOAT8_BLOCKS, *four_bits)), (older, four_bits)):
            selector = KernelSelector(
                device=torch.device("cuda"),
                dtype=torch.bfloat16,
                platform=platform,
                deterministic=deterministic,
            )
            for name in QUANTISED:
                explained = selector.explain(op, format_name=name, traits=traits)
                assert (explained.winner is not None) == (name in formats), str(explained)
