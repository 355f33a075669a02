"""Compiling kernels for GPUs that are not here: all of Triton but the launch.

A driver that has a target and no device takes the place of the real one; kernels are called as on
a GPU, with tensors of this machine that are never read.
"""

import importlib.util
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenspeed.core.errors import ConfigError, KernelError

__all__ = ["TARGETS", "Compiled", "compiling"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    backend: str
    arch: int | str
    warp_size: int
    shared_size_bytes: int


TARGETS: Final[Mapping[str, _Target]] = {
    "sm_90": _Target(backend="cuda", arch=90, warp_size=32, shared_size_bytes=232_448),
    "gfx942": _Target(backend="hip", arch="gfx942", warp_size=64, shared_size_bytes=65_536),
}
"""By name: NVIDIA's Hopper (H100, H200) and AMD's CDNA 3 (MI300)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What a kernel takes of its target.

    Attributes:
        name: of the function on the device.
        shared_size_bytes: shared memory of a program.
        threads: of a program.
        registers: of a thread; None where the toolchain does not tell.
        spilled_size_bytes: of a thread's memory, which registers did not hold; None likewise.
        matrix_unit: whether it has instructions for one.
    """

    name: str
    shared_size_bytes: int
    threads: int
    registers: int | None
    spilled_size_bytes: int | None
    matrix_unit: bool


class _Driver:
    """A target without a device: binaries are noted and never loaded, launches do nothing."""

    def __init__(self, target: _Target, index: int) -> None:
        from triton.backends.compiler import GPUTarget  # noqa: PLC0415

        self._target = GPUTarget(target.backend, target.arch, target.warp_size)
        self._shared_size_bytes = target.shared_size_bytes
        # Triton keeps what it compiled by this number, which must tell targets apart.
        self._index = index
        self.utils = self

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._index

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._shared_size_bytes}

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            pass

        return launch

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return name, name, 0, 0, 1024


@contextmanager
def compiling(target: str) -> Iterator[list[Compiled]]:
    """Compile what is launched within, and run nothing; gives what was compiled, in order.

    Args:
        target: one of `TARGETS`.

    Raises:
        ConfigError: no such target, or device code is interpreted in this process.
        KernelError: a kernel takes more than the target has.
    """
    if target not in TARGETS:
        raise ConfigError(f"--target must be one of {', '.join(TARGETS)}, but is {target!r}")
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("Triton is not installed; pip install 'tokenspeed[triton]'")
    from triton import knobs  # noqa: PLC0415
    from triton.runtime import driver  # noqa: PLC0415
    from triton.runtime.errors import OutOfResources  # noqa: PLC0415

    if knobs.runtime.interpret:
        raise ConfigError(
            "TRITON_INTERPRET=1 interprets kernels, so none is compiled here; unset it"
        )
    found: list[Compiled] = []

    def note(module: Any, function: Any, name: str, group: Mapping[str, str], key: str) -> None:
        found.append(_described(name, group))

    before = driver._active
    driver.set_active(_Driver(TARGETS[target], list(TARGETS).index(target)))
    hook = knobs.runtime.kernel_load_end_hook
    knobs.runtime.kernel_load_end_hook = note
    try:
        yield found
    except OutOfResources as error:
        raise KernelError(f"a kernel does not fit {target}: {error}") from error
    finally:
        knobs.runtime.kernel_load_end_hook = hook
        driver._active = before


def _described(name: str, group: Mapping[str, str]) -> Compiled:
    files = {Path(path).suffix: Path(path) for path in group.values()}
    metadata = json.loads(files[".json"].read_text())
    text = files[".ptx"].read_text() if ".ptx" in files else files[".amdgcn"].read_text()
    registers = spilled = None
    if ".cubin" in files:
        registers, spilled = _usage(files[".cubin"])
    elif usage := re.search(r"\.vgpr_count:\s+(\d+)", text):
        registers = int(usage[1])
        spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
        spilled = 4 * int(spills[1]) if spills else None
    return Compiled(
        name=name,
        shared_size_bytes=metadata["shared"],
        threads=metadata["num_warps"] * metadata["target"]["warp_size"],
        registers=registers,
        spilled_size_bytes=spilled,
        matrix_unit=any(word in text for word in ("wgmma", "mma.sync", "v_mfma")),
    )


def _usage(cubin: Path) -> tuple[int | None, int | None]:
    """Registers of a thread, and bytes of its stack."""
    from triton import knobs  # noqa: PLC0415

    with tempfile.NamedTemporaryFile(suffix=".cubin") as copy:
        copy.write(cubin.read_bytes())
        copy.flush()
        done = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", copy.name],
            capture_output=True,
            text=True,
            check=False,
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    return (int(found[1]), int(found[2])) if found else (None, None)
