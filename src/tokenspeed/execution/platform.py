"""What the forward runs with: an element type and a number of threads."""

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tokenspeed.core.errors import ConfigError
from tokenspeed.kernels import Platform

__all__ = ["give_back_memory", "one_thread", "resolve_dtype", "set_threads", "usable_cpu_count"]

# Instructions that multiply bfloat16; without them float32 is both faster and more exact.
BFLOAT16_FEATURES = frozenset({"avx512_bf16", "amx_bf16"})

_CGROUP = Path("/sys/fs/cgroup")
_BY_NAME = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The element type of weights, activations and KV.

    Args:
        name: "float32", "bfloat16", or "auto": bfloat16 on GPUs and on CPUs that multiply it,
            float32 elsewhere.
        device: where the model will run.

    Raises:
        ConfigError: another name.
    """
    if name == "auto":
        native = device.type != "cpu" or BFLOAT16_FEATURES & Platform.of(device).features
        return torch.bfloat16 if native else torch.float32
    if name not in _BY_NAME:
        raise ConfigError(f"--dtype must be auto, {' or '.join(_BY_NAME)}, but is {name!r}")
    return _BY_NAME[name]


def usable_cpu_count() -> int:
    """How many CPUs this process can keep busy: those it may run on, within its cgroup's quota."""
    # Only Linux tells which CPUs a process is confined to.
    confined = getattr(os, "sched_getaffinity", None)
    count = len(confined(0)) if confined is not None else os.cpu_count() or 1
    quota = _cgroup_cpus(_CGROUP)
    # A quota of 1.5 CPUs is best used by two threads, which the kernel holds back now and then.
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def _cgroup_cpus(cgroup: Path) -> float | None:
    """The CPUs' worth of time that a container may take; None if it is not limited."""
    both = cgroup / "cpu.max"
    if both.is_file():
        quota, period = both.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    # The first version of cgroups.
    quotas = cgroup / "cpu" / "cpu.cfs_quota_us"
    periods = cgroup / "cpu" / "cpu.cfs_period_us"
    if quotas.is_file() and periods.is_file() and (quota_us := int(quotas.read_text())) > 0:
        return quota_us / int(periods.read_text())
    return None


def set_threads(threads: int | None) -> int:
    """Set the CPU threads of the process's forwards, and return their number.

    Args:
        threads: None for one per CPU that the process can keep busy.
    """
    threads = threads or usable_cpu_count()
    torch.set_num_threads(threads)
    return threads


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the CPU work within on the calling thread alone.

    For many short passes, which lose more to waiting for a second thread than it takes off them:
    a third of the time on two idle cores is won, but several times the time is lost on busy ones.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def give_back_memory() -> None:
    """Return to the system what was freed and is kept for later, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
