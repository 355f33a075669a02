"""`tokenspeed plan` says what ranks exchange and hold, from a configuration alone."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.models.published import PUBLISHED
from tests.models.test_compiler import QWEN3_MOE
from tokenspeed.cli.main import app

# Parameters without networks that predict further tokens, and bytes of KV a token on one of four
# ranks: latents, which each of them keeps, or K and V of its heads.
SIZES = {
    "DeepSeek-V3": (671.03e9, 61 * (512 + 64) * 2),
    "Kimi-K2": (1026.4e9, 61 * (512 + 64) * 2),
    "gpt-oss-120b": (116.83e9, 36 * 2 * 2 * 64 * 2),
    "Qwen3-235B-A22B": (235.09e9, 94 * 2 * 128 * 2),
}
# Parameters that stay packed on a CPU, in five bits and a scale for each 32.
PACKED = {"gpt-oss-120b": 36 * 128 * 3 * 2880 * 2880}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # A quantised checkpoint's configuration, of which no weights are at hand.
    scheme = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {**QWEN3_MOE, "quantization_config": scheme}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_a_plan_has_steps_bytes_and_sizes(folder: Path) -> None:
    done = plan(folder, "--tp", 4, "--ep", 2, "--dtype", "bfloat16", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert (found["tp"], found["ep"], found["ranks"], found["collectives"]) == (4, 2, 4, 6)
    assert [(step["before"], step["kind"], step["count"]) for step in found["steps"]] == [
        ("blocks.*.attention_norm", "all_reduce", 1),
        ("blocks.*.mlp_norm", "all_reduce", 2),
        ("blocks.*.attention_norm", "all_reduce", 1),
        ("norm", "all_reduce", 1),
        ("the model", "all_gather", 1),
    ]
    # Three quarters of 32 features twice: float32 of the embedding, then bfloat16 three times.
    assert found["token_size_bytes"] == 2 * 0.75 * 32 * (4 + 3 * 2)
    assert sum(step["token_size_bytes"] for step in found["steps"]) == found["token_size_bytes"]
    # Two layers of K and V, of one head of two, which two ranks share.
    assert found["kv_token_size_bytes"] == 2 * 2 * 8 * 2
    alone = json.loads(plan(folder, "--dtype", "bfloat16", "--json").output)
    assert alone["collectives"] == 0 and alone["steps"] == []
    assert 0.25 < found["weights_size_bytes"] / alone["weights_size_bytes"] < 0.4


def test_a_plan_says_whether_memory_is_enough(folder: Path) -> None:
    assert "fits in 1.0 GiB, with KV for" in plan(folder, "--tp", 2, "--memory", "1GiB").output
    assert "the weights alone take more" in plan(folder, "--memory", "256MiB").output
    # Beside the reserve of 256 MiB, 78 KiB of weights and 16 KiB of KV for 128 tokens.
    assert "there is KV for" in plan(folder, "--memory", "262230KiB").output


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("ep", [1, 4])
def test_large_models_are_planned_from_what_their_makers_publish(
    tmp_path: Path, name: str, ep: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    done = plan(tmp_path, "--tp", 4, "--ep", ep, "--dtype", "bfloat16", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    parameters, kv_token_size_bytes = SIZES[name]
    # What is not divided (norms, routers, projections to latents) counts on each of four ranks,
    # and 6% are room for packing; one of four has 23 of the 90 groups of inputs of gpt-oss.
    packed = PACKED.get(name, 0)
    wanted = 2 * (parameters - packed) + packed * 22 / 32
    assert 1.0 < found["weights_size_bytes"] * 4 / (wanted * 1.06) < 1.03
    assert found["weights"] == ("MXFP4" if packed else "bfloat16")
    assert found["kv_token_size_bytes"] == kv_token_size_bytes


def test_a_plan_that_cannot_be_is_an_error(folder: Path) -> None:
    done = plan(folder, "--tp", 3)
    assert done.exit_code == 1
    assert "3 ranks cannot divide outputs of a weight" in done.output
    assert "no file" in plan(folder / "config2.json").output
    assert "--memory 'much' is no size" in plan(folder, "--memory", "much").output
