"""Writes tiny GGUF files: whole models of one layer, and whatever a test changes about them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
HEAD_DIM = HIDDEN // HEADS
Array = npt.NDArray[np.float32]

# Every byte has a token, as in any byte-level vocabulary; then some merges and special tokens.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN_BYTES = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTES = [chr(byte) for byte in _PRINTABLE] + [chr(0x100 + i) for i in range(len(_HIDDEN_BYTES))]
MERGES = ["h e", "l l", "he ll", "hell o"]
SPECIAL = ["<|endoftext|>", "<|im_end|>"]
TOKENS = [*BYTES, "he", "ll", "hell", "hello", *SPECIAL]


def weights(architecture: str, rng: np.random.Generator) -> dict[str, Array]:
    """Random weights of a tiny model by ggml's names, in ggml's order of rows."""
    kv = KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        at = f"blk.{layer}"
        shapes |= {
            f"{at}.attn_norm.weight": (HIDDEN,),
            f"{at}.attn_q.weight": (HIDDEN, HIDDEN),
            f"{at}.attn_k.weight": (kv, HIDDEN),
            f"{at}.attn_v.weight": (kv, HIDDEN),
            f"{at}.attn_output.weight": (HIDDEN, HIDDEN),
            f"{at}.ffn_norm.weight": (HIDDEN,),
            f"{at}.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
            f"{at}.ffn_up.weight": (FEED_FORWARD, HIDDEN),
            f"{at}.ffn_down.weight": (HIDDEN, FEED_FORWARD),
        }
        if architecture == "qwen2":
            shapes |= {
                f"{at}.attn_q.bias": (HIDDEN,),
                f"{at}.attn_k.bias": (kv,),
                f"{at}.attn_v.bias": (kv,),
            }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write(
    path: Path,
    tensors: Mapping[str, Array],
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    change: Callable[[gguf.GGUFWriter], None] | None = None,
    raw: Mapping[str, tuple[npt.NDArray[np.uint8], gguf.GGMLQuantizationType]] | None = None,
) -> Path:
    """Write a GGUF file.

    Args:
        path: where.
        tensors: float32 tensors by ggml's name.
        architecture: ggml's name of it.
        pre: name of the pre-tokenizer.
        change: adds metadata of the test's own.
        raw: tensors of blocks, as bytes [rows, bytes of a row], and their type.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - len(SPECIAL)) + [3] * len(SPECIAL))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(TOKENS.index("<|endoftext|>"))
    writer.add_eos_token_id(TOKENS.index("<|im_end|>"))
    if change is not None:
        change(writer)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    for name, (blocks, kind) in (raw or {}).items():
        writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
