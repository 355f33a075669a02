"""Multi-token prediction (DeepSeek-V3, 2024, section 2.2), as a checkpoint carries it behind the
model's own layers: one more block, over the model's states and the tokens that followed.

Legend: T tokens, S sampled tokens, V vocabulary, M model features.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from tokenspeed.core.errors import UnsupportedModel
from tokenspeed.kernels import KernelSelector, Stored, ops
from tokenspeed.modeling.batch import ForwardBatch, KVStorage
from tokenspeed.modeling.config import ModelConfig
from tokenspeed.modeling.head import Head
from tokenspeed.modeling.layers import Linear, RMSNorm, RotaryEmbedding
from tokenspeed.modeling.models.llama import Llama
from tokenspeed.modeling.placement import Shard, boundary
from tokenspeed.modeling.weights import fill_weights

__all__ = ["NextToken"]

_LAYERS = "model.layers.*."
_NAMES = {
    "enorm.weight": "embedding_norm.weight",
    "hnorm.weight": "state_norm.weight",
    "eh_proj.weight.left": "from_embedding.weight",
    "eh_proj.weight.right": "from_states.weight",
    "shared_head.norm.weight": "norm.weight",
}
# Copies of the model's own tables.
_IGNORED = frozenset({"embed_tokens.weight", "shared_head.head.weight"})


@boundary(out=Shard("tp", "vocabulary"))
class NextToken(Head):
    """Projections of embedding and states, a block like the target's, norm; the target's head.

    What the target's head would read goes in: states behind the target's last norm, and behind its
    own where it reads its own.
    """

    def __init__(self, config: ModelConfig, kernels: KernelSelector, target: Llama) -> None:
        super().__init__(config, kernels, target)
        if not config.next_layers:
            raise UnsupportedModel(
                f"the checkpoint of {config.architecture} has no layers that predict further "
                "tokens (num_nextn_predict_layers)"
            )
        features, epsilon = config.hidden_size, config.norm_epsilon
        self.state_layers = (config.layers,)
        self.rotary = RotaryEmbedding(config.rope, head_dim=config.rotated_dim, kernels=kernels)
        # One product over both side by side is the sum of two; the block's norm adds them.
        self.from_embedding = Linear(features, features, kernels=kernels)
        self.from_states = Linear(features, features, kernels=kernels)
        self.embedding_norm, self.state_norm = (
            RMSNorm(features, epsilon=epsilon, kernels=kernels, reads=reader.reads)
            for reader in (self.from_embedding, self.from_states)
        )
        self.block = target.block(config, kernels, config.layers)
        self.norm = RMSNorm(features, epsilon=epsilon, kernels=kernels, reads=target.head.reads)
        self._rms_norm = kernels.select(ops.norm.rms_norm)
        self._take = kernels.select(ops.embedding.take)

    def forward(self, batch: ForwardBatch, kv: KVStorage) -> torch.Tensor:
        """logits_SV, float32."""
        given, target = batch.given, self.target.model
        assert given is not None, "a head reads states"
        last = self.norm if given.own else target.norm
        states_TM = self._rms_norm(given.states_TF, last.weight.tensor, self.config.norm_epsilon)
        assert isinstance(states_TM, torch.Tensor)
        embedded_TM = target.embedding(batch.token_ids_T)
        x_TM = self.from_embedding(self.embedding_norm(embedded_TM, None)[0])
        residual_TM = self.from_states(self.state_norm(states_TM.float(), None)[0]).float()
        pages = target.pages(kv, 0, 0)
        angles = self.rotary(batch.positions_T)
        x_TM, residual_TM = self.block(x_TM, residual_TM, angles, batch.groups[0], pages)
        if (sampled_S := batch.sample_token_indices_S) is not None:
            x_TM, residual_TM = self._take(x_TM, sampled_S), self._take(residual_TM, sampled_S)
        normed_SM, states_SM = self.norm(x_TM, residual_TM)
        if batch.kept is not None:
            batch.kept.keep(0, states_SM)
        logits_SV: torch.Tensor = target.head(normed_SM)
        return logits_SV

    def load_weights(self, weights: Iterable[tuple[str, Stored]]) -> None:
        """Fill the weights from the target's checkpoint; see `Model.load_weights`."""
        names: dict[str, str | Sequence[str]] = dict(_NAMES)
        for theirs, ours in self.target.model.weight_names.items():
            if theirs.startswith(_LAYERS):
                own = [_own(name) for name in ([ours] if isinstance(ours, str) else ours)]
                names[theirs.removeprefix(_LAYERS)] = own
        fill_weights(dict(self.weights()), self._pairs(weights), names=names, ignored=_IGNORED)

    def _pairs(self, weights: Iterable[tuple[str, Stored]]) -> Iterator[tuple[str, Stored]]:
        """The tensors of the next layer, by their names in it."""
        prefix = f"model.layers.{self.config.layers}."
        features = self.config.hidden_size
        for name, stored in weights:
            if not name.startswith(prefix):
                continue
            inner = name.removeprefix(prefix)
            if inner != "eh_proj.weight":
                yield inner, stored
                continue
            for half, first in (("left", 0), ("right", features)):
                yield f"{inner}.{half}", stored[(slice(None), slice(first, first + features))]


def _own(name: str) -> str:
    return name.replace("blocks.*.", "block.", 1)
