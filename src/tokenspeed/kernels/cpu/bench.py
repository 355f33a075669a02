"""How fast products with packed weights run here, beside what the machine can do at most.

Legend: T tokens, O outputs, I inputs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.cpu.runtime import CpuRuntime, Roofline

__all__ = ["GEMM_FORMATS", "GemmFigure", "bench_gemm"]

# The type that each native format comes from: ggml's, with elements and bytes of a block, or dense.
_BLOCKS = {
    "w4": ("Q4_0", 32, 18),
    "w4_min": ("Q4_1", 32, 20),
    "w4_nested": ("Q4_K", 256, 144),
    "w5": ("Q5_0", 32, 22),
    "w5_min": ("Q5_1", 32, 24),
    "w5_nested": ("Q5_K", 256, 176),
    "w6_nested": ("Q6_K", 256, 210),
    "w8": ("Q8_0", 32, 34),
}
_DENSE = {"bf16": torch.bfloat16, "f32": torch.float32}
GEMM_FORMATS = (*_BLOCKS, *_DENSE)
# Outputs and inputs of matrices as models of 1.5, 0.5 and 0.135 billion weights have them.
_SHAPES = (
    (8960, 1536),
    (1536, 8960),
    (4864, 896),
    (896, 4864),
    (1152, 896),
    (896, 896),
    (3072, 576),
    (576, 1536),
)
# One user, some users, a prompt.
_TOKENS = (1, 4, 8, 512)
# Of more outputs no prompt is computed: a run must be short enough to be undisturbed now and then.
_PREFILL_OUTPUTS_MAX = 1536
_PREFILL_TOKENS_MIN = 64
_PREFILL_RUNS_PER_REPEAT = 4
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
        ops_fraction: of the most that the machine did around this run: of products of bytes, or of
            the dense format's own.
        bytes_fraction: the same of reading.
    """

    format: str
    tokens: int
    outputs: int
    inputs: int
    ops_per_s: float
    bytes_per_s: float
    ops_fraction: float
    bytes_fraction: float


def bench_gemm(
    runtime: CpuRuntime, *, formats: Sequence[str] = GEMM_FORMATS, repeats: int = 7
) -> Iterator[GemmFigure]:
    """Measure decoding and prefill in each format that can have the shape.

    What the machine can do is measured anew beside each figure: on a shared one it changes.

    Args:
        runtime: where products run.
        formats: some of `GEMM_FORMATS`.
        repeats: the best of so many runs counts; of short ones, of some more.
    """
    for name in formats:
        for outputs, inputs in _SHAPES:
            if name in _BLOCKS and inputs % _BLOCKS[name][1] != 0:
                continue
            matrix = _matrix(runtime, name, outputs, inputs)
            count = -(-_READ_SIZE_BYTES // matrix.size_bytes)
            matrices = [matrix, *(_matrix(runtime, name, outputs, inputs) for _ in range(1, count))]
            for tokens in _TOKENS:
                if tokens < _PREFILL_TOKENS_MIN:
                    yield _measure(runtime, matrices, tokens=tokens, runs=repeats, repeats=repeats)
                elif outputs <= _PREFILL_OUTPUTS_MAX:
                    runs = repeats * _PREFILL_RUNS_PER_REPEAT
                    yield _measure(runtime, [matrix], tokens=tokens, runs=runs, repeats=repeats)


def _matrix(runtime: CpuRuntime, name: str, outputs: int, inputs: int) -> _cpu.PackedMatrix:
    if name in _DENSE:
        return _cpu.PackedMatrix.pack_dense(
            runtime, torch.ones(outputs, inputs, dtype=_DENSE[name])
        )
    quant_name, block, block_size_bytes = _BLOCKS[name]
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
    name = matrices[0].format
    x_TI = torch.randn(tokens, inputs, dtype=_DENSE.get(name, torch.float32))
    y_TO = torch.empty(tokens, outputs)

    def run() -> None:
        for matrix in matrices:
            _cpu.linear(runtime, x_TI, [matrix], None, y_TO)

    run()
    took_s = min(_seconds(run) for _ in range(runs))
    most = Roofline.measure(runtime, repeats=repeats)
    ops_per_s = 2 * tokens * outputs * inputs * len(matrices) / took_s
    bytes_per_s = sum(matrix.size_bytes for matrix in matrices) / took_s
    ops_most_per_s = {"bf16": most.bf16_ops_per_s, "f32": most.f32_ops_per_s}.get(
        name, most.int8_ops_per_s
    )
    return GemmFigure(
        format=name,
        tokens=tokens,
        outputs=outputs,
        inputs=inputs,
        ops_per_s=ops_per_s,
        bytes_per_s=bytes_per_s,
        ops_fraction=ops_per_s / ops_most_per_s,
        bytes_fraction=bytes_per_s / most.read_bytes_per_s,
    )


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
