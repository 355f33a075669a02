"""Which draft models a model can have beside it."""

from typing import Any

import pytest

from tokenspeed import loader
from tokenspeed.core.config import EngineConfig, KVSpec
from tokenspeed.core.errors import ConfigError, ModelNotFound
from tokenspeed.engine.build import build_engine
from tokenspeed.engine.drafting import groups_within

FULL = KVSpec(layers=2, kv_heads=1, head_dim=8, dtype="float32")
LATENT = KVSpec(layers=2, kv_heads=1, head_dim=8, dtype="float32", latent=True)


def window(tokens: int) -> KVSpec:
    return KVSpec(layers=2, kv_heads=1, head_dim=8, dtype="float32", window=tokens)


@pytest.mark.parametrize(
    ("draft", "target", "groups"),
    [
        ([FULL], [FULL], (0,)),
        ([FULL], [LATENT], (0,)),
        ([FULL, window(4)], [FULL, window(4)], (0, 1)),
        # Pages that hold more than is read are good, too.
        ([window(4)], [FULL], (0,)),
        ([window(4)], [window(6)], (0,)),
        ([FULL, window(8)], [FULL, window(4)], (0, 0)),
    ],
)
def test_a_draft_model_lies_in_pages_that_hold_what_it_reads(
    draft: list[KVSpec], target: list[KVSpec], groups: tuple[int, ...]
) -> None:
    assert groups_within(draft, target, name="d") == groups


@pytest.mark.parametrize(
    ("spec", "reads"), [(FULL, "all positions"), (window(8), "the last 8 positions")]
)
def test_a_draft_model_that_reads_more_than_the_target_keeps_is_refused(
    spec: KVSpec, reads: str
) -> None:
    with pytest.raises(ConfigError, match=f"draft:small reads {reads}, .* the last 4 only"):
        groups_within([spec], [window(4)], name="small")


@pytest.mark.parametrize("speculate", ["draft", "draft:", "model:x", "on"])
def test_a_draft_model_is_named_behind_a_colon(speculate: str) -> None:
    with pytest.raises(ConfigError, match="draft:MODEL"):
        EngineConfig(model="m", speculate=speculate)


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"tp": 2, "ep": 2}])
def test_a_draft_model_needs_one_rank(degrees: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"needs one rank, .* --speculate suffix"):
        EngineConfig(model="m", speculate="draft:small", **degrees)


def test_a_model_may_be_named_with_colons() -> None:
    config = EngineConfig(model="m", speculate="draft:pypi:small")
    assert config.draft_model == "pypi:small"
    assert EngineConfig(model="m").draft_model is None


def test_a_draft_model_of_another_vocabulary_is_refused(
    smollm2: loader.ModelFiles, qwen_coder: loader.ModelFiles
) -> None:
    config = EngineConfig(
        model=str(smollm2.path), speculate=f"draft:{qwen_coder.path}", max_context=64
    )
    with pytest.raises(ConfigError, match=r"another vocabulary than .* the same tokenizer"):
        build_engine(config)


def test_of_two_models_the_one_that_is_not_found_is_told_by_its_flag(
    smollm2: loader.ModelFiles,
) -> None:
    config = EngineConfig(model=str(smollm2.path), speculate="draft:nowhere", max_context=64)
    with pytest.raises(ModelNotFound, match="--speculate draft:nowhere: no model 'nowhere'"):
        build_engine(config)
