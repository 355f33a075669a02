"""Native norms, activations and rotary positions: equal to the bit in any batch, on any number of
threads, on any instruction set. Against their formulas: `test_verify.py`.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from tokenspeed import _cpu
from tokenspeed.core.errors import KernelError
from tokenspeed.kernels.cpu import CpuRuntime, supported_isas
from tokenspeed.kernels.cpu.activation import silu_and_mul
from tokenspeed.kernels.cpu.norm import add_rms_norm, rms_norm
from tokenspeed.kernels.cpu.rope import angles, rotate
from tokenspeed.kernels.cpu.sampling import argmax
from tokenspeed.kernels.verify import TOLERANCES
from tokenspeed.kernels.verify.case import compare, named, noise

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=supported_isas())
def runtime(request: pytest.FixtureRequest) -> Iterator[CpuRuntime]:
    yield CpuRuntime(threads=2, isa=request.param)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_mul(dtype: torch.dtype, runtime: CpuRuntime) -> None:
    x = 3 * noise(5, 2 * 77, dtype=dtype)
    gate, up = x.double().chunk(2, -1)
    ours = x.new_empty(5, 77)
    _cpu.gate(runtime, "gelu_tanh", x, ours)
    exact = torch.nn.functional.gelu(gate, approximate="tanh") * up
    allowed = getattr(TOLERANCES["activation.silu_and_mul"], named(dtype))
    assert compare("x", ours, exact, dtype).error <= allowed


def test_numbers_are_rounded_to_bfloat16_alike_everywhere(runtime: CpuRuntime) -> None:
    """To the nearest, ties to even; those below the least normal number to zero of their sign."""
    least = torch.finfo(torch.float32).tiny
    edges = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, least, 0.99 * least, 1e-45, 3e38, torch.inf])
    numbers = torch.cat(
        (edges, -edges, 1e3 * noise(17, dtype=torch.float32), edges.new_tensor([torch.nan]))
    )
    # Pairs of a number and 0, turned by nothing.
    x = torch.cat((numbers, torch.zeros_like(numbers)))[None, None]
    turned = torch.empty_like(x, dtype=torch.bfloat16)
    _cpu.rotate(runtime, x, torch.ones(1, 32), torch.zeros(1, 32), turned)
    exact = torch.where(numbers.abs() < least, numbers * 0, numbers).bfloat16()
    found = turned[0, 0, :32]
    assert found[:-1].view(torch.int16).tolist() == exact[:-1].view(torch.int16).tolist()
    assert found[-1].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_same_bits_everywhere(dtype: torch.dtype) -> None:
    x, weight = noise(97, 2 * 331, dtype=dtype), noise(2 * 331, dtype=dtype, seed=1)
    heads = x[:, :640].view(97, 10, 64)
    turns = noise(97, 32, dtype=torch.float32, seed=2)
    positions, frequencies = torch.arange(97) * 1009, torch.logspace(0, -4, 32)

    def results(runtime: CpuRuntime, rows: slice) -> list[torch.Tensor]:
        return [
            rms_norm(x[rows], weight, 1e-5, runtime=runtime),
            *add_rms_norm(x[rows], 3 * x[rows].float(), weight, 1e-5, runtime=runtime),
            silu_and_mul(x[rows], runtime=runtime),
            *angles(positions[rows], frequencies, runtime=runtime),
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
