"""What a start of the engine leaves behind, and what it does without."""

import subprocess
import sys

from tokenspeed import loader

SCRIPT = """
import sys
from pathlib import Path
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.environment import let_threads_sleep

let_threads_sleep()
from tokenspeed.engine.build import build_engine

engine = build_engine(EngineConfig(model=sys.argv[1], kv_cache_size_bytes=1 << 28))
print(*sorted({"torch._dynamo", "sympy", "transformers"} & set(sys.modules)))
print(sys.argv[1] in Path("/proc/self/maps").read_text())
"""


def test_a_started_engine_has_no_compiler_loaded_and_no_file_mapped(
    smollm2: loader.ModelFiles,
) -> None:
    """Loading torch's compiler takes longer than loading a model; a mapped file counts as ours."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(smollm2.path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == ["", "False"]
