"""Tiny random checkpoints, written by `transformers` itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tokenspeed.kernels import KernelSelector
from tokenspeed.kernels.verify.case import named
from tokenspeed.modeling import Model, ModelConfig, build_model

__all__ = ["CONFIGS", "Tiny", "build", "write_tiny"]

_LATENT = {
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "kv_lora_rank": 32,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}

_SIZES = {
    "vocab_size": 199,
    "hidden_size": 72,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
}

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_SIZES, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama-bias": LlamaConfig(
        **_SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "llama-mha": LlamaConfig(**{**_SIZES, "num_key_value_heads": 6}, tie_word_embeddings=True),
    "llama-linear": LlamaConfig(
        **_SIZES, rope_scaling={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
    "llama-yarn": LlamaConfig(
        **_SIZES,
        rope_scaling={
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 8.0,
            "beta_fast": 6.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-llama3": LlamaConfig(
        **_SIZES,
        rope_scaling={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": Qwen2Config(
        **{**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 1},
        tie_word_embeddings=False,
    ),
    "qwen2-tied": Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**_SIZES, sliding_window=None),
    "qwen3": Qwen3Config(**_SIZES, tie_word_embeddings=True),
    "qwen3-bias": Qwen3Config(**_SIZES, attention_bias=True, tie_word_embeddings=False),
    "qwen3-moe": Qwen3MoeConfig(
        **{**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2},
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "gemma3": Gemma3TextConfig(
        **{**_SIZES, "num_hidden_layers": 4},
        layer_types=[
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
        ],
        sliding_window=9,
        query_pre_attn_scalar=20,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        },
    ),
    "mistral-window": MistralConfig(**_SIZES, sliding_window=7),
    "glm4-moe": Glm4MoeConfig(
        **{**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2},
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        moe_intermediate_size=24,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.7,
        first_k_dense_replace=1,
        attention_bias=True,
        use_qk_norm=True,
        partial_rotary_factor=0.5,
    ),
    "gpt-oss": GptOssConfig(
        **{
            **_SIZES,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "hidden_size": 96,
            "intermediate_size": 64,
            "initializer_range": 0.2,
        },
        num_local_experts=6,
        num_experts_per_tok=3,
        sliding_window=9,
        swiglu_limit=1.5,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 8.0,
            "beta_fast": 6.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    ),
    # Latents of sizes for which there is no native attention.
    "deepseek-v2-lite": DeepseekV2Config(
        **{
            **_SIZES,
            **_LATENT,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 8,
            "kv_lora_rank": 40,
        },
        q_lora_rank=None,
        n_routed_experts=6,
        num_experts_per_tok=3,
        n_shared_experts=2,
        # Groups that this method does not look at.
        topk_method="greedy",
        n_group=2,
        topk_group=1,
        norm_topk_prob=False,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 8.0,
            "beta_fast": 4.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 64,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    ),
    "deepseek-v2": DeepseekV2Config(
        **{**_SIZES, **_LATENT, "num_attention_heads": 4, "num_key_value_heads": 4},
        q_lora_rank=28,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
    ),
    "deepseek-v3": DeepseekV3Config(
        **{**_SIZES, **_LATENT, "num_attention_heads": 4, "num_key_value_heads": 4},
        q_lora_rank=28,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        attention_bias=True,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "beta_fast": 4.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        },
    ),
    "deepseek-v3-apart": DeepseekV3Config(
        **{**_SIZES, **_LATENT, "num_attention_heads": 4, "num_key_value_heads": 4},
        q_lora_rank=None,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        rope_interleave=False,
    ),
    "qwen3-moe-unnormed": Qwen3MoeConfig(
        **_SIZES, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24
    ),
}
"""Configurations by name; between them every option the models know."""


@dataclass(frozen=True)
class Tiny:
    """A checkpoint on disk and the model that wrote it."""

    path: Path
    theirs: Any


def write_tiny(name: str, path: Path, *, seed: int = 0) -> Tiny:
    """Write a checkpoint of random weights, biases and norms included."""
    torch.manual_seed(seed)
    theirs = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if value.dim() == 1 or "bias" in key:
                value.copy_(torch.randn_like(value) * 0.2 + (0.0 if "bias" in key else 1.0))
        for key, value in theirs.named_buffers():
            if "correction_bias" in key:
                value.copy_(torch.randn_like(value) * 0.2)
    theirs.save_pretrained(path)
    return Tiny(path=path, theirs=theirs)


def build(
    hf_config: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    overrides: dict[str, str] | None = None,
    native_formats: bool = False,
) -> Model:
    """A model on the CPU, with its weights yet to load.

    Args:
        hf_config: of the checkpoint.
        dtype: element type of weights, activations and KV.
        overrides: solutions forced, by op.
        native_formats: weights and KV may have those that only native kernels read.
    """
    device, name = torch.device("cpu"), named(dtype)
    kernels = KernelSelector(
        device=device,
        dtype=dtype,
        overrides=overrides,
        weight_formats=(f"{name}_panels", name) if native_formats else None,
        kv_formats=(f"interleaved_{name}", name) if native_formats else None,
    )
    return build_model(ModelConfig.from_hf(hf_config), dtype=dtype, device=device, kernels=kernels)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint of one file."""
    return load_file(path / "model.safetensors")
