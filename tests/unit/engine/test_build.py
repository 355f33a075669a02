"""What a start of the engine leaves behind, and what it does without."""

import subprocess
import sys

import pytest
import torch

from tokenspeed import loader
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.errors import ConfigError
from tokenspeed.engine import build
from tokenspeed.engine.build import build_engine
from tokenspeed.kernels.cpu import WeightMemory

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


def test_a_started_engine_gives_back_the_memory_that_its_weights_did_not_need(
    smollm2: loader.ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[None] = []
    monkeypatch.setattr(build, "give_back_memory", lambda: freed.append(None))
    size_bytes = smollm2.path.stat().st_size
    memory = WeightMemory(size_bytes=2 * size_bytes)
    while memory.taken_size_bytes < 2 * size_bytes:
        pass
    config = EngineConfig(model=str(smollm2.path), max_context=64, kv_cache_size_bytes=1 << 26)
    engine = build_engine(config, memory=memory, learn=False)
    assert 0 < memory.taken_size_bytes < 1.2 * size_bytes
    assert freed
    engine.core.close()


def test_a_gpu_that_is_not_there_is_told_before_anything_is_loaded(
    smollm2: loader.ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = EngineConfig(model=str(smollm2.path), device="cuda", max_context=64)
    with pytest.raises(
        ConfigError, match=r"--device cuda needs 1 GPU here, .* finds 0: .*cpu, .*driver$"
    ):
        build_engine(config)
