"""Turns the tokenizer inside a GGUF file into a `tokenizer.json`.

Two kinds: `gpt2`, byte-level BPE with its list of merges, and `llama`, SentencePiece's BPE, which
has no merges but a score for each token: the pair whose union scores best is merged first, which
is a list of merges ordered by score.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tokenspeed.core.errors import CorruptCheckpoint, UnsupportedModel
from tokenspeed.loader.gguf_file import MERGES, GGUFFile
from tokenspeed.loader.gguf_model import special_token_ids

__all__ = ["tokenizer_config_json", "tokenizer_json"]

# Token types of a GGUF file.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPACE = "\u2581"


def tokenizer_json(gguf: GGUFFile) -> dict[str, Any]:
    """The file's `tokenizer.json`.

    Raises:
        UnsupportedModel: no tokenizer, or one of a kind that is not handled.
        CorruptCheckpoint: its parts do not fit together.
    """
    if "tokenizer.ggml.model" not in gguf.metadata:
        raise UnsupportedModel(f"{gguf.path} holds no tokenizer; give a file that does")
    kind = gguf.require("tokenizer.ggml.model", str)
    if kind not in _KINDS:
        raise UnsupportedModel(
            f"{gguf.path} has a tokenizer of the kind {kind!r}; the supported kinds are "
            f"{', '.join(_KINDS)}"
        )
    tokens = _strings(gguf, "tokenizer.ggml.tokens")
    kinds = gguf.get("tokenizer.ggml.token_type", list, [_NORMAL] * len(tokens))
    if not tokens or len(kinds) != len(tokens):
        raise CorruptCheckpoint(f"{gguf.path} has {len(tokens)} tokens, but {len(kinds)} types")
    added = [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for index, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN) and text
    ]
    # Unused entries only pad the embedding: text must never become one of them.
    vocab = {
        text: index
        for index, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != _UNUSED
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **_KINDS[kind](gguf, tokens, kinds, vocab),
    }


def tokenizer_config_json(gguf: GGUFFile) -> dict[str, Any]:
    """The file's `tokenizer_config.json`: special tokens and chat template."""
    tokens = _strings(gguf, "tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(gguf),
        "model_max_length": gguf.get(
            f"{gguf.get('general.architecture', str, '')}.context_length", int, 2**31 - 1
        ),
    }
    for name, value in special_token_ids(gguf).items():
        first = value[0] if isinstance(value, list) else value
        config[name.removesuffix("_id")] = tokens[first]
    if "tokenizer.chat_template" in gguf.metadata:
        config["chat_template"] = gguf.require("tokenizer.chat_template", str)
    return config


def _byte_level(
    gguf: GGUFFile, tokens: list[str], kinds: list[int], vocab: dict[str, int]
) -> dict[str, Any]:
    pre = gguf.get("tokenizer.ggml.pre", str, "")
    if pre not in _PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"{gguf.path} splits words as {pre!r}; the supported pre-tokenizers are "
            f"{', '.join(_PRE_TOKENIZERS)}"
        )
    merges = []
    for merge in _strings(gguf, MERGES):
        # A token never begins with a plain space, but the space between two may follow one.
        left, space, right = merge.partition(" ")
        if not space or left not in vocab or right not in vocab or left + right not in vocab:
            raise CorruptCheckpoint(f"{gguf.path} merges {merge!r}, which are not its tokens")
        merges.append([left, right])
    model = _bpe_model(vocab, merges) | {"ignore_merges": pre == "llama-bpe"}
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": _sequence(_PRE_TOKENIZERS[pre]),
        "post_processor": _bos_processor(gguf, tokens),
        "decoder": _BYTES | {"use_regex": True},
        "model": model,
    }


def _sentencepiece(
    gguf: GGUFFile, tokens: list[str], kinds: list[int], vocab: dict[str, int]
) -> dict[str, Any]:
    scores = gguf.require("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise CorruptCheckpoint(f"{gguf.path} has {len(tokens)} tokens, but {len(scores)} scores")
    ranked = []
    for index, (text, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind != _NORMAL:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[index], index, left, right))
    ranked.sort()
    prefix = gguf.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = gguf.get("tokenizer.ggml.unknown_token_id", int, 0)
    if not 0 <= unknown < len(tokens):
        raise CorruptCheckpoint(f"{gguf.path} has {len(tokens)} tokens, but {unknown} as unknown")
    model = _bpe_model(vocab, [[left, right] for _, _, left, right in ranked])
    return {
        "normalizer": _normalizers([{"type": "Prepend", "prepend": _SPACE}] * prefix + [spaces]),
        "pre_tokenizer": None,
        "post_processor": _bos_processor(gguf, tokens),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model | {"unk_token": tokens[unknown], "fuse_unk": True, "byte_fallback": True},
    }


_KINDS: Mapping[str, Callable[[GGUFFile, list[str], list[int], dict[str, int]], dict[str, Any]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def _bpe_model(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
_PRE_TOKENIZERS: Mapping[str, list[dict[str, Any]]] = {
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        _BYTES | {"use_regex": True},
    ],
    "qwen2": [
        _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"),
        _BYTES | {"use_regex": False},
    ],
    "llama-bpe": [
        _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"),
        _BYTES | {"use_regex": False},
    ],
}


def _sequence(pre_tokenizers: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": pre_tokenizers}


def _normalizers(normalizers: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": normalizers}


def _adds_bos(gguf: GGUFFile) -> bool:
    by_default = (
        gguf.get("tokenizer.ggml.model", str, "") == "llama"
        or gguf.get("tokenizer.ggml.pre", str, "") == "llama-bpe"
    )
    return gguf.get("tokenizer.ggml.add_bos_token", bool, by_default)


def _bos_processor(gguf: GGUFFile, tokens: list[str]) -> dict[str, Any] | None:
    token = special_token_ids(gguf).get("bos_token_id")
    if token is None or not _adds_bos(gguf):
        return None
    text = tokens[token]
    bos = {"SpecialToken": {"id": text, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, {"SpecialToken": {"id": text, "type_id": 1}}, second],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }


def _strings(gguf: GGUFFile, key: str) -> list[str]:
    values = gguf.require(key, list)
    if values and type(values[0]) is not str:
        raise CorruptCheckpoint(f"{key} in {gguf.path} should hold strings")
    return values
