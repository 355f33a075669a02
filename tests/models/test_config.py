"""What a `config.json` may say, and what is refused with a reason."""

from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.models.tiny import CONFIGS
from tokenspeed.core.errors import ConfigError, CorruptCheckpoint, UnsupportedModel
from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling import ARCHITECTURES, ModelConfig, RopeConfig, build_model, model_class
from tokenspeed.modeling.layers import RotaryEmbedding

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
}

LATENT: dict[str, Any] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
"""What latent attention takes beside; others ignore it."""


def test_a_configuration_of_transformers_4_is_read() -> None:
    config = ModelConfig.from_hf({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.head_dim == 8
    assert config.rope == RopeConfig(theta=5000.0, type="linear", factor=2.0)
    assert not config.tie_embeddings


def test_a_configuration_of_transformers_5_is_read() -> None:
    changed = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    changed["rope_parameters"] = {"rope_theta": 7000.0, "rope_type": "default"}
    assert ModelConfig.from_hf(changed).rope == RopeConfig(theta=7000.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedModel, "Qwen2ForCausalLM"),
        ({"architectures": []}, CorruptCheckpoint, "names no architecture"),
        ({"architectures": None}, CorruptCheckpoint, "names no architecture"),
        ({"hidden_act": "gelu"}, UnsupportedModel, "silu is supported"),
        ({"use_sliding_window": True}, UnsupportedModel, "full attention"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            UnsupportedModel,
            "default, linear, llama3, yarn",
        ),
        ({"rope_scaling": "linear"}, CorruptCheckpoint, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, CorruptCheckpoint, "factor"),
        ({"hidden_size": None}, CorruptCheckpoint, "hidden_size"),
        ({"hidden_size": "32"}, CorruptCheckpoint, "hidden_size"),
        ({"num_hidden_layers": 0}, CorruptCheckpoint, "num_hidden_layers"),
        ({"num_attention_heads": True}, CorruptCheckpoint, "num_attention_heads"),
        ({"num_key_value_heads": 3}, CorruptCheckpoint, "multiple"),
        ({"head_dim": 7}, CorruptCheckpoint, "odd head_dim"),
        ({"rms_norm_eps": float("nan")}, CorruptCheckpoint, "rms_norm_eps"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_its_name(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ModelConfig.from_hf({**LLAMA, **change})


def test_every_architecture_has_its_class() -> None:
    assert list(ARCHITECTURES) == sorted(ARCHITECTURES)
    assert {"LlamaForCausalLM": "Llama", "MistralForCausalLM": "Llama"}.items() <= {
        name: model_class(name).__name__ for name in ARCHITECTURES
    }.items()
    with pytest.raises(UnsupportedModel, match=r"supported are .*LlamaForCausalLM"):
        model_class("MambaForCausalLM")


@pytest.mark.parametrize("name", ["llama", "llama-linear", "llama-llama3", "llama-yarn"])
def test_frequencies_equal_those_of_transformers(name: str) -> None:
    theirs = CONFIGS[name]
    config = ModelConfig.from_hf({**theirs.to_dict(), "architectures": ["LlamaForCausalLM"]})
    rope = config.rope
    kernels = KernelSelector(device=torch.device("cpu"), dtype=torch.float32)
    rotary = RotaryEmbedding(rope, head_dim=theirs.head_dim, kernels=kernels)
    angles = rotary(torch.arange(300))
    if rope.type == "default":
        exponents = torch.arange(0, theirs.head_dim, 2).float() / theirs.head_dim
        frequencies, length = rope.theta**-exponents, 1.0
    else:
        frequencies, length = ROPE_INIT_FUNCTIONS[rope.type](theirs, torch.device("cpu"))
    expected = torch.arange(300)[:, None] * frequencies
    torch.testing.assert_close(angles.cos_TE, expected.cos(), atol=2e-5, rtol=0)
    torch.testing.assert_close(angles.sin_TE, expected.sin(), atol=2e-5, rtol=0)
    # Where whole heads are rotated the length of both is in the scale of their products.
    scale = config.attention_scale or theirs.head_dim**-0.5
    assert scale == pytest.approx(theirs.head_dim**-0.5 * length**2)


def test_a_model_on_the_meta_device_knows_its_sizes_without_memory() -> None:
    config = ModelConfig.from_hf(LLAMA)
    kernels = KernelSelector(device=torch.device("cpu"), dtype=torch.bfloat16)
    model = build_model(config, dtype=torch.bfloat16, device=torch.device("meta"), kernels=kernels)
    assert {weight.data.device.type for _, weight in model.weights()} == {"meta"}
    layer = 2 * 32 + 32 * (4 + 2 * 2) * 8 + 4 * 8 * 32 + 3 * 32 * 48
    assert model.weights_size_bytes == 2 * (2 * 100 * 32 + 2 * layer + 32)
    (spec,) = model.kv_specs()
    assert (spec.layers, spec.kv_heads, spec.head_dim, spec.dtype) == (2, 2, 8, "bfloat16")
    assert spec.token_size_bytes == 2 * 2 * 2 * 8 * 2


def test_a_selector_for_another_type_is_refused() -> None:
    kernels = KernelSelector(device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ConfigError, match="float32"):
        build_model(
            ModelConfig.from_hf(LLAMA),
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            kernels=kernels,
        )
