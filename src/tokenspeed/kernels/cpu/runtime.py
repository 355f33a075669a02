"""The threads, the memory and the instruction set that the native kernels of one engine share."""

from dataclasses import dataclass

from tokenspeed._cpu import Runtime as CpuRuntime
from tokenspeed._cpu import Sampler as CpuSampling
from tokenspeed._cpu import StepRecording, WeightMemory, aside, prefer_huge_pages, supported_isas
from tokenspeed.core import environment

__all__ = [
    "CpuRuntime",
    "CpuSampling",
    "Roofline",
    "StepRecording",
    "WeightMemory",
    "aside",
    "prefer_huge_pages",
    "start_runtime",
    "supported_isas",
]

# Far beyond the last cache of any CPU.
_READ_SIZE_BYTES = 512 << 20


def start_runtime(*, threads: int, memory: WeightMemory | None = None) -> CpuRuntime:
    """Start the threads of an engine; they end with the runtime.

    The instruction set is the best this CPU has, or the one that `TOKENSPEED_CPU_ISA` names.

    Args:
        threads: the caller of a kernel is one of them.
        memory: where packed weights go, where some was taken ahead.

    Raises:
        ConfigError: fewer threads than one, or an instruction set that this CPU lacks.
    """
    return CpuRuntime(threads=threads, isa=environment.cpu_isa(), memory=memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The most that a runtime's threads were seen to do together.

    Attributes:
        read_bytes_per_s: reading memory in four streams a thread.
        int8_ops_per_s: products of bytes summed in 32-bit integers; a multiplication and an
            addition are two operations.
        bf16_ops_per_s, f32_ops_per_s: the same of products summed in float32.
    """

    read_bytes_per_s: float
    int8_ops_per_s: float
    bf16_ops_per_s: float
    f32_ops_per_s: float

    @classmethod
    def measure(cls, runtime: CpuRuntime, *, repeats: int = 10) -> "Roofline":
        """Run the microkernels; each figure is the best of `repeats` runs of some milliseconds."""
        int8, bf16, f32 = runtime.measure_peaks(repeats=repeats)
        return cls(
            read_bytes_per_s=runtime.measure_read_bytes_per_s(
                size_bytes=_READ_SIZE_BYTES, repeats=repeats
            ),
            int8_ops_per_s=int8,
            bf16_ops_per_s=bf16,
            f32_ops_per_s=f32,
        )
