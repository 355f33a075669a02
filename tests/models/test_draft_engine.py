"""Engines with draft models: what they find beside a model, and that it changes no token."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.models.test_draft_heads import with_eagle3, with_next_token
from tests.models.tiny import read_tensors
from tokenspeed import SamplingParams, loader
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.errors import UnsupportedModel
from tokenspeed.engine.build import build_engine
from tokenspeed.engine.core import Engine
from tokenspeed.engine.wire import Submit

PROMPTS = ([40, 30, 50, 77, 6], [90, 12, 13], [*range(45, 95)])
OUTPUT = 24


@pytest.fixture
def folder(tmp_path: Path, smollm2: loader.ModelFiles) -> Path:
    """Where a checkpoint goes; its tokenizer knows more tokens than the model."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2.tokenizer_dir / name, tmp_path / name)
    return tmp_path


def engine_of(folder: Path, speculate: str, **options: int) -> Engine:
    return build_engine(
        EngineConfig(
            model=str(folder),
            dtype="float32",
            max_context=128,
            max_running=4,
            kv_cache_size_bytes=1 << 22,
            threads=1,
            speculate=speculate,
            **options,
        )
    )


def answers(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[list[int]]:
    """What each prompt goes on with, all of them at once; ends the engine."""
    found: list[list[int]] = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        tokens = np.array(prompt, dtype=np.int32).tobytes()
        engine.core.submit(Submit(number, tokens, params, OUTPUT, number, 0, 0, None))
    while not engine.core.idle:
        if (outputs := engine.core.step()) is not None:
            requests = np.frombuffer(outputs.requests, dtype=np.int64).tolist()
            tokens = np.frombuffer(outputs.tokens, dtype=np.int32).tolist()
            for request, token in zip(requests, tokens, strict=True):
                found[request].append(token)
    engine.core.close()
    return found


@pytest.mark.parametrize("overlap_depth", [0, 1])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_next_token_layer_of_a_checkpoint_drafts_by_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch, temperature: float, overlap_depth: int
) -> None:
    with_next_token("deepseek-v3", folder, monkeypatch, save=True)
    params = SamplingParams(temperature=temperature, ignore_eos=True)
    wanted = answers(engine_of(folder, "off"), PROMPTS, params)
    engine = engine_of(folder, "auto", overlap_depth=overlap_depth)
    alone = engine_of(folder, "suffix")
    alone.core.close()
    assert engine.info.weights_size_bytes > alone.info.weights_size_bytes
    assert answers(engine, PROMPTS, params) == wanted


def test_a_checkpoint_without_the_layer_that_it_speaks_of_is_served_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = with_next_token("glm4-moe", folder, monkeypatch)[0]
    hf_config = json.loads((folder / "config.json").read_text())
    hf_config |= {"num_hidden_layers": target.config.layers, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(hf_config))
    assert f"model.layers.{target.config.layers}.eh_proj.weight" not in read_tensors(folder)
    engine = engine_of(folder, "auto")
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    assert min(map(len, answers(engine, PROMPTS, params))) == OUTPUT


def test_an_eagle3_head_is_given_as_a_draft_model(folder: Path) -> None:
    with_eagle3(folder)
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    wanted = answers(engine_of(folder, "off"), PROMPTS, params)
    engine = engine_of(folder, f"draft:{folder / 'head'}")
    assert answers(engine, PROMPTS, params) == wanted
    with pytest.raises(UnsupportedModel, match="--speculate draft:PATH"):
        engine_of(folder / "head", "off")
