"""Native packed weights: packing keeps values, products are right, and rows never differ by a bit.

Legend: O outputs, I inputs, T tokens.
"""

import pytest
import torch

from tokenspeed._cpu import PackedMatrix, linear, lookup
from tokenspeed.core.errors import KernelError
from tokenspeed.kernels.cpu import CpuRuntime, PackedWeight, supported_isas
from tokenspeed.kernels.verify.blocks import BLOCK_TYPES, dequantised, random_blocks

ISAS = supported_isas()
# Below and above one panel, odd, and more than one block of unpacked inputs.
SHAPES = [(1, 256), (16, 256), (53, 768), (130, 2304)]
# Every tile of few rows, more than are streamed, and many.
ROW_COUNTS = [*range(1, 14), 15, 17, 19, 32, 33, 512]


def runtime(isa: str | None = None, threads: int = 1) -> CpuRuntime:
    return CpuRuntime(threads=threads, isa=isa)


def packed(on: CpuRuntime, name: str, raw: torch.Tensor, inputs: int) -> PackedMatrix:
    return PackedMatrix.pack(on, name, raw, outputs=len(raw), inputs=inputs)


def product(
    on: CpuRuntime,
    x: torch.Tensor,
    parts: list[PackedMatrix],
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    y = torch.full((len(x), sum(part.outputs for part in parts)), torch.nan, dtype=dtype)
    linear(on, x, parts, bias, y)
    return y


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Rows of very different size, as activations are.
    return torch.randn(*shape, generator=generator) * torch.logspace(-3, 3, shape[0])[:, None]


def quantised(x: torch.Tensor) -> torch.Tensor:
    """What the kernels make of x: int8 with one scale for each 32 inputs, in float64."""
    groups = x.float().unflatten(1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True)
    integers = (groups * (127.0 / largest)).nan_to_num(0.0).round()
    return (integers.double() * (largest / 127.0).double()).flatten(1)


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_packing_keeps_every_value_to_the_last_bit(name: str, outputs: int, inputs: int) -> None:
    raw = random_blocks(name, outputs, inputs)
    on = runtime(threads=2)
    table = packed(on, name, raw, inputs)
    ids = torch.arange(outputs).flip(0)
    rows = torch.empty(outputs, inputs)
    lookup(on, ids, table, 1.0, rows)
    assert torch.equal(rows, dequantised(raw, name)[ids])


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_packing_grows_no_format_by_more_than_6_percent(name: str) -> None:
    raw = random_blocks(name, 1536, 1536)
    assert packed(runtime(), name, raw, 1536).size_bytes <= 1.06 * raw.numel()


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 37])
def test_a_product_is_exact_but_for_the_rounding_of_its_inputs(
    name: str, outputs: int, inputs: int, tokens: int
) -> None:
    raw = random_blocks(name, outputs, inputs)
    on = runtime(threads=2)
    x = noise(tokens, inputs)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(1))
    ours = product(on, x, [packed(on, name, raw, inputs)], bias)
    weight = dequantised(raw, name).double()
    exact = quantised(x) @ weight.T + bias.double()
    # Sums in float32: each row against the size of what it sums.
    size = x.double().abs() @ weight.abs().T + bias.double().abs()
    assert ((ours - exact).abs() <= 1e-6 * size).all()
    # Each input is off by at most half of a 127th of the largest of its 32.
    largest = x.double().abs().unflatten(1, (-1, 32)).amax(-1, keepdim=True).expand(-1, -1, 32)
    ideal = x.double() @ weight.T + bias.double()
    off = largest.flatten(1) / 254 @ weight.abs().T
    assert ((ours - ideal).abs() <= off + 1e-6 * size).all()


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_is_the_same_bits_in_any_batch_on_any_threads_and_instruction_set(
    name: str, isa: str
) -> None:
    outputs, inputs = 130, 2304
    raw = random_blocks(name, outputs, inputs)
    x = noise(max(ROW_COUNTS), inputs)
    best = runtime()
    expected = product(best, x, [packed(best, name, raw, inputs)])
    for threads in (1, 2):
        on = runtime(isa, threads)
        weight = packed(on, name, raw, inputs)
        for tokens in ROW_COUNTS:
            first = len(x) - tokens
            assert torch.equal(product(on, x[first:], [weight]), expected[first:]), (
                tokens,
                threads,
            )


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_rows_are_rounded_once(isa: str) -> None:
    raw = random_blocks("Q4_K", 53, 768)
    on = runtime(isa)
    weight = packed(on, "Q4_K", raw, 768)
    bias = torch.randn(53, generator=torch.Generator().manual_seed(1)).bfloat16()
    # Streamed, and in tiles of which some are whole and some are not.
    for tokens in (1, 6, 37):
        x = noise(tokens, 768).bfloat16()
        for added in (bias, None):
            wide_bias = None if added is None else added.float()
            wide = product(on, x.float(), [weight], wide_bias)
            ours = product(on, x, [weight], added, torch.bfloat16)
            assert torch.equal(ours, wide.bfloat16())
            assert torch.equal(product(on, x, [weight], wide_bias), wide)


