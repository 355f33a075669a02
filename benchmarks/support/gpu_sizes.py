"""The model and the steps that one user is measured with, whoever runs them."""

from typing import Any, Final

__all__ = ["LLAMA_3_8B", "STEPS", "WARM_STEPS"]

LLAMA_3_8B: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 16_384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}

STEPS: Final = 64
WARM_STEPS: Final = 8
