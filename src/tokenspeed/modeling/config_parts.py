"""Parts of a model's configuration, read from a Hugging Face `config.json`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenspeed.core.errors import CorruptCheckpoint, UnsupportedModel

__all__ = [
    "ROPE_TYPES",
    "ExpertsConfig",
    "LatentConfig",
    "RopeConfig",
    "read_count",
    "read_experts",
    "read_latent",
    "read_number",
    "read_rope",
    "stretched",
]

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# What choose experts by sigmoid also have a bias for each of them.
_SIGMOID_ROUTED = ("DeepseekV3ForCausalLM", "Glm4MoeForCausalLM")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: base of the geometric row of wavelengths.
        fraction: of a head's elements, how many are rotated, the first ones.
        type: "default"; "linear" divides every position by `factor`; "llama3" slows long
            wavelengths by `factor` and leaves short ones (Llama 3.1); "yarn" does so too, with
            another band between them (YaRN, Peng et al. 2023).
        factor: see type.
        low_frequency_factor, high_frequency_factor: the band between both treatments, in turns
            made over the original context.
        original_context: positions the model was first trained on; of llama3 and yarn.
        whole_pairs: whether yarn's band begins and ends at a pair of elements.
        length: what rotated elements are multiplied by; of yarn.
    """

    theta: float
    type: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192
    whole_pairs: bool = True
    length: float = 1.0
    fraction: float = 1.0

    def rotated(self, head_dim: int) -> int:
        """How many elements of a head are rotated."""
        return int(head_dim * self.fraction)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """Latent attention (DeepSeek-V2, 2024, section 2.1).

    Attributes:
        q_rank: elements that a query is projected down to; None where it is not.
        kv_rank: elements of compressed KV.
        plain_dim, rotated_dim: elements of a query or key that are not rotated, and that are.
        value_dim: elements of a head's value.
        interleaved: whether the checkpoint has elements that are rotated together next to each
            other, and not half of the rotated ones apart.
    """

    q_rank: int | None
    kv_rank: int
    plain_dim: int
    rotated_dim: int
    value_dim: int
    interleaved: bool

    @property
    def latent_dim(self) -> int:
        """Elements kept of a token: compressed KV and the rotated key."""
        return self.kv_rank + self.rotated_dim


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
        biased: whether the router and the experts' projections add a bias.
        limit: of what their gates take, as `kernels.ops.moe.experts` has it; None for none.
        scoring, normalise, scale, groups, groups_kept: as `kernels.ops.moe.route` takes them.
    """

    count: int
    per_token: int
    intermediate_size: int
    dense_layers: frozenset[int] = frozenset()
    shared: int = 0
    bias: bool = False
    biased: bool = False
    limit: float | None = None
    scoring: str = "softmax"
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1


def read_experts(config: Mapping[str, Any], architecture: str) -> ExpertsConfig | None:
    """The mixture of experts; None where there is none.

    Raises:
        UnsupportedModel: experts are chosen in a way that is not computed here.
        CorruptCheckpoint: a field is missing or senseless.
    """
    # transformers 5 writes its own name of the count, others the one of before.
    known = ("num_experts", "num_local_experts", "n_routed_experts")
    names = [name for name in known if config.get(name)]
    if not names:
        return None
    layers = read_count(config, "num_hidden_layers")
    every = read_count(config, "decoder_sparse_step", default=1)
    dense = {layer for layer in range(layers) if (layer + 1) % every}
    dense |= set(range(int(config.get("first_k_dense_replace") or 0)))
    count = read_count(config, names[0])
    per_token = read_count(config, "num_experts_per_tok")
    if per_token > count:
        raise CorruptCheckpoint(f"config.json sends tokens to {per_token} of {count} experts")
    sigmoid = architecture in _SIGMOID_ROUTED
    _require_routing(config, architecture, sigmoid=sigmoid)
    groups = read_count(config, "n_group", default=1)
    if config.get("topk_method") == "greedy":
        groups = 1
    if count % groups:
        raise CorruptCheckpoint(f"config.json has {count} experts in {groups} equal groups")
    if architecture == "GptOssForCausalLM":
        return ExpertsConfig(
            count=count,
            per_token=per_token,
            intermediate_size=read_count(config, "intermediate_size"),
            biased=True,
            limit=read_number(config, "swiglu_limit", default=7.0),
            scoring="chosen",
        )
    return ExpertsConfig(
        count=count,
        per_token=per_token,
        intermediate_size=read_count(config, "moe_intermediate_size"),
        dense_layers=frozenset(dense | set(config.get("mlp_only_layers") or ())),
        shared=int(config.get("n_shared_experts") or 0),
        bias=sigmoid,
        scoring="sigmoid" if sigmoid else "softmax",
        normalise=bool(config.get("norm_topk_prob", False)),
        scale=read_number(config, "routed_scaling_factor", default=1.0),
        groups=groups,
        groups_kept=read_count(config, "topk_group", default=1) if groups > 1 else 1,
    )


def _require_routing(config: Mapping[str, Any], architecture: str, *, sigmoid: bool) -> None:
    scoring = "sigmoid" if sigmoid else "softmax"
    methods = ("noaux_tc",) if sigmoid else ("greedy", "group_limited_greedy")
    refused: dict[str, tuple[Any, ...]] = {
        "scoring_func": (scoring,),
        "topk_method": methods,
        "moe_layer_freq": (1,),
    }
    if architecture == "GptOssForCausalLM":
        refused["swiglu_alpha"] = (1.702,)
    if architecture == "DeepseekV2ForCausalLM":
        # Implementations do not agree on what scales weights that were normalised.
        refused["norm_topk_prob"] = (False,)
    for name, computed in refused.items():
        value = config.get(name)
        if value is not None and value not in computed:
            raise UnsupportedModel(
                f"{architecture} with {name} {value!r}; supported is "
                f"{' or '.join(map(repr, computed))}"
            )


def read_latent(config: Mapping[str, Any], architecture: str) -> LatentConfig | None:
    """Latent attention; None where K and V are kept.

    Raises:
        CorruptCheckpoint: a field is missing or senseless.
    """
    if architecture not in ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"):
        return None
    rotated_dim = read_count(config, "qk_rope_head_dim")
    if rotated_dim % 2:
        raise CorruptCheckpoint(f"config.json has an odd qk_rope_head_dim, {rotated_dim}")
    # An early field that few checkpoints say anything of.
    interleaved = config.get("rope_interleave")
    return LatentConfig(
        q_rank=read_count(config, "q_lora_rank") if config.get("q_lora_rank") else None,
        kv_rank=read_count(config, "kv_lora_rank"),
        plain_dim=read_count(config, "qk_nope_head_dim"),
        rotated_dim=rotated_dim,
        value_dim=read_count(config, "v_head_dim"),
        interleaved=True if interleaved is None else bool(interleaved),
    )


def read_rope(config: Mapping[str, Any]) -> RopeConfig:
    """The rotary embedding of layers that see everything.

    Raises:
        UnsupportedModel: a scaling that is not computed here.
        CorruptCheckpoint: a field is missing or senseless.
    """
    scaling = _scaling(config)
    theta = read_number({**config, **scaling}, "rope_theta", default=10000.0)
    type_ = scaling.get("rope_type", scaling.get("type", "default"))
    fraction = read_number({**config, **scaling}, "partial_rotary_factor", default=1.0)
    if type_ == "default":
        return RopeConfig(theta=theta, fraction=fraction)
    if type_ == "linear":
        factor = read_number(scaling, "factor")
        return RopeConfig(theta=theta, type="linear", factor=factor, fraction=fraction)
    if type_ == "llama3":
        return RopeConfig(
            theta=theta,
            type="llama3",
            fraction=fraction,
            factor=read_number(scaling, "factor"),
            low_frequency_factor=read_number(scaling, "low_freq_factor"),
            high_frequency_factor=read_number(scaling, "high_freq_factor"),
            original_context=read_count(scaling, "original_max_position_embeddings"),
        )
    if type_ == "yarn":
        return _read_yarn(config, scaling, theta=theta, fraction=fraction)
    raise UnsupportedModel(f"rope scaling of type {type_!r}; supported are {', '.join(ROPE_TYPES)}")


def stretched(config: Mapping[str, Any]) -> float:
    """What latent attention's scores are multiplied by for a context that was stretched."""
    scaling = _scaling(config)
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        return 1.0
    if not scaling.get("mscale_all_dim"):
        return 1.0
    factor = read_number(scaling, "factor", default=1.0)
    return _length(factor, read_number(scaling, "mscale_all_dim")) ** 2


