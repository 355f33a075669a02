"""What a model is: sizes and constants, read from a Hugging Face `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenspeed.core.errors import CorruptCheckpoint, UnsupportedModel
from tokenspeed.modeling.config_parts import (
    ExpertsConfig,
    LatentConfig,
    RopeConfig,
    read_count,
    read_experts,
    read_latent,
    read_number,
    read_rope,
    stretched,
)
from tokenspeed.modeling.models.registry import require_architecture

__all__ = ["ExpertsConfig", "LatentConfig", "ModelConfig", "RopeConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of a decoder.

    Attributes:
        architecture: Hugging Face's name of the class.
        vocab_size, hidden_size, intermediate_size: in elements.
        head_dim: elements of a query or key head.
        layers, heads, kv_heads: counts.
        norm_epsilon: of every RMS norm.
        rope: rotary embedding.
        context_max: positions the model is made for.
        tie_embeddings: whether the head reads the embedding's table.
        attention_bias, mlp_bias: whether those projections add one.
        experts: of a mixture; None for a dense model.
        latent: sizes of latent attention; None where K and V are kept.
        window: tokens that a query sees, itself included, in layers that see no more; None where
            all layers see everything.
        windowed_layers: those layers.
        window_rope: rotary embedding of those layers, where it is their own.
        attention_scale: what products of queries and keys are multiplied by; None for the inverse
            root of head_dim.
        next_layers: blocks behind the model's own that predict tokens beyond the next one.
        draft_vocab_size: of a head of drafts, how many tokens it proposes.
        state_layers: of a head of drafts, in front of which blocks of its target the states are
            that it reads; None for those of early, middle and late blocks that are usual.
        head_norm: whether query and key heads are normed, where a family has both kinds.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    head_dim: int
    layers: int
    heads: int
    kv_heads: int
    norm_epsilon: float
    rope: RopeConfig
    context_max: int
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None
    head_norm: bool = False
    window: int | None = None
    windowed_layers: frozenset[int] = frozenset()
    window_rope: RopeConfig | None = None
    attention_scale: float | None = None
    next_layers: int = 0
    draft_vocab_size: int | None = None
    state_layers: tuple[int, ...] | None = None

    @property
    def rotated_dim(self) -> int:
        """Elements of what the rotary embedding is given: of a head, or of its rotated part."""
        return self.head_dim if self.latent is None else self.latent.rotated_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read the dictionary of a `config.json`, of transformers 4 or 5.

        Raises:
            UnsupportedModel: an architecture or an option that no model here computes.
            CorruptCheckpoint: a field is missing or senseless.
        """
        names = config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise CorruptCheckpoint(f"config.json names no architecture: {names!r}")
        architecture = require_architecture(names[0])
        _refuse(config, architecture)
        hidden_size = read_count(config, "hidden_size")
        heads = read_count(config, "num_attention_heads")
        kv_heads = read_count(config, "num_key_value_heads", default=heads)
        latent = read_latent(config, architecture)
        if latent is None:
            head_dim = read_count(config, "head_dim", default=hidden_size // heads)
        else:
            head_dim = latent.plain_dim + latent.rotated_dim
        if heads % kv_heads:
            raise CorruptCheckpoint(
                f"config.json has {heads} attention heads, which is no multiple of its "
                f"{kv_heads} key-value heads"
            )
        windowed = _windowed_layers(config)
        if latent is None and head_dim % 2:
            raise CorruptCheckpoint(f"config.json has an odd head_dim, {head_dim}")
        rope = read_rope(config)
        scale = None if latent is None else head_dim**-0.5 * stretched(config)
        if "query_pre_attn_scalar" in config:
            scale = read_number(config, "query_pre_attn_scalar") ** -0.5
        if rope.length != 1.0 and latent is None and rope.fraction == 1.0:
            # Queries and keys are longer, both and all of them: so are only their products here.
            scale = (head_dim**-0.5 if scale is None else scale) * rope.length**2
            rope = replace(rope, length=1.0)
        return cls(
            architecture=architecture,
            vocab_size=read_count(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read_count(config, "intermediate_size"),
            head_dim=head_dim,
            layers=read_count(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            norm_epsilon=read_number(config, "rms_norm_eps", default=1e-6),
            rope=rope,
            context_max=read_count(config, "max_position_embeddings"),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            experts=read_experts(config, architecture),
            latent=latent,
            head_norm=bool(config.get("use_qk_norm", False)),
            window=read_count(config, "sliding_window") if windowed else None,
            windowed_layers=windowed,
            window_rope=_window_rope(config),
            attention_scale=scale,
            next_layers=_next_layers(config),
            draft_vocab_size=(
                read_count(config, "draft_vocab_size") if config.get("draft_vocab_size") else None
            ),
            state_layers=_state_layers(config),
        )


def _next_layers(config: Mapping[str, Any]) -> int:
    name = "num_nextn_predict_layers"
    return read_count(config, name) if config.get(name) else 0


def _state_layers(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    options = config.get("eagle_config")
    layers = options.get("eagle_aux_hidden_state_layer_ids") if isinstance(options, dict) else None
    if layers is None:
        return None
    if not isinstance(layers, list) or not all(
        isinstance(layer, int) and layer >= 0 for layer in layers
    ):
        raise CorruptCheckpoint(f"config.json names no layers of states: {layers!r}")
    return tuple(sorted(layers))


def _refuse(config: Mapping[str, Any], architecture: str) -> None:
    gemma = architecture == "Gemma3ForCausalLM"
    name = "hidden_activation" if gemma else "hidden_act"
    computed = ("gelu_pytorch_tanh",) if gemma else ("silu", "swish")
    activation = config.get(name, computed[0])
    if activation not in computed:
        raise UnsupportedModel(
            f"{architecture} with {name} {activation!r}; {computed[0]} is supported"
        )
    if config.get("use_sliding_window"):
        raise UnsupportedModel(
            f"{architecture} with use_sliding_window; full attention is supported"
        )
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if config.get(name) is not None:
            raise UnsupportedModel(f"{architecture} with {name}; logits are not capped here")
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModel(f"{architecture} with use_bidirectional_attention")


def _windowed_layers(config: Mapping[str, Any]) -> frozenset[int]:
    """Layers whose queries see a window; of Gemma and gpt-oss, and of a Mistral that has one."""
    layers = range(read_count(config, "num_hidden_layers"))
    model_type = config.get("model_type")
    if model_type == "mistral":
        return frozenset(layers if config.get("sliding_window") else ())
    if model_type not in ("gemma3_text", "gemma3", "gpt_oss"):
        return frozenset()
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) == len(layers):
        return frozenset(layer for layer in layers if types[layer] == "sliding_attention")
    every = read_count(
        config, "sliding_window_pattern", default=2 if model_type == "gpt_oss" else 6
    )
    return frozenset(layer for layer in layers if (layer + 1) % every)


def _window_rope(config: Mapping[str, Any]) -> RopeConfig | None:
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and isinstance(rope.get("sliding_attention"), dict):
        return read_rope({"rope_parameters": rope["sliding_attention"]})
    if "rope_local_base_freq" in config:
        return RopeConfig(theta=read_number(config, "rope_local_base_freq"))
    return None
