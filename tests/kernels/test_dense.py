"""Native dense weights: packing keeps values, products are right, and rows never differ by a bit.

Legend: O outputs, I inputs, T tokens.
"""

import pytest
import torch

from tokenspeed._cpu import PackedMatrix, linear, lookup
from tokenspeed.core.errors import KernelError
from tokenspeed.kernels.cpu import CpuRuntime, supported_isas
from tokenspeed.kernels.verify import TOLERANCES

ISAS = supported_isas()
DTYPES = [torch.bfloat16, torch.float32]
# Below and above one panel and one step, odd, and more than the first cache keeps of a panel.
SHAPES = [(1, 1), (16, 32), (53, 77), (130, 2304), (37, 4865)]
# Every tile, two tiles of each kind, and many rows.
ROW_COUNTS = [*range(1, 14), 15, 17, 19, 32, 33, 512]


def runtime(isa: str | None = None, threads: int = 1) -> CpuRuntime:
    return CpuRuntime(threads=threads, isa=isa)


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Rows of very different size, as activations are.
    rows = torch.randn(*shape, generator=generator) * torch.logspace(-3, 3, shape[0])[:, None]
    return rows.to(dtype)


def product(
    on: CpuRuntime,
    x: torch.Tensor,
    parts: list[torch.Tensor],
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    y = torch.full((len(x), sum(map(len, parts))), torch.nan, dtype=dtype)
    linear(on, x, [PackedMatrix.pack_dense(on, part) for part in parts], bias, y)
    return y


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The worst of all rows, since rows differ in size."""
    return float(((ours - exact).norm(dim=1) / exact.norm(dim=1)).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_packing_keeps_every_value(dtype: torch.dtype, outputs: int, inputs: int) -> None:
    on = runtime(threads=2)
    weight = noise(outputs, inputs, dtype=dtype)
    table = PackedMatrix.pack_dense(on, weight)
    ids = torch.arange(outputs).flip(0)
    rows = torch.empty(outputs, inputs)
    lookup(on, ids, table, 1.0, rows)
    assert torch.equal(rows, weight.float()[ids])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 6, 40])
def test_products_are_as_exact_as_float32_sums(
    dtype: torch.dtype, outputs: int, inputs: int, tokens: int
) -> None:
    on = runtime(threads=2)
    x = noise(tokens, inputs, dtype=dtype)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ weight.double().T
    # Sums of one sign: what cancels would be measured against next to nothing.
    size = x.double().abs() @ weight.double().abs().T
    ours = product(on, x, [weight])
    assert ((ours - exact).abs() <= TOLERANCES["gemm.linear"].float32 * size).all()
    positive = product(on, x.abs(), [weight.abs()])
    assert relative_error(positive, size) <= TOLERANCES["gemm.logits"].float32
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(2)).to(dtype)
    rounded = product(on, x.abs(), [weight.abs()], bias.bfloat16(), torch.bfloat16)
    wide = product(on, x.abs(), [weight.abs()], bias.bfloat16().float())
    assert torch.equal(rounded, wide.bfloat16())
    assert relative_error(wide, size + bias.bfloat16().double()) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("outputs", "inputs"), [(53, 77), (130, 1100)])
def test_a_row_is_the_same_bits_in_any_batch_on_any_threads_and_instruction_set(
    dtype: torch.dtype, isa: str, outputs: int, inputs: int
) -> None:
    x = noise(max(ROW_COUNTS), inputs, dtype=dtype)
    values = noise(outputs, inputs, dtype=dtype, seed=1)
    expected = product(runtime(), x, [values])
    for threads in (1, 2):
        on = runtime(isa, threads)
        weight = PackedMatrix.pack_dense(on, values)
        for tokens in ROW_COUNTS:
            first = len(x) - tokens
            y = torch.full((tokens, outputs), torch.nan)
            linear(on, x[first:], [weight], None, y)
            assert torch.equal(y, expected[first:]), (tokens, threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_lie_side_by_side_and_rows_may_lie_apart(dtype: torch.dtype) -> None:
    on = runtime(threads=2)
    parts = [noise(40, 96, dtype=dtype, seed=seed) for seed in range(3)]
    bias = torch.randn(120, generator=torch.Generator().manual_seed(1))
    x = noise(9, 131, dtype=dtype)[:, :96]
    alone = [
        product(on, x.contiguous(), [part], bias[40 * i : 40 * i + 40].clone())
        for i, part in enumerate(parts)
    ]
    assert torch.equal(product(on, x, parts, bias), torch.cat(alone, dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_inputs_behind_the_last_are_zeros_whatever_memory_held(
    dtype: torch.dtype, isa: str
) -> None:
    on = runtime(isa)
    x, weight = noise(5, 50, dtype=dtype), noise(20, 50, dtype=dtype, seed=1)
    expected = product(on, x, [weight])
    spoilt = torch.full((5, 77), torch.nan, dtype=dtype)
    assert product(on, spoilt, [torch.ones(20, 77, dtype=dtype)]).isnan().all()
    assert torch.equal(product(on, x, [weight]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("outputs", [64, 53])
@pytest.mark.parametrize("tokens", [5, 37])
def test_nothing_is_written_beside_the_result(
    dtype: torch.dtype, isa: str, outputs: int, tokens: int
) -> None:
    on = runtime(isa, threads=2)
    x, weight = noise(tokens, 64, dtype=dtype), noise(outputs, 64, dtype=dtype, seed=1)
    around = torch.full((tokens + 8, outputs + 40), 7.0)
    y = around[:tokens, :outputs]
    linear(on, x, [PackedMatrix.pack_dense(on, weight)], None, y)
    assert torch.equal(y, product(on, x, [weight]))
    y.fill_(7.0)
    assert (around == 7.0).all()


def test_what_does_not_fit_is_refused() -> None:
    on = runtime()
    halves = PackedMatrix.pack_dense(on, torch.ones(20, 64, dtype=torch.bfloat16))
    blocks = torch.zeros(20 * 2 * 18, dtype=torch.uint8)
    packed = PackedMatrix.pack(on, "Q4_0", blocks, outputs=20, inputs=64)
    y = torch.zeros(3, 40)
    with pytest.raises(KernelError, match="x in 32 bits cannot have weights in bf16"):
        linear(on, torch.zeros(3, 64), [halves], None, y[:, :20])
    for weight in ([packed, halves], [halves, packed]):
        with pytest.raises(KernelError, match="cannot have weights in"):
            linear(on, torch.zeros(3, 64, dtype=torch.bfloat16), weight, None, y)
    with pytest.raises(KernelError, match="0 x 64 has nothing to pack"):
        PackedMatrix.pack_dense(on, torch.ones(0, 64))
    with pytest.raises(KernelError, match="weight must be float32 or bfloat16"):
        PackedMatrix.pack_dense(on, torch.ones(2, 64, dtype=torch.float16))
