"""The thread pool under stress, watched by ThreadSanitizer."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CPU = HERE.parents[1] / "csrc" / "cpu"
COMPILER = shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
def test_every_chunk_runs_once_and_without_races(tmp_path: Path) -> None:
    program = tmp_path / "pool_stress"
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{CPU}"]
    sources = [HERE / "pool_stress.cpp", CPU / "pool.cpp"]
    subprocess.run([COMPILER, *flags, *sources, "-o", program], check=True)
    seed = random.randrange(2**31)
    print(f"seed: {seed}")
    done = subprocess.run([program, "300", str(seed)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "done\n"
