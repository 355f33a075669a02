"""Quantised safetensors' matrices in the native formats: the same numbers, or dense ones."""

from dataclasses import replace

import pytest
import torch

from tokenspeed import _cpu
from tokenspeed.core.errors import KernelError
from tokenspeed.kernels import PackedGroups, PackedWeight
from tokenspeed.kernels.cpu import CpuRuntime, start_runtime
from tokenspeed.kernels.cpu.gemm import linear, linear_groups
from tokenspeed.kernels.cpu.groups import exact_blocks
from tokenspeed.kernels.dequantise import dequantise_blocks
from tokenspeed.kernels.quantised import Float4Groups, Int4Groups
from tokenspeed.kernels.verify.quantised import random_float4, random_float8, random_int4

OUTPUTS, INPUTS = 50, 384


@pytest.fixture(scope="module")
def runtime() -> CpuRuntime:
    return start_runtime(threads=1)


def packed(runtime: CpuRuntime, *matrices: Float4Groups | Int4Groups) -> PackedGroups:
    parts = [len(matrix.numbers) for matrix in matrices]
    weight = PackedGroups((sum(parts), INPUTS), parts=parts, dtype=torch.float32, runtime=runtime)
    for part, matrix in enumerate(matrices):
        weight.pack(part, matrix)
    return weight


def rows_of(runtime: CpuRuntime, weight: PackedGroups, inputs: int = INPUTS) -> torch.Tensor:
    """What is held, read output by output."""
    found = []
    for _, matrices in weight.runs:
        for matrix in matrices:
            rows = torch.empty(matrix.outputs, inputs)
            _cpu.lookup(runtime, torch.arange(matrix.outputs), matrix, 1.0, rows)
            found.append(rows)
    return torch.cat(found)


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("group", [32, 64, 128, INPUTS])
def test_packed_groups_are_the_checkpoints_numbers_to_the_bit(
    runtime: CpuRuntime, group: int, zeros: bool
) -> None:
    matrix = random_int4(OUTPUTS, INPUTS, group, zeros=zeros)
    found = exact_blocks(matrix)
    assert found is not None
    name, blocks = found
    assert name == ("Q5_0" if zeros else "Q4_0")
    exact = matrix.to_float()
    assert torch.equal(
        dequantise_blocks(blocks.view(-1, 22 if zeros else 18), name).view_as(exact), exact
    )
    weight = packed(runtime, matrix)
    assert torch.equal(rows_of(runtime, weight), exact)
    # Panels have 16 outputs each.
    assert weight.nbytes == 64 * INPUTS * (22 if zeros else 18) // 32


def test_zeros_that_are_all_in_the_middle_take_no_fifth_bit() -> None:
    matrix = random_int4(OUTPUTS, INPUTS, 64, zeros=False)
    zeros_OG = torch.full(matrix.scales_OG.shape, 8, dtype=torch.uint8)
    found = exact_blocks(replace(matrix, zeros_OG=zeros_OG))
    assert found is not None and found[0] == "Q4_0"


@pytest.mark.parametrize("scale", [1.0 + 2**-12, 1e-9, 1e6])
def test_scales_that_are_no_float16_numbers_leave_a_part_dense(
    runtime: CpuRuntime, scale: float
) -> None:
    plain = random_int4(OUTPUTS, INPUTS, 32, zeros=False)
    odd = replace(plain, scales_OG=plain.scales_OG.float() * scale)
    assert exact_blocks(odd) is None
    weight = packed(runtime, plain, odd, odd)
    assert [rows for rows, _ in weight.runs] == [slice(0, OUTPUTS), slice(OUTPUTS, 3 * OUTPUTS)]
    exact = torch.cat((plain.to_float(), odd.to_float(), odd.to_float()))
    assert torch.equal(rows_of(runtime, weight), exact)


def test_packed_mxfp4_is_the_checkpoints_numbers_to_the_bit(runtime: CpuRuntime) -> None:
    matrix = random_float4(OUTPUTS, INPUTS)
    # The least and the greatest scales that half of has float16, and those of zeros.
    matrix.powers_OG[0, :2] = torch.tensor([104, 143])
    matrix.powers_OG[1, :3] = torch.tensor([0, 90, 200])
    matrix.numbers[1, : 3 * 32] = 0
    matrix.numbers[1, 40:50] = 8
    found = exact_blocks(matrix)
    assert found is not None
    name, blocks = found
    exact = matrix.to_float()
    assert torch.equal(dequantise_blocks(blocks.view(-1, 22), name).view_as(exact), exact)
    weight = packed(runtime, matrix)
    assert torch.equal(rows_of(runtime, weight), exact)
    assert weight.nbytes == 64 * INPUTS * 22 // 32
    assert not weight.dequantised


@pytest.mark.parametrize("power", [103, 144, 0, 254])
def test_mxfp4_whose_scales_no_float16_number_is_half_of_is_dense(
    runtime: CpuRuntime, power: int
) -> None:
    plain, odd = random_float4(OUTPUTS, INPUTS), random_float4(OUTPUTS, INPUTS)
    odd.powers_OG[3, 2] = power
    assert exact_blocks(odd) is None
    weight = packed(runtime, plain, odd)
    assert weight.dequantised == {1}
    assert torch.equal(rows_of(runtime, weight), torch.cat((plain.to_float(), odd.to_float())))
    weight.pack(1, plain)
    assert not weight.dequantised


def test_groups_of_other_sizes_and_fp8_have_no_exact_format() -> None:
    assert exact_blocks(random_int4(OUTPUTS, 48 * 8, 48, zeros=False)) is None
    assert exact_blocks(random_float8(OUTPUTS, INPUTS)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_same_blocks_out_of_a_gguf_file(
    runtime: CpuRuntime, dtype: torch.dtype
) -> None:
    matrices = [random_int4(OUTPUTS, INPUTS, 64, zeros=zeros, seed=3) for zeros in (False, True)]
    whole = PackedWeight(
        (2 * OUTPUTS, INPUTS), parts=(OUTPUTS, OUTPUTS), dtype=dtype, runtime=runtime
    )
    for part, matrix in enumerate(matrices):
        found = exact_blocks(matrix)
        assert found is not None
        whole.pack(part, *found)
    x_TI = torch.randn(9, INPUTS, generator=torch.Generator().manual_seed(4)).to(dtype)
    bias_O = torch.linspace(-1, 1, 2 * OUTPUTS).to(dtype)
    y_TO = linear_groups(x_TI, packed(runtime, *matrices), bias_O, runtime=runtime)
    assert torch.equal(y_TO, linear(x_TI, whole, bias_O, runtime=runtime))


def test_a_weight_with_a_part_missing_says_so(runtime: CpuRuntime) -> None:
    weight = PackedGroups((64, INPUTS), parts=(32, 32), dtype=torch.float32, runtime=runtime)
    weight.pack(1, random_int4(32, INPUTS, 32, zeros=False))
    with pytest.raises(KernelError, match="before all of its parts were loaded"):
        _ = weight.runs
