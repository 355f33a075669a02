"""What a GGUF file says of its model, in the words of a Hugging Face `config.json`."""

import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

from tokenspeed.core.errors import CorruptCheckpoint, UnsupportedModel
from tokenspeed.loader.gguf_file import GGUFFile

__all__ = ["ROPE_FACTORS", "hf_config", "hf_name", "special_token_ids"]

ROPE_FACTORS = "rope_freqs.weight"

# How Llama 3.1 and later stretch low frequencies; only the factor differs between models.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192

# Of Gemma 3, what its files do not hold: every sixth layer sees everything, and the others have
# wavelengths of their own.
_GEMMA3_PATTERN, _GEMMA3_LOCAL_THETA, _GEMMA3_LARGEST_LAYERS = 6, 10_000.0, 62

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
# What an architecture has beside these, or calls otherwise.
_OWN_NAMES: Mapping[str, Mapping[str, str]] = {
    "qwen3": _HEAD_NORMS,
    "gemma3": {
        **_HEAD_NORMS,
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
_LAYER_TENSOR = re.compile(r"blk\.(\d{1,5})\.([a-z_]+)\.(weight|bias)")

# Tokens that end a turn or a text, by name: a GGUF file names one of them, a model may use more.
_END_TOKENS = frozenset(
    ("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")
)
_CONTROL = 3


def hf_name(name: str, architecture: str = "llama") -> str | None:
    """Hugging Face's name of a tensor that ggml calls `name`; None if it has none."""
    layer_names = _LAYER_NAMES | dict(_OWN_NAMES.get(architecture, {}))
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in layer_names:
        return None
    return f"model.layers.{int(match[1])}.{layer_names[match[2]]}.{match[3]}"


def hf_config(gguf: GGUFFile) -> dict[str, Any]:
    """The file's `config.json`.

    Raises:
        UnsupportedModel: an architecture, or a trait of one, that is not handled.
        CorruptCheckpoint: metadata is missing, or of the wrong type.
    """
    architecture = gguf.require("general.architecture", str)
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModel(
            f"{gguf.path} has the architecture {architecture!r}; the supported architectures of "
            f"GGUF files are {', '.join(_ARCHITECTURES)}"
        )
    return _common(gguf, architecture) | _ARCHITECTURES[architecture](gguf)


def special_token_ids(gguf: GGUFFile) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` (one or a list) and `pad_token_id`, those that there are."""
    ids: dict[str, Any] = {}
    for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if (token := _token_id(gguf, key)) is not None:
            ids[name] = token
    ends = [token for key in ("eos", "eot", "eom") if (token := _token_id(gguf, key)) is not None]
    tokens = gguf.get("tokenizer.ggml.tokens", list, [])
    kinds = gguf.get("tokenizer.ggml.token_type", list, [])
    named = (
        index
        for index, (text, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == _CONTROL and text in _END_TOKENS
    )
    ends = list(dict.fromkeys([*ends, *named]))
    if ends:
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return ids


def _token_id(gguf: GGUFFile, key: str) -> int | None:
    name = f"tokenizer.ggml.{key}_token_id"
    if name not in gguf.metadata:
        return None
    token = gguf.require(name, int)
    # Some converters write 2^32 - 1 where a model has no such token.
    return token if token < len(gguf.get("tokenizer.ggml.tokens", list, [])) else None


def _common(gguf: GGUFFile, architecture: str) -> dict[str, Any]:
    def count(key: str) -> int:
        value = gguf.require(f"{architecture}.{key}", int)
        if not 1 <= value < 2**31:
            raise CorruptCheckpoint(f"{architecture}.{key} in {gguf.path} cannot be {value}")
        return value

    if gguf.get(f"{architecture}.expert_count", int, 0):
        raise UnsupportedModel(f"{gguf.path} is a mixture of experts, which no loader handles yet")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CorruptCheckpoint(f"{gguf.path} has no matrix token_embd.weight")
    hidden_size, heads = count("embedding_length"), count("attention.head_count")
    key_value_heads = f"{architecture}.attention.head_count_kv"
    head_dim = gguf.get(f"{architecture}.attention.key_length", int, hidden_size // heads)
    rotated = gguf.get(f"{architecture}.rope.dimension_count", int, head_dim)
    if rotated != head_dim:
        raise UnsupportedModel(
            f"{gguf.path} rotates {rotated} of the {head_dim} dimensions of a head; only whole "
            "heads are handled"
        )
    theta = _shortest(gguf.get(f"{architecture}.rope.freq_base", float, 10_000.0))
    config: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": count("feed_forward_length"),
        "num_hidden_layers": count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": (
            count("attention.head_count_kv") if key_value_heads in gguf.metadata else heads
        ),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": count("context_length"),
        "rms_norm_eps": _shortest(
            gguf.require(f"{architecture}.attention.layer_norm_rms_epsilon", float)
        ),
        "rope_theta": theta,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }
    scaling = _rope_scaling(gguf, architecture, head_dim, theta)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config | special_token_ids(gguf)


def _llama(gguf: GGUFFile) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
    }


def _qwen2(_: GGUFFile) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
    }


def _qwen3(_: GGUFFile) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "use_sliding_window": False,
    }


def _gemma3(gguf: GGUFFile) -> dict[str, Any]:
    heads = gguf.require("gemma3.attention.head_count", int)
    head_dim = gguf.require("gemma3.attention.key_length", int)
    # The largest model alone scales by another number than its heads' size, and files do not say.
    largest = gguf.require("gemma3.block_count", int) == _GEMMA3_LARGEST_LAYERS
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": (
            gguf.require("gemma3.embedding_length", int) // heads if largest else head_dim
        ),
        "sliding_window": gguf.require("gemma3.attention.sliding_window", int),
        "sliding_window_pattern": _GEMMA3_PATTERN,
        "rope_local_base_freq": _GEMMA3_LOCAL_THETA,
    }


_ARCHITECTURES: Mapping[str, Callable[[GGUFFile], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
}


def _rope_scaling(
    gguf: GGUFFile, architecture: str, head_dim: int, theta: float
) -> dict[str, Any] | None:
    if ROPE_FACTORS in gguf.tensors:
        return _llama3_scaling(gguf, head_dim, theta)
    kind = gguf.get(f"{architecture}.rope.scaling.type", str, "none")
    factor = gguf.get(f"{architecture}.rope.scaling.factor", float, 0.0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind != "linear":
        raise UnsupportedModel(
            f"{gguf.path} scales rotary frequencies by {kind!r}; "
            "none, linear and llama3 are handled"
        )
    return {"rope_type": "linear", "factor": factor}


def _llama3_scaling(gguf: GGUFFile, head_dim: int, theta: float) -> dict[str, Any]:
    """The parameters behind a tensor of divisors, one per frequency.

    The file holds only what came of Llama 3.1's rule; its factor is the largest divisor. The rule
    is computed again and held against the tensor, so another rule cannot pass for it.
    """
    tensor = gguf.tensors[ROPE_FACTORS]
    if tensor.quant.name != "F32" or tensor.shape != (head_dim // 2,):
        raise CorruptCheckpoint(
            f"{ROPE_FACTORS} of {gguf.path} should be F32 of {head_dim // 2} elements, but is "
            f"{tensor.quant.name} of shape {tensor.shape}"
        )
    with gguf.path.open("rb") as file:
        file.seek(tensor.offset)
        found = struct.unpack(f"<{tensor.elements}f", file.read(tensor.size_bytes))
    factor = max(found)
    for index, divisor in enumerate(found):
        expected = _llama3_divisor(theta ** (-2 * index / head_dim), factor)
        if not abs(divisor - expected) <= 1e-3 * expected:
            raise UnsupportedModel(
                f"{ROPE_FACTORS} of {gguf.path} follows another rule than Llama 3.1's: frequency "
                f"{index} is divided by {divisor}, not {expected:.4f}"
            )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }


def _llama3_divisor(frequency: float, factor: float) -> float:
    wavelength = 2 * 3.141592653589793 / frequency
    if wavelength < _LLAMA3_CONTEXT / _LLAMA3_HIGH:
        return 1.0
    if wavelength > _LLAMA3_CONTEXT / _LLAMA3_LOW:
        return factor
    smooth = (_LLAMA3_CONTEXT / wavelength - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    return 1 / ((1 - smooth) / factor + smooth)


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06."""
    single = struct.pack("<f", value)
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == single:
            return short
    return value