def _read_yarn(
    config: Mapping[str, Any], scaling: Mapping[str, Any], *, theta: float, fraction: float
) -> RopeConfig:
    original = read_count(scaling, "original_max_position_embeddings")
    context = read_count(config, "max_position_embeddings")
    factor = read_number(scaling, "factor", default=context / original)
    # Section 3.4 of the paper; DeepSeek moves a part of it to the scale of attention.
    length = _length(factor, 1.0)
    if scaling.get("attention_factor") is not None:
        length = read_number(scaling, "attention_factor")
    elif scaling.get("mscale") and scaling.get("mscale_all_dim"):
        length = _length(factor, read_number(scaling, "mscale")) / _length(
            factor, read_number(scaling, "mscale_all_dim")
        )
    return RopeConfig(
        theta=theta,
        type="yarn",
        fraction=fraction,
        factor=factor,
        low_frequency_factor=read_number(scaling, "beta_slow", default=1.0),
        high_frequency_factor=read_number(scaling, "beta_fast", default=32.0),
        original_context=original,
        whole_pairs=bool(scaling.get("truncate", True)),
        length=length,
    )


def _length(factor: float, share: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0


def _scaling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers 5 keeps theta and scaling together in rope_parameters.
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(scaling, dict) and isinstance(scaling.get("full_attention"), dict):
        scaling = scaling["full_attention"]
    if not isinstance(scaling, dict):
        raise CorruptCheckpoint(f"config.json: rope_scaling must be a table, but is {scaling!r}")
    return scaling


def read_count(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    """A positive integer.

    Raises:
        CorruptCheckpoint: it is something else, or missing without a default.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CorruptCheckpoint(f"config.json: {key} must be a positive integer, but is {value!r}")
    return value


def read_number(config: Mapping[str, Any], key: str, *, default: float | None = None) -> float:
    """A positive number.

    Raises:
        CorruptCheckpoint: it is something else, or missing without a default.
    """
    value: Any = config.get(key)
    value = default if value is None else value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise CorruptCheckpoint(f"config.json: {key} must be a positive number, but is {value!r}")
    return float(value)
