"""A quantised checkpoint gives what a checkpoint of its dequantised weights gives, on one rank and
on several that read their shares of it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import Store

from tests.models.test_ranks import load
from tests.models.test_tiny_models import assert_close, prompt
from tests.models.tiny import build, read_tensors, write_tiny
from tests.support.forward import Driver
from tests.support.quantising import Packed, pack_fp8, pack_mxfp4
from tests.support.ranks import in_threads
from tests.unit.loader.test_quantised import FORMATS, FP8, MXFP4
from tokenspeed.distributed import Mesh

Pack = Callable[[torch.Tensor], Packed]


def quantised(
    path: Path, scheme: dict[str, Any], chosen: Callable[[str], bool], pack: Pack
) -> dict[str, torch.Tensor]:
    """Pack some of a checkpoint's tensors in place; gives what all of them stand for."""
    exact: dict[str, torch.Tensor] = {}
    stored: dict[str, torch.Tensor] = {}
    for name, values in read_tensors(path).items():
        exact[name] = stored[name] = values
        if chosen(name):
            parts, exact[name] = pack(values)
            del stored[name]
            stem = name.removesuffix("weight")
            stored |= {f"{stem}{end}": part for end, part in parts.items()}
    save_file(stored, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": scheme}))
    return exact


def kinds() -> Iterator[tuple[str, str, dict[str, Any], Callable[[str], bool], Pack]]:
    def linear(name: str) -> bool:
        return name.endswith("proj.weight")

    for name, (scheme, pack) in FORMATS.items():
        yield name, "llama", scheme, linear, pack
    # Latents' projections, up-projections of heads, and experts one by one.
    yield (
        "fp8-deepseek",
        "deepseek-v3",
        FP8,
        lambda name: linear(name) or "_proj_with_mqa.weight" in name,
        lambda values: pack_fp8(values, (16, 24)),
    )
    yield (
        "mxfp4-gpt-oss",
        "gpt-oss",
        MXFP4,
        lambda name: name.endswith(("gate_up_proj", "down_proj")),
        pack_mxfp4,
    )


@pytest.mark.parametrize(
    ("name", "scheme", "chosen", "pack"),
    [pytest.param(*rest, id=of) for of, *rest in kinds()],
)
def test_a_quantised_checkpoint_gives_what_its_dequantised_weights_give(
    tmp_path: Path, name: str, scheme: dict[str, Any], chosen: Callable[[str], bool], pack: Pack
) -> None:
    write_tiny(name, tmp_path)
    plain = build(json.loads((tmp_path / "config.json").read_text()))
    plain.load_weights(quantised(tmp_path, scheme, chosen, pack).items())
    tokens = prompt(40, seed=1)
    wanted = Driver(plain).prefill(tokens, chunk=16)
    alone = load(tmp_path, Mesh(), 0, None)
    assert torch.equal(Driver(alone).prefill(tokens, chunk=16), wanted)

    def run(rank: int, store: Store) -> torch.Tensor:
        mesh = Mesh(tp=2, ep=2 if name == "deepseek-v3" else 1)
        return Driver(load(tmp_path, mesh, rank, store)).prefill(tokens, chunk=16)

    for logits in in_threads(2, run):
        assert_close(logits, wanted)
