"""EAGLE-3 (Li et al. 2025): one block of attention over a target's states and the tokens that
followed, with a vocabulary of its own.

Legend: T tokens, S sampled tokens, V tokens it knows, M model features, F = 3 M features of states.
"""

from collections.abc import Iterable

import torch

from tokenspeed.core.errors import UnsupportedModel
from tokenspeed.kernels import KernelSelector, Stored, ops
from tokenspeed.modeling.batch import ForwardBatch, KVStorage
from tokenspeed.modeling.config import ModelConfig
from tokenspeed.modeling.head import Head
from tokenspeed.modeling.layers import GatedMLP, Linear, LMHead, RMSNorm, RotaryEmbedding
from tokenspeed.modeling.models.llama import Llama, attention_of
from tokenspeed.modeling.module import Weight
from tokenspeed.modeling.placement import Shard, boundary
from tokenspeed.modeling.weights import fill_weights

__all__ = ["Eagle3"]

_NAMES = {
    "fc.weight": "fuse.weight",
    "midlayer.hidden_norm.weight": "state_norm.weight",
    "midlayer.input_layernorm.weight": "embedding_norm.weight",
    "midlayer.self_attn.q_proj.weight": "attention.qkv.weight:q",
    "midlayer.self_attn.k_proj.weight": "attention.qkv.weight:k",
    "midlayer.self_attn.v_proj.weight": "attention.qkv.weight:v",
    "midlayer.self_attn.o_proj.weight": "attention.output.weight",
    "midlayer.post_attention_layernorm.weight": "mlp_norm.weight",
    "midlayer.mlp.gate_proj.weight": "mlp.gate_up.weight:gate",
    "midlayer.mlp.up_proj.weight": "mlp.gate_up.weight:up",
    "midlayer.mlp.down_proj.weight": "mlp.down.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": "head.table",
    "d2t": "offsets",
}
# Which tokens it knows follows from the offsets; a copy of the embedding is the target's.
_IGNORED = frozenset({"t2d", "embed_tokens.weight"})


@boundary(out=Shard("tp", "vocabulary"))
class Eagle3(Head):
    """States and embedding side by side, one block, norm, head."""

    def __init__(self, config: ModelConfig, kernels: KernelSelector, target: Llama) -> None:
        super().__init__(config, kernels, target)
        features = config.hidden_size
        if (features, config.vocab_size) != (target.config.hidden_size, target.config.vocab_size):
            raise UnsupportedModel(
                f"the EAGLE-3 head is for {features} features and {config.vocab_size} tokens, but "
                f"its target has {target.config.hidden_size} and {target.config.vocab_size}; "
                "choose the head that was made for this model"
            )
        blocks = target.config.layers
        usual = tuple(sorted({2, blocks // 2, max(blocks - 3, 0)}))
        self.state_layers = config.state_layers or usual
        if len(self.state_layers) != 3 or self.state_layers[-1] > blocks:
            raise UnsupportedModel(
                f"the EAGLE-3 head reads states of three layers, but of {blocks} layers "
                f"{list(self.state_layers)} were found"
            )
        self.fuse = Linear(3 * features, features, kernels=kernels)
        self.rotary = RotaryEmbedding(config.rope, head_dim=config.head_dim, kernels=kernels)
        epsilon = config.norm_epsilon
        self.embedding_norm = RMSNorm(features, epsilon=epsilon, kernels=kernels)
        self.state_norm = RMSNorm(features, epsilon=epsilon, kernels=kernels)
        self.attention = attention_of(config, kernels, 0, inputs=2 * features)
        self.mlp = GatedMLP(
            hidden_size=features,
            intermediate_size=config.intermediate_size,
            bias=config.mlp_bias,
            kernels=kernels,
        )
        self.mlp_norm = RMSNorm(features, epsilon=epsilon, kernels=kernels, reads=self.mlp.reads)
        tokens = config.draft_vocab_size or config.vocab_size
        self.head = LMHead(tokens, features, kernels=kernels, tied=None)
        self.norm = RMSNorm(features, epsilon=epsilon, kernels=kernels, reads=self.head.reads)
        self.offsets: Weight | None = None
        if config.draft_vocab_size is not None:
            self.offsets = Weight(
                (tokens,), dims=("vocabulary",), kernels=kernels, dtype=torch.int64
            )
        self._take = kernels.select(ops.embedding.take)

    def forward(self, batch: ForwardBatch, kv: KVStorage) -> torch.Tensor:
        """logits_SV of the tokens that it knows, float32."""
        given = batch.given
        assert given is not None, "a head reads states"
        states_TM = given.states_TF
        if not given.own:
            states_TM = self.fuse(given.states_TF.to(self.kernels.dtype)).float()
        embedded_TM = self.target.model.embedding(batch.token_ids_T)
        normed_T2M = torch.cat(
            [self.embedding_norm(embedded_TM, None)[0], self.state_norm(states_TM, None)[0]], dim=1
        )
        angles = self.rotary(batch.positions_T)
        x_TM = self.attention(normed_T2M, angles, batch.groups[0], kv.layer(0, 0))
        normed_TM, residual_TM = self.mlp_norm(x_TM, states_TM)
        x_TM = self.mlp(normed_TM)
        if (sampled_S := batch.sample_token_indices_S) is not None:
            x_TM, residual_TM = self._take(x_TM, sampled_S), self._take(residual_TM, sampled_S)
        normed_SM, states_SM = self.norm(x_TM, residual_TM)
        if batch.kept is not None:
            batch.kept.keep(0, states_SM)
        logits_SV: torch.Tensor = self.head(normed_SM)
        return logits_SV

    def tokens(self, chosen_S: torch.Tensor) -> torch.Tensor:
        """A token that it knows is as far behind the target's id as an offset says."""
        return chosen_S if self.offsets is None else chosen_S + self.offsets.tensor[chosen_S]

    def load_weights(self, weights: Iterable[tuple[str, Stored]]) -> None:
        """Fill the weights from the head's own checkpoint; see `Model.load_weights`."""
        fill_weights(dict(self.weights()), weights, names=_NAMES, ignored=_IGNORED)
