"""Owns the typed face of the native CPU kernels; never computes anything itself."""

from tokenspeed.kernels.cpu.runtime import (
    CpuRuntime,
    CpuSampling,
    Roofline,
    StepRecording,
    WeightMemory,
    aside,
    prefer_huge_pages,
    start_runtime,
    supported_isas,
)
from tokenspeed.kernels.cpu.weights import PackedWeight

__all__ = [
    "CpuRuntime",
    "CpuSampling",
    "PackedWeight",
    "Roofline",
    "StepRecording",
    "WeightMemory",
    "aside",
    "prefer_huge_pages",
    "start_runtime",
    "supported_isas",
]
