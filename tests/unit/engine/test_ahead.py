"""Memory that is taken while modules are imported."""

from pathlib import Path
from typing import Any

import psutil
import pytest

from tokenspeed._cpu import WeightMemory
from tokenspeed.core.config import EngineConfig
from tokenspeed.engine import ahead
from tokenspeed.loader import ModelFiles

SIZE_BYTES = 4 << 20


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(SIZE_BYTES))
    return ModelFiles(name="model", kind="gguf", path=path, tokenizer_dir=tmp_path)


def test_memory_is_taken_for_as_much_as_the_file_has(files: ModelFiles) -> None:
    memory = ahead.take_memory(EngineConfig(model="m"), files)
    assert memory is not None
    while memory.taken_size_bytes < SIZE_BYTES:
        pass
    memory.give_back()
    assert memory.taken_size_bytes == 0


def test_memory_that_is_given_back_is_the_system_s_again() -> None:
    size_bytes = 256 << 20
    process = psutil.Process()
    memory = WeightMemory(size_bytes=size_bytes)
    while memory.taken_size_bytes < size_bytes:
        pass
    taken = process.memory_info().rss
    memory.give_back()
    assert taken - process.memory_info().rss > 0.9 * size_bytes


@pytest.mark.parametrize("options", [{"tp": 2}, {"cp": 2}, {"dp": 2}, {"device": "cuda"}])
def test_none_is_taken_where_others_share_it_or_weights_lie_elsewhere(
    options: dict[str, Any], files: ModelFiles
) -> None:
    assert ahead.take_memory(EngineConfig(model="m", **options), files) is None


def test_none_is_taken_for_weights_that_are_not_packed(files: ModelFiles) -> None:
    folder = ModelFiles(name="m", kind="hf", path=files.path, tokenizer_dir=files.tokenizer_dir)
    assert ahead.take_memory(EngineConfig(model="m"), folder) is None


def test_none_is_taken_where_the_weights_may_not_fit(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = SIZE_BYTES + ahead.RESERVE_SIZE_BYTES
    monkeypatch.setattr(ahead, "available_memory_size_bytes", lambda: needed - 1)
    assert ahead.take_memory(EngineConfig(model="m"), files) is None
    monkeypatch.setattr(ahead, "available_memory_size_bytes", lambda: needed)
    assert ahead.take_memory(EngineConfig(model="m"), files) is not None
