"""Which class computes which architecture."""

import importlib
from typing import TYPE_CHECKING

from tokenspeed.core.errors import UnsupportedModel

if TYPE_CHECKING:
    from tokenspeed.modeling.head import Head
    from tokenspeed.modeling.model import Model

__all__ = ["ARCHITECTURES", "head_class", "model_class", "require_architecture"]

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

# What proposes drafts out of the states of another model.
_HEADS = {
    "LlamaForCausalLMEagle3": ("eagle3", "Eagle3"),
}

ARCHITECTURES = tuple(sorted(_MODELS))
"""Hugging Face's names of the architectures that can be run."""


def require_architecture(architecture: str) -> str:
    """The name itself.

    Raises:
        UnsupportedModel: no class computes it; names those that can be.
    """
    if architecture not in _MODELS and architecture not in _HEADS:
        raise UnsupportedModel(
            f"no model for architecture {architecture!r}; supported are {', '.join(ARCHITECTURES)}"
        )
    return architecture


def model_class(architecture: str) -> "type[Model]":
    """The class of an architecture, by Hugging Face's name of it.

    Raises:
        UnsupportedModel: no class computes it; names those that can be.
    """
    if require_architecture(architecture) in _HEADS:
        raise UnsupportedModel(
            f"{architecture} is a head that proposes drafts to another model: give that one as the "
            "model, and this as --speculate draft:PATH"
        )
    module, name = _MODELS[architecture]
    found: type[Model] = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return found


def head_class(architecture: str) -> "type[Head] | None":
    """The class of a head of drafts, by the name in its checkpoint; None for a whole model."""
    if architecture not in _HEADS:
        return None
    module, name = _HEADS[architecture]
    found: type[Head] = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return found
