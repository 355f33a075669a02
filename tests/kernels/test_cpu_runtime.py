"""The instruction set and the threads of the native kernels."""

import itertools

import pytest
import torch

from tokenspeed._cpu import PackedMatrix, linear
from tokenspeed.core.errors import ConfigError
from tokenspeed.kernels.cpu import Roofline, WeightMemory, start_runtime, supported_isas
from tokenspeed.kernels.cpu.bench import bench_gemm

LADDER = ["avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "scalar"]


def test_the_best_supported_instruction_set_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENSPEED_CPU_ISA", raising=False)
    supported = supported_isas()
    assert supported == [name for name in LADDER if name in supported]
    assert supported[-1] == "scalar"
    assert start_runtime(threads=1).isa == supported[0]


@pytest.mark.parametrize("isa", supported_isas())
def test_an_instruction_set_can_be_forced(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSPEED_CPU_ISA", isa)
    runtime = start_runtime(threads=2)
    assert runtime.isa == isa
    assert runtime.threads == 2


def test_an_unknown_instruction_set_is_refused_with_the_choices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOKENSPEED_CPU_ISA", "avx1024")
    with pytest.raises(ConfigError, match=r"TOKENSPEED_CPU_ISA is 'avx1024'.*avx512.*scalar"):
        start_runtime(threads=1)


def test_an_instruction_set_the_cpu_lacks_is_refused_with_those_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = [name for name in LADDER if name not in supported_isas()]
    if not missing:
        pytest.skip("this CPU has every instruction set there is a build for")
    monkeypatch.setenv("TOKENSPEED_CPU_ISA", missing[0])
    with pytest.raises(ConfigError, match=r"this CPU lacks; it has .*scalar"):
        start_runtime(threads=1)


@pytest.mark.parametrize("threads", [-1, 0, 1025])
def test_a_number_of_threads_out_of_range_is_refused(threads: int) -> None:
    with pytest.raises(ConfigError, match="threads must be from 1 to 1024"):
        start_runtime(threads=threads)


def test_weights_are_the_same_in_memory_that_was_taken_ahead() -> None:
    memory = WeightMemory(size_bytes=16 << 20)
    values = torch.randn(1000, 512, generator=torch.Generator().manual_seed(1))
    x_TI = torch.randn(3, 512, generator=torch.Generator().manual_seed(2))
    products = []
    for taken in (memory, None):
        runtime = start_runtime(threads=1, memory=taken)
        y_TO = torch.empty(3, 1000)
        weights = [PackedMatrix.pack_dense(runtime, values) for _ in range(9)]
        # What the weights need stays; there are more of them than memory was taken for.
        memory.give_back()
        for weight in weights:
            y_TO.zero_()
            linear(runtime, x_TI, [weight], None, y_TO)
            products.append(y_TO.clone())
    assert 9 * weights[0].size_bytes > 17 << 20
    assert all(torch.equal(product, products[0]) for product in products)
    assert products[0].count_nonzero() == 3000


def test_the_roofline_is_measured() -> None:
    found = Roofline.measure(start_runtime(threads=1), repeats=1)
    assert found.read_bytes_per_s > 0
    assert found.int8_ops_per_s > found.f32_ops_per_s > 0
    assert found.bf16_ops_per_s > 0


@pytest.mark.parametrize("name", ["w8", "bf16"])
def test_products_are_measured_beside_the_roofline(name: str) -> None:
    found = bench_gemm(start_runtime(threads=1), formats=[name], repeats=1)
    figures = list(itertools.islice(found, 3))
    assert [(figure.format, figure.tokens) for figure in figures] == [
        (name, 1),
        (name, 4),
        (name, 8),
    ]
    for figure in figures:
        assert figure.ops_per_s >= figure.bytes_per_s > 0
        assert figure.ops_fraction > 0
        assert figure.bytes_fraction > 0
