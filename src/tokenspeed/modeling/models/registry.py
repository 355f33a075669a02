"""Which class computes which architecture."""

import importlib
from typing import TYPE_CHECKING

from tokenspeed.core.errors import UnsupportedModel

if TYPE_CHECKING:
    from tokenspeed.modeling.model import Model

__all__ = ["ARCHITECTURES", "model_class", "require_architecture"]

# Hugging Face's name of an architecture: our module in this package, and the class in it.
# Names only, so that reading a configuration imports no model.
_MODELS = {
    "DeepseekV2ForCausalLM": ("deepseek", "DeepSeek"),
    "DeepseekV3ForCausalLM": ("deepseek", "DeepSeek"),
    "Gemma3ForCausalLM": ("gemma3", "Gemma3"),
    "Glm4MoeForCausalLM": ("glm4_moe", "Glm4Moe"),
    "GptOssForCausalLM": ("gpt_oss", "GptOss"),
    "LlamaForCausalLM": ("llama", "Llama"),
    "MistralForCausalLM": ("llama", "Llama"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3"),
    "Qwen3MoeForCausalLM": ("qwen3", "Qwen3Moe"),
}

ARCHITECTURES = tuple(sorted(_MODELS))
"""Hugging Face's names of the architectures that can be run."""


def require_architecture(architecture: str) -> str:
    """The name itself.

    Raises:
        UnsupportedModel: no class computes it; names those that can be.
    """
    if architecture not in _MODELS:
        raise UnsupportedModel(
            f"no model for architecture {architecture!r}; supported are {', '.join(ARCHITECTURES)}"
        )
    return architecture


def model_class(architecture: str) -> "type[Model]":
    """The class of an architecture, by Hugging Face's name of it.

    Raises:
        UnsupportedModel: no class computes it; names those that can be.
    """
    module, name = _MODELS[require_architecture(architecture)]
    found: type[Model] = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return found
