"""Ranks that share contexts: each has the KV of some positions, and together they give what one
rank gives that has all."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch.distributed import Store

from tests.models.test_ranks import load
from tests.models.test_tiny_models import assert_close, expected, prompt
from tests.models.tiny import Tiny, write_tiny
from tests.support.forward import Driver
from tests.support.ranks import in_threads
from tokenspeed.distributed import Group, Mesh, connect
from tokenspeed.engine.outline import outline
from tokenspeed.kernels import KernelSelector
from tokenspeed.kernels.rows import ContextShare
from tokenspeed.modeling import Model, ModelConfig, compile_model

CPU = torch.device("cpu")
TOKENS = 75


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    return cache(lambda name: write_tiny(name, tmp_path_factory.mktemp(name)))


def driver(model: Model, mesh: Mesh, rank: int) -> Driver:
    """Pages of 16 positions on each rank, so that none has more than some of the tokens."""
    share = ContextShare(index=mesh.index(rank, mesh.cells_of("cp")), ranks=mesh.cp)
    return Driver(model, share=share)


@pytest.mark.parametrize("native", [False, True], ids=["reference", "native"])
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama", Mesh(cp=2)),
        ("llama-bias", Mesh(cp=4)),
        ("qwen3", Mesh(cp=2, tp=2)),
        # Experts are divided over all ranks, and their sums made over `cp` too.
        ("qwen3-moe", Mesh(cp=2)),
        ("qwen3-moe", Mesh(cp=2, tp=2, ep=2)),
        # Windows, of which some ranks have nothing; sinks, which count once.
        ("gemma3", Mesh(cp=4)),
        ("gpt-oss", Mesh(cp=2)),
        # Latents, of which each rank has some positions, whole for all of its heads.
        ("deepseek-v2-lite", Mesh(cp=2)),
        ("deepseek-v2", Mesh(cp=4)),
        ("deepseek-v3", Mesh(cp=2)),
        ("deepseek-v3", Mesh(cp=2, tp=2, ep=4)),
    ],
    ids=str,
)
def test_ranks_that_share_contexts_give_the_logits_of_transformers(
    tiny: Callable[[str], Tiny], name: str, mesh: Mesh, native: bool
) -> None:
    found = tiny(name)
    tokens = prompt(TOKENS, seed=1)

    def run(rank: int, store: Store) -> tuple[torch.Tensor, list[int]]:
        # Once, on every boundary tensors are held against the program, which takes its time.
        model = load(found.path, mesh, rank, store, native=native, check=not native)
        logits = driver(model, mesh, rank).prefill(tokens, chunk=16)
        return logits, driver(model, mesh, rank).greedy(tokens, 6)

    text = Driver(load(found.path, Mesh(), 0, None, native=native)).greedy(tokens, 6)
    results = in_threads(mesh.world, run)
    for logits, ours in results:
        assert_close(logits, expected(found, tokens))
        assert torch.equal(logits, results[0][0])
        assert ours == text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-bias", "deepseek-v3"])
def test_a_tokens_logits_do_not_depend_on_how_its_prompt_was_cut(
    tiny: Callable[[str], Tiny], name: str, dtype: torch.dtype
) -> None:
    path = tiny(name).path
    tokens = prompt(50, seed=2)
    mesh = Mesh(cp=2)

    def run(rank: int, store: Store) -> tuple[torch.Tensor, torch.Tensor]:
        model = load(path, mesh, rank, store, dtype=dtype, native=True)
        return (
            driver(model, mesh, rank).prefill(tokens, chunk=1),
            driver(model, mesh, rank).prefill(tokens, chunk=50),
        )

    for alone, together in in_threads(2, run):
        assert torch.equal(alone, together)


@pytest.mark.parametrize("mesh", [Mesh(cp=2), Mesh(cp=2, tp=2)], ids=str)
def test_a_step_over_latents_exchanges_what_was_planned(
    tiny: Callable[[str], Tiny], mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tiny("deepseek-v3")
    known: dict[int, Mapping[tuple[int, ...], Group]] = {}

    def remembered(mesh: Mesh, rank: int, *cells: Any, **options: Any) -> Any:
        known[rank] = connect(mesh, rank, *cells, **options)
        return known[rank]

    monkeypatch.setattr("tokenspeed.modeling.model.connect", remembered)

    def run(rank: int, store: Store) -> int:
        model = load(found.path, mesh, rank, store)
        driver(model, mesh, rank).prefill(prompt(40, seed=3), chunk=20)
        return sum(group.calls for group in known[rank].values())

    steps = compiled(found, mesh)
    assert sum(kind == "merge" for _, _, kind, _ in steps) == 3
    assert in_threads(mesh.world, run) == [2 * len(steps)] * mesh.world


def compiled(found: Tiny, mesh: Mesh) -> list[tuple[str, str, str, float]]:
    kernels = KernelSelector(device=CPU, dtype=torch.float32)
    config = ModelConfig.from_hf(json.loads((found.path / "config.json").read_text()))
    program = compile_model(config, kernels=kernels, mesh=mesh)
    return [
        (step.path, step.parameter, step.transition.kind, float(step.transition.moved))
        for step in program.steps
    ]


def test_the_compiler_merges_what_ranks_computed_of_a_context_and_nothing_else(
    tiny: Callable[[str], Tiny],
) -> None:
    # Six heads of 16 elements and a logarithm each, in float32; a rank sends all it has.
    assert compiled(tiny("llama"), Mesh(cp=2)) == [
        (f"blocks.{layer}.attention.merge", "parts_TQX", "merge", 6 * 17 * 4.0)
        for layer in range(3)
    ]


def test_a_plan_gives_each_rank_its_part_of_a_contexts_kv(tiny: Callable[[str], Tiny]) -> None:
    path = str(tiny("llama").path)
    whole, shared = outline(path, Mesh()), outline(path, Mesh(cp=2))
    assert 2 * shared.kv_token_size_bytes == whole.kv_token_size_bytes
    assert shared.weights_size_bytes == whole.weights_size_bytes
