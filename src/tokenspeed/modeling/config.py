"""What a model is: sizes and constants, read from a Hugging Face `config.json`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenspeed.core.errors import CorruptCheckpoint, UnsupportedModel
from tokenspeed.modeling.models.registry import require_architecture

__all__ = ["ExpertsConfig", "ModelConfig", "RopeConfig"]

SIGMOID_ROUTED = ("glm4_moe",)
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: base of the geometric row of wavelengths.
        fraction: of a head's elements, how many are rotated, the first ones.
        type: "default"; "linear" divides every position by `factor`; "llama3" slows long
            wavelengths by `factor` and leaves short ones (Llama 3.1).
        factor: see type.
        low_frequency_factor, high_frequency_factor: llama3's band between both treatments, in
            turns made over the original context.
        original_context: positions the model was first trained on; llama3 only.
    """

    theta: float
    type: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192
    fraction: float = 1.0

    def rotated(self, head_dim: int) -> int:
        """How many elements of a head are rotated."""
        return int(head_dim * self.fraction)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of the feed-forward network.

    Attributes:
        count: experts of a layer.
        per_token: how many each token goes to.
        intermediate_size: features of an expert.
        dense_layers: layers that have one network for all tokens instead.
        shared: experts that every token goes to, which are one network of their features.
        bias: whether experts are chosen with a bias that they are not weighed with.
        scoring, normalise, scale, groups, groups_kept: as `kernels.ops.moe.route` takes them.
    """

    count: int
    per_token: int
    intermediate_size: int
    dense_layers: frozenset[int] = frozenset()
    shared: int = 0
    bias: bool = False
    scoring: str = "softmax"
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of a decoder.

    Attributes:
        architecture: Hugging Face's name of the class.
        vocab_size, hidden_size, intermediate_size, head_dim: in elements.
        layers, heads, kv_heads: counts.
        norm_epsilon: of every RMS norm.
        rope: rotary embedding.
        context_max: positions the model is made for.
        tie_embeddings: whether the head reads the embedding's table.
        attention_bias, mlp_bias: whether those projections add one.
        experts: of a mixture; None for a dense model.
        window: tokens that a query sees, itself included, in layers that see no more; None where
            all layers see everything.
        windowed_layers: those layers.
        window_rope: rotary embedding of those layers, where it is their own.
        attention_scale: what products of queries and keys are multiplied by; None for the inverse
            root of head_dim.
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
    head_norm: bool = False
    window: int | None = None
    windowed_layers: frozenset[int] = frozenset()
    window_rope: RopeConfig | None = None
    attention_scale: float | None = None

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
        hidden_size = _count(config, "hidden_size")
        heads = _count(config, "num_attention_heads")
        kv_heads = _count(config, "num_key_value_heads", default=heads)
        head_dim = _count(config, "head_dim", default=hidden_size // heads)
        if heads % kv_heads:
            raise CorruptCheckpoint(
                f"config.json has {heads} attention heads, which is no multiple of its "
                f"{kv_heads} key-value heads"
            )
        windowed = _windowed_layers(config)
        if head_dim % 2:
            raise CorruptCheckpoint(f"config.json has an odd head_dim, {head_dim}")
        return cls(
            architecture=architecture,
            vocab_size=_count(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_count(config, "intermediate_size"),
            head_dim=head_dim,
            layers=_count(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            norm_epsilon=_number(config, "rms_norm_eps", default=1e-6),
            rope=_rope(config),
            context_max=_count(config, "max_position_embeddings"),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            experts=_experts(config),
            head_norm=bool(config.get("use_qk_norm", False)),
            window=_count(config, "sliding_window") if windowed else None,
            windowed_layers=windowed,
            window_rope=_window_rope(config),
            attention_scale=(
                _number(config, "query_pre_attn_scalar") ** -0.5
                if "query_pre_attn_scalar" in config
                else None
            ),
        )


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
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise UnsupportedModel(
            f"a checkpoint quantised by {method!r}; supported are float32, float16 and bfloat16 "
            "safetensors, and GGUF files"
        )


def _experts(config: Mapping[str, Any]) -> ExpertsConfig | None:
    # transformers 5 writes its own name of the count, others the one of before.
    known = ("num_experts", "num_local_experts", "n_routed_experts")
    names = [name for name in known if config.get(name)]
    if not names:
        return None
    layers = _count(config, "num_hidden_layers")
    every = _count(config, "decoder_sparse_step", default=1)
    dense = {layer for layer in range(layers) if (layer + 1) % every}
    dense |= set(range(int(config.get("first_k_dense_replace") or 0)))
    count = _count(config, names[0])
    per_token = _count(config, "num_experts_per_tok")
    if per_token > count:
        raise CorruptCheckpoint(f"config.json sends tokens to {per_token} of {count} experts")
    # What chooses experts by sigmoid also has a bias for each of them.
    sigmoid = config.get("model_type") in SIGMOID_ROUTED
    return ExpertsConfig(
        count=count,
        per_token=per_token,
        intermediate_size=_count(config, "moe_intermediate_size"),
        dense_layers=frozenset(dense | set(config.get("mlp_only_layers") or ())),
        shared=int(config.get("n_shared_experts") or 0),
        bias=sigmoid,
        scoring="sigmoid" if sigmoid else "softmax",
        normalise=bool(config.get("norm_topk_prob", False)),
        scale=_number(config, "routed_scaling_factor", default=1.0),
        groups=_count(config, "n_group", default=1),
        groups_kept=_count(config, "topk_group", default=1),
    )


def _windowed_layers(config: Mapping[str, Any]) -> frozenset[int]:
    """Layers whose queries see a window; of Gemma, and of a Mistral that has one."""
    layers = range(_count(config, "num_hidden_layers"))
    model_type = config.get("model_type")
    if model_type == "mistral":
        return frozenset(layers if config.get("sliding_window") else ())
    if model_type not in ("gemma3_text", "gemma3"):
        return frozenset()
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) == len(layers):
        return frozenset(layer for layer in layers if types[layer] == "sliding_attention")
    every = _count(config, "sliding_window_pattern", default=6)
    return frozenset(layer for layer in layers if (layer + 1) % every)


def _window_rope(config: Mapping[str, Any]) -> RopeConfig | None:
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and isinstance(rope.get("sliding_attention"), dict):
        return _rope({"rope_parameters": rope["sliding_attention"]})
    if "rope_local_base_freq" in config:
        return RopeConfig(theta=_number(config, "rope_local_base_freq"))
    return None


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    # transformers 5 keeps theta and scaling together in rope_parameters.
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(scaling, dict) and isinstance(scaling.get("full_attention"), dict):
        scaling = scaling["full_attention"]
    if not isinstance(scaling, dict):
        raise CorruptCheckpoint(f"config.json: rope_scaling must be a table, but is {scaling!r}")
    theta = _number({**config, **scaling}, "rope_theta", default=10000.0)
    type_ = scaling.get("rope_type", scaling.get("type", "default"))
    fraction = _number({**config, **scaling}, "partial_rotary_factor", default=1.0)
    if type_ == "default":
        return RopeConfig(theta=theta, fraction=fraction)
    if type_ == "linear":
        factor = _number(scaling, "factor")
        return RopeConfig(theta=theta, type="linear", factor=factor, fraction=fraction)
    if type_ == "llama3":
        return RopeConfig(
            theta=theta,
            type="llama3",
            fraction=fraction,
            factor=_number(scaling, "factor"),
            low_frequency_factor=_number(scaling, "low_freq_factor"),
            high_frequency_factor=_number(scaling, "high_freq_factor"),
            original_context=_count(scaling, "original_max_position_embeddings"),
        )
    raise UnsupportedModel(f"rope scaling of type {type_!r}; supported are {', '.join(ROPE_TYPES)}")


def _count(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CorruptCheckpoint(f"config.json: {key} must be a positive integer, but is {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str, *, default: float | None = None) -> float:
    value: Any = config.get(key)
    value = default if value is None else value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise CorruptCheckpoint(f"config.json: {key} must be a positive number, but is {value!r}")
    return float(value)
