"""Builds the drivers with the compiler alone; objects are kept by the content they come from."""

import hashlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DRIVERS", "Build", "BuildError", "find_compiler"]

ROOT = Path(__file__).parents[2]
CONTROL = ROOT / "csrc" / "control"
HERE = Path(__file__).parent
CACHE = ROOT / "build" / "proof"

_WORLD = ("device.cpp", "storage.cpp", "world.cpp", "last_words.cpp")
# Each program's sources here; every one also has the whole control plane.
DRIVERS = {
    "explore": (*_WORLD, "configurations.cpp", "explorer.cpp", "explore.cpp", "witness.cpp"),
    "random_runs": (*_WORLD, "random_runs.cpp"),
    "faults": (*_WORLD, "configurations.cpp", "faults.cpp"),
    "fuzz_replay": ("fuzz.cpp", "fuzz_replay.cpp", "last_words.cpp"),
    "fuzz": ("fuzz.cpp",),
}
_FLAGS = (
    "-std=c++20",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Werror",
    # What a sown bug leaves unused is no catch: the warning comes of how it was sown.
    "-Wno-unused-parameter",
    "-Wno-unused-variable",
    "-D_GLIBCXX_ASSERTIONS",
)


class BuildError(Exception):
    """A unit did not compile or a program did not link; says what the compiler said."""


def find_compiler(*wanted: str) -> str:
    """The first of the compilers that is installed; `BuildError` if none is."""
    for name in wanted:
        found = shutil.which(name)
        if found is not None:
            return found
    raise BuildError(
        f"no C++20 compiler: wanted one of {', '.join(wanted)} in PATH; install g++ "
        "(Debian: apt install g++) or name another one in CXX"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """One set of flags over one copy of the control plane.

    Attributes:
        flags: beside the standard ones: optimisation, sanitizers.
        control: the folder of the control plane's sources, perhaps a mutated copy.
        compiler: its path.
    """

    flags: tuple[str, ...]
    control: Path = CONTROL
    compiler: str

    def program(self, name: str, each: Callable[..., Iterable[Path]] = map) -> Path:
        """Builds a driver and returns its path; `each` is `map` or an executor's."""
        control = sorted(self.control.glob("*.cpp"))
        objects = list(each(self._object, [*control, *(HERE / unit for unit in DRIVERS[name])]))
        key = hashlib.sha256("\n".join(map(str, (*objects, *self.flags))).encode()).hexdigest()
        target = CACHE / "bin" / f"{name}-{key[:20]}"
        if not target.exists():
            self._run(target, *map(str, objects))
        return target

    def _object(self, source: Path) -> Path:
        digest = hashlib.sha256("\n".join((self.compiler, *_FLAGS, *self.flags)).encode())
        for file in sorted(self._read_by(source), key=lambda path: path.name):
            digest.update(f"\n{file.name}\n".encode() + file.read_bytes())
        target = CACHE / "obj" / f"{source.stem}-{digest.hexdigest()[:20]}.o"
        if not target.exists():
            flags = [flag for flag in self.flags if flag != "-fsanitize=fuzzer"]
            if len(flags) < len(self.flags):
                flags.append("-fsanitize=fuzzer-no-link")
            self._run(target, *flags, f"-I{self.control}", "-c", str(source))
        return target

    def _read_by(self, source: Path) -> set[Path]:
        """The source and every header of ours that it includes, however deep."""
        found: set[Path] = set()
        ahead = [source]
        while ahead:
            file = ahead.pop()
            if file in found:
                continue
            found.add(file)
            for name in re.findall(r'^#include "([^"]+)"', file.read_text(), re.MULTILINE):
                folders = (file.parent, self.control)
                ahead += [folder / name for folder in folders if (folder / name).exists()][:1]
        return found

    def _run(self, target: Path, *arguments: str) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written beside its place and moved there, so that a broken build leaves no half object.
        half = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}.half")
        flags = self.flags if "-c" not in arguments else ()
        command = [self.compiler, *_FLAGS, *flags, *arguments, "-o", str(half)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            half.unlink(missing_ok=True)
            raise BuildError(done.stderr)
        half.rename(target)


def build_all(build: Build, *names: str, threads: int = 2) -> list[Path]:
    """Builds several drivers, units side by side."""
    with ThreadPoolExecutor(threads) as pool:
        return [build.program(name, pool.map) for name in names]
