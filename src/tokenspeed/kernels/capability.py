"""What a device offers, and what a kernel needs of it."""

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Capability", "Platform"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What a device is.

    Attributes:
        device: kind of device, as torch names it: "cpu", "cuda", ...
        features: instruction sets and matrix units, by their kernel-log names on CPUs
            ("avx2", "avx512_vnni", "amx_bf16"); on GPUs the compilers of kernels that are
            installed ("triton").
        arch: the device's compute capability, where its kind has one.
    """

    device: str
    features: frozenset[str] = frozenset()
    arch: tuple[int, int] | None = None

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> "Platform":
        """The platform of a device of this machine."""
        if device.type == "cpu":
            return Platform(device="cpu", features=_cpu_features(Path("/proc/cpuinfo")))
        if device.type == "cuda":
            compilers = {"triton"} if importlib.util.find_spec("triton") else set()
            return Platform(
                device="cuda",
                features=frozenset(compilers),
                arch=torch.cuda.get_device_capability(device),
            )
        return Platform(device=device.type)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """What a kernel needs of a platform. The default needs nothing.

    Attributes:
        device: kind of device; None for any.
        features: all of these must be there.
        arch_min: least compute capability.
    """

    device: str | None = None
    features: frozenset[str] = frozenset()
    arch_min: tuple[int, int] | None = None

    def unmet_by(self, platform: Platform) -> str | None:
        """Why a platform cannot run the kernel; None if it can."""
        if self.device is not None and self.device != platform.device:
            return f"needs device {self.device}, not {platform.device}"
        missing = self.features - platform.features
        if missing:
            return f"needs {', '.join(sorted(missing))}, which the {platform.device} lacks"
        if self.arch_min is not None and (platform.arch is None or platform.arch < self.arch_min):
            return f"needs compute capability {self.arch_min} or above, not {platform.arch}"
        return None


def _cpu_features(cpuinfo: Path) -> frozenset[str]:
    # Systems without this file have no portable list; kernels that need a feature are then
    # not chosen, which is slow but right.
    if not cpuinfo.is_file():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
