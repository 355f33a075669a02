"""`tokenspeed env`: what a report of a problem should say about the machine."""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import typer

from tokenspeed import __version__
from tokenspeed.core.environment import cache_dir

__all__ = ["env"]

_PACKAGES = (
    "torch",
    "numpy",
    "smg",
    "smg-grpc-proto",
    "grpcio",
    "pyzmq",
    "msgspec",
    "tokenizers",
    "safetensors",
    "uvloop",
)
# Instruction sets that kernels may choose by.
_CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "neon",
    "asimd",
    "i8mm",
    "bf16",
    "sve",
)


def env() -> None:
    """Print versions, CPU, memory, devices and folders."""
    rows = [
        ("tokenspeed", __version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform()),
        *((name, _version(name)) for name in _PACKAGES),
        *_cpu(),
        ("memory", _memory()),
        ("devices", _devices()),
        ("cache", str(cache_dir())),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> list[tuple[str, str]]:
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        ("cpu", fields.get("model name", platform.processor() or "unknown")),
        ("cpu flags", " ".join(flag for flag in _CPU_FLAGS if flag in flags) or "none known"),
        ("cores", f"{usable} usable of {os.cpu_count()}"),
    ]


def _memory() -> str:
    path = Path("/proc/meminfo")
    if not path.is_file():
        return "unknown"
    sizes = {
        key: int(value.split()[0])
        for key, _, value in (line.partition(":") for line in path.read_text().splitlines())
        if key in ("MemTotal", "MemAvailable")
    }
    gib = 2**20
    return f"{sizes['MemAvailable'] / gib:.1f} GiB available of {sizes['MemTotal'] / gib:.1f} GiB"


def _devices() -> str:
    # Imported late: it takes seconds, and no other line needs it.
    import torch  # noqa: PLC0415

    found = ["cpu"]
    if torch.cuda.is_available():
        found += [
            f"cuda:{index} {torch.cuda.get_device_name(index)}"
            for index in range(torch.cuda.device_count())
        ]
    return ", ".join(found)
