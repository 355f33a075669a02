"""`docs/add-a-model.md`, step by step: SmolLM3, a Llama that rotates nothing in every fourth layer,
from a file of its own to equal logits on one rank and on two."""

import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import Store
from transformers import SmolLM3Config

from tests.models import tiny
from tests.models.test_ranks import load
from tests.models.test_tiny_models import assert_close, expected, prompt
from tests.support.forward import Driver
from tests.support.ranks import in_threads
from tokenspeed.distributed import Mesh
from tokenspeed.modeling import models
from tokenspeed.modeling.models import registry

# Steps 1 to 4: the class, its forward, its boundary, its names. Step 5 has nothing to do: the
# family's own field says what all of its checkpoints have.
MODEL = '''"""SmolLM3 (Hugging Face 2025): Llama whose every fourth layer sees no positions.

Legend: T tokens, S sampled tokens, V vocabulary, M model features.
"""

import torch

from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling.batch import ForwardBatch, KVStorage
from tokenspeed.modeling.config import ModelConfig, RopeConfig
from tokenspeed.modeling.layers import RotaryEmbedding
from tokenspeed.modeling.models.llama import Llama
from tokenspeed.modeling.placement import Shard, boundary

__all__ = ["SmolLM3"]

_EVERY = 4


@boundary(out=Shard("tp", "vocabulary"))
class SmolLM3(Llama):
    """Embedding, blocks, norm, head."""

    def __init__(self, config: ModelConfig, kernels: KernelSelector) -> None:
        super().__init__(config, kernels)
        still = RopeConfig(theta=config.rope.theta, fraction=0.0)
        self.still = RotaryEmbedding(still, head_dim=config.head_dim, kernels=kernels)

    def forward(self, batch: ForwardBatch, kv: KVStorage) -> torch.Tensor:
        """logits_SV of the sampled tokens, float32."""
        turned, still = self.rotary(batch.positions_T), self.still(batch.positions_T)
        x_TM, residual_TM = self.embedding(batch.token_ids_T), None
        for number, (block, (group, layer)) in enumerate(
            zip(self.blocks, self.kv_places, strict=True), start=1
        ):
            x_TM, residual_TM = block(
                x_TM,
                residual_TM,
                turned if number % _EVERY else still,
                batch.groups[group],
                kv.layer(group, layer),
            )
        x_TM, residual_TM = (
            self._take(of_TM, batch.sample_token_indices_S) for of_TM in (x_TM, residual_TM)
        )
        normed_SM, _ = self.norm(x_TM, residual_TM)
        return self.head(normed_SM)
'''


def test_one_more_family_takes_a_file_a_line_and_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "smollm3.py").write_text(MODEL)
    # What lies there is a module of the package as if it lay in its folder.
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    # Step 6: the line in the registry.
    monkeypatch.setitem(registry._MODELS, "SmolLM3ForCausalLM", ("smollm3", "SmolLM3"))
    # Step 7: the tiny configuration.
    sizes = {**tiny._SIZES, "num_hidden_layers": 5}
    monkeypatch.setitem(
        tiny.CONFIGS, "smollm3", SmolLM3Config(**sizes, attention_bias=True, pad_token_id=None)
    )
    try:
        found = tiny.write_tiny("smollm3", tmp_path / "checkpoint")
        tokens = prompt(40, seed=1)
        wanted = expected(found, tokens)
        for chunk in (1, 16, 40):
            alone = Driver(load(found.path, Mesh(), 0, None))
            assert_close(alone.prefill(tokens, chunk=chunk), wanted)

        def run(rank: int, store: Store) -> torch.Tensor:
            return Driver(load(found.path, Mesh(tp=2), rank, store)).prefill(tokens, chunk=16)

        for logits in in_threads(2, run):
            assert_close(logits, wanted)
    finally:
        sys.modules.pop(f"{models.__name__}.smollm3", None)