def test_parts_of_different_formats_lie_side_by_side() -> None:
    on = runtime(threads=2)
    names = ["Q5_0", "Q8_0", "Q6_K"]
    parts = [packed(on, name, random_blocks(name, 40, 512), 512) for name in names]
    bias = torch.randn(120, generator=torch.Generator().manual_seed(1))
    x = noise(9, 512)
    alone = [
        product(on, x, [part], bias[40 * i : 40 * i + 40].clone()) for i, part in enumerate(parts)
    ]
    assert torch.equal(product(on, x, parts, bias), torch.cat(alone, dim=1))


def test_a_weight_of_parts_is_whole_once_all_are_loaded_in_any_order() -> None:
    on = runtime()
    weight = PackedWeight((40, 64), parts=(24, 16), dtype=torch.float32, runtime=on)
    first, second = random_blocks("Q8_0", 24, 64), random_blocks("Q4_1", 16, 64)
    weight.pack(1, "Q4_1", second)
    with pytest.raises(KernelError, match="used before all of its parts were loaded"):
        _ = weight.matrices
    weight.pack(0, "Q4_0", random_blocks("Q4_0", 24, 64))
    # A part that is loaded again takes the place of what was there.
    weight.pack(0, "Q8_0", first)
    assert [matrix.outputs for matrix in weight.matrices] == [24, 16]
    assert weight.nbytes == sum(matrix.size_bytes for matrix in weight.matrices)
    x = noise(3, 64)
    parts = [packed(on, "Q8_0", first, 64), packed(on, "Q4_1", second, 64)]
    assert torch.equal(product(on, x, weight.matrices), product(on, x, parts))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("outputs", [64, 53])
@pytest.mark.parametrize("tokens", [5, 37])
def test_rows_may_lie_apart_and_nothing_is_written_beside_them(
    isa: str, outputs: int, tokens: int
) -> None:
    on = runtime(isa, threads=2)
    weight = packed(on, "Q4_1", random_blocks("Q4_1", outputs, 64), 64)
    x = noise(tokens, 96)[:, :64]
    around = torch.full((tokens + 8, outputs + 40), 7.0)
    y = around[:tokens, :outputs]
    linear(on, x, [weight], None, y)
    assert torch.equal(y, product(on, x.contiguous(), [weight]))
    y.fill_(7.0)
    assert (around == 7.0).all()


def test_rows_of_zeros_and_of_subnormals_give_zeros() -> None:
    on = runtime()
    weight = packed(on, "Q4_1", random_blocks("Q4_1", 20, 64), 64)
    for x in (torch.zeros(2, 64), torch.full((2, 64), 1e-42)):
        assert not product(on, x, [weight]).any()


def test_no_rows_are_no_work() -> None:
    on = runtime()
    weight = packed(on, "Q4_1", random_blocks("Q4_1", 20, 64), 64)
    assert product(on, torch.empty(0, 64), [weight]).shape == (0, 20)


def test_what_does_not_fit_is_refused() -> None:
    on = runtime()
    raw = random_blocks("Q4_1", 20, 64)
    weight = packed(on, "Q4_1", raw, 64)
    x, y = torch.zeros(3, 64), torch.zeros(3, 20)
    with pytest.raises(KernelError, match="IQ9 have no native format"):
        packed(on, "IQ9", raw, 64)
    with pytest.raises(KernelError, match="800 bytes of Q4_1 are no matrix of 20 x 96"):
        packed(on, "Q4_1", raw, 96)
    with pytest.raises(KernelError, match="x has rows of 32 elements, but the weight takes 64"):
        linear(on, x[:, :32], [weight], None, y)
    with pytest.raises(KernelError, match="y is 3 x 19, but x W"):
        linear(on, x, [weight], None, y[:, :19])
    with pytest.raises(KernelError, match="x must be float32 or bfloat16"):
        linear(on, x.half(), [weight], None, y)
    with pytest.raises(KernelError, match="x must be a matrix with contiguous rows"):
        linear(on, torch.zeros(64, 3).T, [weight], None, y)
    with pytest.raises(KernelError, match="bias must be a contiguous vector of 20"):
        linear(on, x, [weight], torch.zeros(19), y)
    with pytest.raises(KernelError, match=r"x must be a torch\.Tensor"):
        linear(on, [[0.0]], [weight], None, y)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="row 20 of a table of 20 rows"):
        lookup(on, torch.tensor([0, 20]), weight, 1.0, torch.zeros(2, 64))
    with pytest.raises(KernelError, match="rows of a table are looked up in float32"):
        lookup(on, torch.tensor([0]), weight, 1.0, torch.zeros(1, 64, dtype=torch.bfloat16))
    with pytest.raises(KernelError, match="ids must be contiguous integers of 8 bytes"):
        lookup(on, torch.tensor([0, 1], dtype=torch.int32), weight, 1.0, torch.zeros(2, 64))
