"""Owns the typed face of the native CPU kernels; never computes anything itself."""

from tokenspeed.kernels.cpu.runtime import CpuRuntime, Roofline, start_runtime, supported_isas

__all__ = ["CpuRuntime", "Roofline", "start_runtime", "supported_isas"]
