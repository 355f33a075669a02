"""Every misuse of a page, a step or a state fails to compile, for the reason it should.

Each file under `misuses/` holds a misuse (`#ifdef MISUSE`) and its twin, which differs in that one
place and compiles; its `// wants:` line is a regular expression for the compiler's complaint.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CONTROL = HERE.parents[1] / "csrc" / "control"
COMPILER = shutil.which("g++")
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-fdiagnostics-plain-output"]
MISUSES = sorted((HERE / "misuses").glob("*.cpp"))

pytestmark = pytest.mark.skipif(
    COMPILER is None, reason="g++ is not installed; the diagnostics matched here are GCC's"
)


def make_prelude(folder: Path) -> Path:
    """What every program starts with, compiled once."""
    header = folder / "prelude.h"
    header.write_text('#include "scheduler.h"\n#include "events.h"\n')
    subprocess.run(
        [COMPILER, *FLAGS, f"-I{CONTROL}", "-x", "c++-header", header, "-o", f"{header}.gch"],
        check=True,
    )
    return header


@pytest.fixture(scope="session")
def prelude(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_prelude(tmp_path_factory.mktemp("prelude"))


def compile_program(program: Path, prelude: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    # Programs use the names of the control plane as its own code does.
    using = "using namespace tokenspeed::control;\n"
    source = f'{using}#line 1 "{program.name}"\n{program.read_text()}'
    command = [COMPILER, *FLAGS, *flags, f"-I{CONTROL}", "-include", prelude]
    return subprocess.run(
        [*command, "-fsyntax-only", "-x", "c++", "-"],
        input=source,
        capture_output=True,
        text=True,
        check=False,
        env={"LC_ALL": "C", "PATH": str(Path(COMPILER or "").parent)},
    )


def complaint_about_misuse(program: Path, prelude: Path) -> str | None:
    """What is wrong with a misuse: that it compiles, or fails for another reason; None if fine."""
    wanted = re.search(r"^// wants: (.+)$", program.read_text(), re.MULTILINE)
    if wanted is None:
        return f"{program.name} does not say which diagnostic it wants"
    done = compile_program(program, prelude, "-DMISUSE")
    if done.returncode == 0:
        return f"{program.name}: the misuse compiles"
    errors = [line for line in done.stderr.splitlines() if " error: " in line]
    return None if any(re.search(wanted[1], error) for error in errors) else done.stderr


def complaint_about_twin(program: Path, prelude: Path) -> str | None:
    """What the compiler has against a misuse's twin; None if nothing."""
    done = compile_program(program, prelude, "-Werror")
    return None if done.returncode == 0 else done.stderr


@pytest.fixture(scope="session")
def complaints(prelude: Path) -> Iterator[dict[tuple[Path, str], Future[str | None]]]:
    """What each program is found to be, by its path and kind; as many compile at once as there are
    CPUs, while tests wait for their own."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            (program, kind): pool.submit(look, program, prelude)
            for kind, look in (("misuse", complaint_about_misuse), ("twin", complaint_about_twin))
            for program in MISUSES
        }


@pytest.mark.parametrize("program", MISUSES, ids=lambda path: path.stem)
def test_the_misuse_is_rejected_for_its_reason(
    program: Path, complaints: dict[tuple[Path, str], Future[str | None]]
) -> None:
    assert complaints[program, "misuse"].result() is None


@pytest.mark.parametrize("program", MISUSES, ids=lambda path: path.stem)
def test_the_twin_of_the_misuse_compiles(
    program: Path, complaints: dict[tuple[Path, str], Future[str | None]]
) -> None:
    assert complaints[program, "twin"].result() is None


def test_there_are_enough_misuses() -> None:
    assert len(MISUSES) >= 25
