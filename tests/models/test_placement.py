"""Boundaries say how tensors lie, and are checked when they are declared."""

from pathlib import Path

import pytest
import torch

from tests.models.test_config import LATENT, LLAMA
from tokenspeed import modeling
from tokenspeed.core.errors import ConfigError
from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling import ModelConfig, build_model
from tokenspeed.modeling.layers import RotaryEmbedding
from tokenspeed.modeling.module import Module
from tokenspeed.modeling.placement import Partial, Replicate, Shard, boundary


def test_a_boundary_is_kept_on_the_class() -> None:
    @boundary(
        x=(Replicate("tp"), Shard("dp", "tokens")),
        outs=(Partial("tp"), (Replicate("tp"), Shard("dp", "tokens"))),
    )
    class Twice(Module):
        def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return x

    assert Twice.boundary is not None
    assert Twice.boundary.inputs == {"x": (Replicate("tp"), Shard("dp", "tokens"))}
    assert Twice.boundary.outputs == (
        (Partial("tp"),),
        (Replicate("tp"), Shard("dp", "tokens")),
    )


def test_a_boundary_must_name_parameters_of_forward() -> None:
    class Layer(Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ConfigError, match=r"Layer places 'y', but its forward takes \(self, x\)"):
        boundary(y=Replicate("tp"), out=Partial("tp"))(Layer)
    with pytest.raises(ConfigError, match="twice on one axis"):
        boundary(x=(Replicate("tp"), Partial("tp")), out=Partial("tp"))(Layer)
    with pytest.raises(ConfigError, match="either out or outs"):
        boundary(x=Replicate("tp"))(Layer)
    with pytest.raises(ConfigError, match="either out or outs"):
        boundary(x=Replicate("tp"), out=Partial("tp"), outs=(Partial("tp"),))(Layer)


@pytest.mark.parametrize("place", [Replicate, Partial, lambda axis: Shard(axis, "heads")])
def test_a_placement_is_on_an_axis_of_the_mesh(place: type[Replicate]) -> None:
    with pytest.raises(ConfigError, match="tp, ep, dp, cp, not 'pp'"):
        place("pp")


@pytest.mark.parametrize("architecture", modeling.ARCHITECTURES)
def test_every_module_of_every_model_has_a_boundary(architecture: str) -> None:
    kernels = KernelSelector(device=torch.device("cpu"), dtype=torch.float32)
    config = ModelConfig.from_hf({**LLAMA, **LATENT, "architectures": [architecture]})
    model = build_model(config, dtype=torch.float32, device=torch.device("meta"), kernels=kernels)

    def without_boundary(name: str, module: Module) -> list[str]:
        # Rotary embeddings turn positions into angles; neither is part of the data flow.
        placed = module.boundary is not None or isinstance(module, RotaryEmbedding)
        own = [] if placed else [name]
        return own + [
            found
            for child_name, child in module.children()
            for found in without_boundary(f"{name}.{child_name}", child)
        ]

    assert without_boundary("model", model) == []


def test_no_model_file_names_a_collective_or_grows_past_200_lines() -> None:
    words = ("all_reduce", "all_gather", "all_to_all", "reduce_scatter", "broadcast", "distributed")
    files = sorted((Path(modeling.__file__).parent / "models").glob("*.py"))
    assert len(files) >= 4
    for file in files:
        text = file.read_text()
        assert len(text.splitlines()) <= 200, file
        assert not [word for word in words if word in text], file
