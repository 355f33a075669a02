"""How fast products with packed weights run here, beside what the machine can do at most.

Legend: T tokens, O outputs, I inputs.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.cpu.runtime import CpuRuntime, Roofline

__all__ = ["GemmFigure", "bench_gemm"]

# ggml's types, with elements and bytes of a block: one for each native format.
_BLOCKS = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q4_K": (256, 144),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "Q8_0": (32, 34),
}
# Outputs and inputs of matrices as models of some 1.5 billion weights have them.
_SHAPES = ((8960, 1536), (1536, 8960))
# Short enough to run undisturbed now and then where other processes want the CPUs too.
_PREFILL_TOKENS, _PREFILL_OUTPUTS = 512, 512
_PREFILL_RUNS_PER_REPEAT = 8
# Decoding reads so much that no cache holds it from one pass to the next.
_READ_SIZE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmFigure:
    """The best of some runs of one product.

    Attributes:
        format: native format of the weights.
        tokens, outputs, inputs: the product's sizes.
        ops_per_s: a multiplication and an addition are two.
        bytes_per_s: of packed weights.
        ops_fraction, bytes_fraction: of the most that the machine did around this run.
    """

    format: str
    tokens: int
    outputs: int
    inputs: int
    ops_per_s: float
    bytes_per_s: float
    ops_fraction: float
    bytes_fraction: float


def bench_gemm(runtime: CpuRuntime, *, repeats: int = 7) -> Iterator[GemmFigure]:
    """Measure decoding of one row and prefill of 512 rows, in every format.

    What the machine can do is measured anew beside each figure: on a shared one it changes.
    """
    for quant_name in _BLOCKS:
        for outputs, inputs in _SHAPES:
            decoded = _matrix(runtime, quant_name, outputs, inputs)
            count = -(-_READ_SIZE_BYTES // decoded.size_bytes)
            more = [_matrix(runtime, quant_name, outputs, inputs) for _ in range(count - 1)]
            yield _measure(runtime, [decoded, *more], tokens=1, runs=repeats, repeats=repeats)
            yield _measure(
                runtime,
                [_matrix(runtime, quant_name, _PREFILL_OUTPUTS, inputs)],
                tokens=_PREFILL_TOKENS,
                runs=repeats * _PREFILL_RUNS_PER_REPEAT,
                repeats=repeats,
            )


def _matrix(runtime: CpuRuntime, quant_name: str, outputs: int, inputs: int) -> _cpu.PackedMatrix:
    block, block_size_bytes = _BLOCKS[quant_name]
    # Any bytes do; these make scales of common size.
    blocks = torch.full((outputs * inputs // block * block_size_bytes,), 0x11, dtype=torch.uint8)
    return _cpu.PackedMatrix.pack(runtime, quant_name, blocks, outputs=outputs, inputs=inputs)


def _measure(
    runtime: CpuRuntime,
    matrices: list[_cpu.PackedMatrix],
    *,
    tokens: int,
    runs: int,
    repeats: int,
) -> GemmFigure:
    outputs, inputs = matrices[0].outputs, matrices[0].inputs
    x_TI = torch.randn(tokens, inputs)
    y_TO = torch.empty(tokens, outputs)

    def run() -> None:
        for matrix in matrices:
            _cpu.linear(runtime, x_TI, [matrix], None, y_TO)

    run()
    took_s = min(_seconds(run) for _ in range(runs))
    most = Roofline.measure(runtime, repeats=repeats)
    ops_per_s = 2 * tokens * outputs * inputs * len(matrices) / took_s
    bytes_per_s = sum(matrix.size_bytes for matrix in matrices) / took_s
    return GemmFigure(
        format=matrices[0].format,
        tokens=tokens,
        outputs=outputs,
        inputs=inputs,
        ops_per_s=ops_per_s,
        bytes_per_s=bytes_per_s,
        ops_fraction=ops_per_s / most.int8_ops_per_s,
        bytes_fraction=bytes_per_s / most.read_bytes_per_s,
    )


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
