"""A checkpoint that does not fit its architecture is refused with every wrong name."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models.tiny import build, read_tensors, write_tiny
from tests.support.forward import Driver
from tokenspeed.core.errors import CorruptCheckpoint
from tokenspeed.modeling import Model

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def loaded(tmp_path: Path) -> tuple[Model, Tensors]:
    write_tiny("qwen2", tmp_path)
    return build(json.loads((tmp_path / "config.json").read_text())), read_tensors(tmp_path)


def test_missing_unexpected_and_misshapen_tensors_are_named_together(
    loaded: tuple[Model, Tensors],
) -> None:
    model, tensors = loaded
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    del tensors["lm_head.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(96, 72)
    tensors["model.norm.bias"] = torch.zeros(72)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(96, 72)
    with pytest.raises(CorruptCheckpoint) as caught:
        model.load_weights(tensors.items())
    message = str(caught.value)
    missing, unexpected, misshapen = message.split("; ")
    assert "missing: " in missing
    assert "model.layers.1.self_attn.k_proj.bias" in missing
    assert "lm_head.weight" in missing
    assert "model.layers.3.mlp.up_proj.weight" in unexpected
    assert "model.norm.bias" in unexpected
    assert "model.layers.0.mlp.down_proj.weight is [96, 72], not [72, 96]" in misshapen
    assert "up_proj" not in missing


def test_a_tensor_that_comes_twice_is_refused(loaded: tuple[Model, Tensors]) -> None:
    model, tensors = loaded
    twice = [*tensors.items(), ("model.norm.weight", tensors["model.norm.weight"])]
    with pytest.raises(CorruptCheckpoint, match=r"repeated: model\.norm\.weight"):
        model.load_weights(twice)


def test_many_wrong_names_are_counted_not_listed(loaded: tuple[Model, Tensors]) -> None:
    model, _ = loaded
    with pytest.raises(CorruptCheckpoint, match=r"missing: .* and \d+ more$"):
        model.load_weights([])


def test_a_tied_checkpoint_may_bring_the_head_as_a_copy(tmp_path: Path) -> None:
    write_tiny("qwen2-tied", tmp_path)
    tensors = read_tensors(tmp_path)
    assert "lm_head.weight" not in tensors
    model = build(json.loads((tmp_path / "config.json").read_text()))
    model.load_weights(tensors.items())
    alone = Driver(model).prefill([1, 2, 3], chunk=3)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model.load_weights(tensors.items())
    assert torch.equal(Driver(model).prefill([1, 2, 3], chunk=3), alone)


def test_weights_are_converted_to_the_models_type(loaded: tuple[Model, Tensors]) -> None:
    model, tensors = loaded
    model.load_weights((name, tensor.double()) for name, tensor in tensors.items())
    assert {weight.data.dtype for _, weight in model.weights()} == {torch.float32}
    stored = sum(tensor.numel() for tensor in tensors.values())
    assert model.weights_size_bytes == 4 * stored


def test_tensors_are_asked_for_one_by_one(loaded: tuple[Model, Tensors]) -> None:
    model, tensors = loaded
    given: list[weakref.ref[torch.Tensor]] = []
    most_alive = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most_alive
        for name, tensor in tensors.items():
            most_alive = max(most_alive, sum(reference() is not None for reference in given))
            copy = tensor.clone()
            given.append(weakref.ref(copy))
            yield name, copy

    model.load_weights(stream())
    assert len(given) == len(tensors)
    assert most_alive == 1
