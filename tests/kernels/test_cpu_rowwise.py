"""Native norms, activations, rotary positions and argmax: against formulas, and equal to the bit
in any batch, on any number of threads, on any instruction set.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.kernels.test_reference import assert_close, noise
from tokenspeed import _cpu
from tokenspeed.core.errors import KernelError
from tokenspeed.kernels.cpu import CpuRuntime, supported_isas
from tokenspeed.kernels.cpu.activation import silu_and_mul
from tokenspeed.kernels.cpu.norm import add_rms_norm, rms_norm
from tokenspeed.kernels.cpu.rope import angles, rotate
from tokenspeed.kernels.cpu.sampling import argmax

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=supported_isas())
def runtime(request: pytest.FixtureRequest) -> Iterator[CpuRuntime]:
    yield CpuRuntime(threads=2, isa=request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 77, 576, 1000])
def test_norms(features: int, dtype: torch.dtype, runtime: CpuRuntime) -> None:
    x, residual = noise(9, features, dtype=dtype), noise(9, features, dtype=torch.float32, seed=1)
    weight = noise(features, dtype=dtype, seed=2)

    def exact(values: torch.Tensor) -> torch.Tensor:
        wide = values.double()
        mean = wide.square().mean(-1, keepdim=True)
        return wide / torch.sqrt(mean + 1e-5) * weight.double()

    plain = rms_norm(x, weight, 1e-5, runtime=runtime)
    assert plain.dtype == dtype
    assert_close("norm.rms_norm", plain, exact(x), dtype)
    normed, total = add_rms_norm(x, residual, weight, 1e-5, runtime=runtime)
    assert torch.equal(total, (x.double() + residual.double()).float())
    assert_close("norm.add_rms_norm", normed, exact(total), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 77, 1536])
def test_silu_and_mul(features: int, dtype: torch.dtype, runtime: CpuRuntime) -> None:
    x = 8 * noise(5, 2 * features, dtype=dtype)
    x[0, 0], x[1, 0] = 200.0, -200.0
    gate, up = x.double().chunk(2, -1)
    ours = silu_and_mul(x, runtime=runtime)
    assert_close("activation.silu_and_mul", ours, gate / (1 + torch.exp(-gate)) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_mul(dtype: torch.dtype, runtime: CpuRuntime) -> None:
    x = 3 * noise(5, 2 * 77, dtype=dtype)
    gate, up = x.double().chunk(2, -1)
    ours = x.new_empty(5, 77)
    _cpu.gate(runtime, "gelu_tanh", x, ours)
    exact = torch.nn.functional.gelu(gate, approximate="tanh") * up
    assert_close("activation.silu_and_mul", ours, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (11, 18), (12, 64)])
def test_rotate(heads: int, head_dim: int, dtype: torch.dtype, runtime: CpuRuntime) -> None:
    whole = noise(7, heads + 3, head_dim, dtype=dtype)
    x = whole[:, :heads]
    turns = noise(7, head_dim // 2, dtype=torch.float32, seed=1) * 100
    cos, sin = turns.cos(), turns.sin()
    first, second = x.double().chunk(2, -1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())[:, None]
    exact = torch.cat((turned.real, turned.imag), -1)
    assert_close("rope.rotate", rotate(x, cos, sin, runtime=runtime), exact, dtype)


def test_angles(runtime: CpuRuntime) -> None:
    positions = torch.tensor([0, 1, 7, 5000, 131071])
    frequencies = 1.0 / 10000.0 ** (torch.arange(16) / 16)
    products = (positions.float()[:, None] * frequencies).double()
    cos, sin = angles(positions, frequencies, runtime=runtime)
    assert_close("rope.angles", cos, products.cos(), torch.float32)
    assert_close("rope.angles", sin, products.sin(), torch.float32)


def test_argmax_takes_the_first_of_equals_and_no_nan(runtime: CpuRuntime) -> None:
    inf, nan = float("inf"), float("nan")
    logits = noise(8, 5003, dtype=torch.float32)
    logits[0, [17, 3000]] = 9.0
    logits[1, 4999:] = torch.tensor([8.0, nan, 8.5, nan])
    logits[2] = -inf
    logits[3] = nan
    logits[4, 3:5] = torch.tensor([inf, torch.finfo(torch.float32).max])
    logits[5, 5002] = 10.0
    logits[6] = -3.0
    logits[7, :] = nan
    logits[7, 4000] = -inf
    expected = [17, 5001, 0, 0, 3, 5002, 0, 0]
    assert argmax(logits, runtime=runtime).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_same_bits_everywhere(dtype: torch.dtype) -> None:
    x, weight = noise(97, 2 * 331, dtype=dtype), noise(2 * 331, dtype=dtype, seed=1)
    heads = x[:, :640].view(97, 10, 64)
    turns = noise(97, 32, dtype=torch.float32, seed=2)

    def results(runtime: CpuRuntime, rows: slice) -> list[torch.Tensor]:
        return [
            rms_norm(x[rows], weight, 1e-5, runtime=runtime),
            *add_rms_norm(x[rows], 3 * x[rows].float(), weight, 1e-5, runtime=runtime),
            silu_and_mul(x[rows], runtime=runtime),
            rotate(
                heads[rows], turns[rows].contiguous(), turns[rows].contiguous(), runtime=runtime
            ),
        ]

    expected = results(CpuRuntime(threads=1, isa="scalar"), slice(None))
    for isa in supported_isas():
        for threads in (1, 2):
            runtime = CpuRuntime(threads=threads, isa=isa)
            for rows in (slice(None), slice(3, 4), slice(40, 97)):
                for found, whole in zip(results(runtime, rows), expected, strict=True):
                    assert torch.equal(found, whole[rows]), (isa, threads, rows)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda run: rms_norm(torch.ones(2, 8), torch.ones(7), 0.0, runtime=run), "weight"),
        (
            lambda run: add_rms_norm(
                torch.ones(2, 8), torch.ones(3, 8), torch.ones(8), 0.0, runtime=run
            ),
            "residual",
        ),
        (
            lambda run: add_rms_norm(
                torch.ones(2, 8), torch.ones(2, 8).double(), torch.ones(8), 0.0, runtime=run
            ),
            "float32",
        ),
        (lambda run: argmax(torch.ones(2, 8).bfloat16(), runtime=run), "float32"),
        (lambda run: rotate(torch.ones(2, 1, 8), *torch.ones(2, 2, 5), runtime=run), "angles"),
        (lambda run: _cpu.gate(run, "silu", torch.ones(2, 8), torch.ones(2, 5)), "2 x 5"),
    ],
)
def test_operands_that_do_not_fit_are_refused(
    call: Callable[[CpuRuntime], object], words: str
) -> None:
    with pytest.raises(KernelError, match=words):
        call(CpuRuntime(threads=1, isa=None))
