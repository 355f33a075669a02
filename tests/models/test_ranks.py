"""Several ranks give what one rank gives, over real Gloo, each holding its share of the weights."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import Store

from tests.models.test_tiny_models import assert_close, expected, prompt
from tests.models.tiny import Tiny, write_tiny
from tests.support.forward import Driver
from tests.support.ranks import in_processes, in_threads
from tokenspeed import loader
from tokenspeed.core.errors import ConfigError, PlacementError
from tokenspeed.distributed import Mesh
from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling import Model, ModelConfig, build_model, compile_model

CPU = torch.device("cpu")
TOKENS = 40


def load(
    path: Path,
    mesh: Mesh,
    rank: int,
    store: Store | None,
    *,
    dtype: torch.dtype = torch.float32,
    native: bool = False,
    check: bool = False,
) -> Model:
    checkpoint = loader.open_checkpoint(loader.resolve(str(path)))
    name = str(dtype).removeprefix("torch.")
    kernels = KernelSelector(
        device=CPU,
        dtype=dtype,
        weight_formats=(f"{name}_panels",) if native else None,
        kv_formats=(f"interleaved_{name}",) if native else None,
    )
    model = build_model(
        ModelConfig.from_hf(checkpoint.hf_config),
        dtype=dtype,
        device=CPU,
        kernels=kernels,
        mesh=mesh,
        rank=rank,
        store=store,
        check=check,
    )
    model.load_weights(checkpoint.blocks())
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    return cache(lambda name: write_tiny(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama", Mesh(tp=2)),
        ("llama-bias", Mesh(tp=2)),
        ("llama-tied", Mesh(tp=2)),
        # Six heads: two ranks have two and two have one.
        ("llama-mha", Mesh(tp=4)),
        # One KV head, which all ranks hold.
        ("qwen2", Mesh(tp=2)),
        ("qwen2", Mesh(tp=4)),
        ("qwen3", Mesh(tp=2)),
        # Experts divided inside, whole experts on each rank, and two ranks to each of two halves.
        ("qwen3-moe", Mesh(tp=2)),
        ("qwen3-moe", Mesh(tp=2, ep=2)),
        ("qwen3-moe", Mesh(tp=4, ep=2)),
        ("qwen3-moe", Mesh(tp=4, ep=4)),
        ("glm4-moe", Mesh(tp=2, ep=2)),
        ("gemma3", Mesh(tp=2)),
        # Windows and sinks; a bias inside experts that is added once.
        ("gpt-oss", Mesh(tp=2)),
        ("gpt-oss", Mesh(tp=4)),
        ("gpt-oss", Mesh(tp=2, ep=2)),
        ("gpt-oss", Mesh(tp=4, ep=2)),
        # Latents are the same on all ranks, heads and experts divided.
        ("deepseek-v2-lite", Mesh(tp=2)),
        ("deepseek-v2", Mesh(tp=2, ep=2)),
        ("deepseek-v3", Mesh(tp=2)),
        ("deepseek-v3", Mesh(tp=4)),
        ("deepseek-v3", Mesh(tp=2, ep=2)),
        ("deepseek-v3", Mesh(tp=4, ep=2)),
        ("deepseek-v3", Mesh(tp=4, ep=4)),
    ],
    ids=str,
)
def test_logits_of_several_ranks_equal_those_of_transformers(
    tiny: Callable[[str], Tiny], name: str, mesh: Mesh
) -> None:
    found = tiny(name)
    tokens = prompt(TOKENS, seed=1)

    def run(rank: int, store: Store) -> tuple[torch.Tensor, list[int], int]:
        model = load(found.path, mesh, rank, store)
        logits = Driver(model).prefill(tokens, chunk=16)
        return logits, Driver(model).greedy(tokens, 6), model.weights_size_bytes

    whole = load(found.path, Mesh(), 0, None)
    text = Driver(whole).greedy(tokens, 6)
    results = in_threads(mesh.world, run)
    for logits, ours, _ in results:
        assert_close(logits, expected(found, tokens))
        assert torch.equal(logits, results[0][0])
        assert ours == text
    # Six experts over four ranks are two on some of them; latents' projections are not divided.
    largest = max(size for _, _, size in results)
    assert largest < 1.5 * whole.weights_size_bytes / mesh.world


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_logits_do_not_depend_on_what_else_the_ranks_compute(
    tiny: Callable[[str], Tiny], dtype: torch.dtype
) -> None:
    path = tiny("llama-bias").path
    tokens = prompt(33, seed=2)

    def run(rank: int, store: Store) -> tuple[torch.Tensor, torch.Tensor]:
        model = load(path, Mesh(tp=2), rank, store, dtype=dtype, native=True)
        driver = Driver(model)
        alone = driver.prefill(tokens, chunk=1)
        return alone, driver.prefill(tokens, chunk=33)

    for alone, together in in_threads(2, run):
        assert torch.equal(alone, together)


def greedy(rank: int, store: Store, path: str, degrees: dict[str, int], tokens: list[int]) -> Any:
    model = load(Path(path), Mesh(**degrees), rank, store)
    return Driver(model).greedy(tokens, 12)


def test_processes_of_their_own_give_the_greedy_text_of_one_rank(
    tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    path = tiny("llama-tied").path
    tokens = prompt(20, seed=6)
    alone = Driver(load(path, Mesh(), 0, None)).greedy(tokens, 12)
    assert in_processes(2, tmp_path, greedy, str(path), {"tp": 2}, tokens) == [alone, alone]


def test_only_a_ranks_share_of_a_file_is_read(tiny: Callable[[str], Tiny]) -> None:
    asked: dict[str, tuple[int, ...]] = {}

    class Watched:
        def __init__(self, name: str, stored: Any) -> None:
            self.name, self.stored = name, stored
            self.shape = stored.shape

        def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
            value: torch.Tensor = self.stored[index]
            asked[self.name] = tuple(value.shape)
            return value

    path = tiny("llama").path
    checkpoint = loader.open_checkpoint(loader.resolve(str(path)))
    config = ModelConfig.from_hf(json.loads((path / "config.json").read_text()))
    kernels = KernelSelector(device=CPU, dtype=torch.float32)
    model = build_model(
        config, dtype=torch.float32, device=CPU, kernels=kernels, mesh=Mesh(tp=2), rank=1
    )
    model.load_weights((name, Watched(name, stored)) for name, stored in checkpoint.blocks())
    assert asked["model.embed_tokens.weight"] == (99, 72)
    assert asked["model.layers.0.self_attn.q_proj.weight"] == (48, 72)
    assert asked["model.layers.0.self_attn.k_proj.weight"] == (16, 72)
    assert asked["model.layers.2.self_attn.o_proj.weight"] == (72, 48)
    assert asked["model.layers.2.mlp.down_proj.weight"] == (72, 48)
    assert asked["model.norm.weight"] == (72,)


def test_heads_that_ranks_cannot_share_are_named(tiny: Callable[[str], Tiny]) -> None:
    config = json.loads((tiny("llama").path / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"attention\.qkv.*4 ranks cannot divide.*\(q\)"):
        compile_model(
            ModelConfig.from_hf(config),
            kernels=KernelSelector(device=CPU, dtype=torch.float32),
            mesh=Mesh(tp=4),
        )


@pytest.mark.parametrize(
    ("name", "mesh"), [("llama-bias", Mesh(tp=2)), ("qwen3-moe", Mesh(tp=4, ep=2))], ids=str
)
def test_real_tensors_lie_as_the_program_says(
    tiny: Callable[[str], Tiny], name: str, mesh: Mesh
) -> None:
    path = tiny(name).path
    tokens = prompt(9, seed=3)

    def run(rank: int, store: Store, spoil: bool) -> str | None:
        model = load(path, mesh, rank, store, check=True)
        if spoil and rank == 1:
            # A weight that all ranks should hold alike.
            model.blocks[1].mlp_norm.weight.data.add_(1)  # type: ignore[attr-defined]
        try:
            Driver(model).prefill(tokens, chunk=4)
        except PlacementError as error:
            return str(error)
        return None

    assert (
        in_threads(mesh.world, lambda rank, store: run(rank, store, False)) == [None] * mesh.world
    )
    for message in in_threads(mesh.world, lambda rank, store: run(rank, store, True)):
        assert message is not None
        assert "blocks.1.mlp_norm (RMSNorm): out[0] " in message
        assert "should be the same on ranks" in message or "wrong on another of ranks" in message
