"""The tokens that begin, end and fill up texts, known without reading a whole tokenizer."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenspeed.core.errors import CorruptCheckpoint
from tokenspeed.loader.files import JSON_SIZE_BYTES_MAX, read_json_object

__all__ = ["SPECIAL_NAMES", "SpecialTokens", "special_texts", "tokenizer_file"]

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
"""What tokenizer_config.json calls them."""
_ADDED = '"added_tokens"'


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Ids of a model's special tokens.

    Attributes:
        bos: begins a text; None if the model has no such token.
        eos: any of these ends a text.
        pad: fills up a batch; None if the model has no such token.
    """

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None

    @classmethod
    def find(cls, tokenizer_dir: Path, token_to_id: Callable[[str], int | None]) -> "SpecialTokens":
        """Look them up by their texts, and where there are none in the model's configuration.

        Args:
            tokenizer_dir: a folder as `Tokenizer` takes it.
            token_to_id: the vocabulary's id of a text; None for a text that it lacks.

        Raises:
            CorruptCheckpoint: a file is damaged.
        """
        special = special_texts(_optional(tokenizer_dir / "tokenizer_config.json"))
        generation = _optional(tokenizer_dir / "generation_config.json")
        model = _optional(tokenizer_dir / "config.json")

        def single(name: str) -> int | None:
            text = special.get(f"{name}_token")
            if text is not None and (token := token_to_id(text)) is not None:
                return token
            for config in (generation, model):
                value = config.get(f"{name}_token_id")
                if type(value) is int:
                    return value
            return None

        ends: list[Any] = []
        for config in (generation, model):
            value = config.get("eos_token_id")
            ends += value if isinstance(value, list) else [value]
        if "eos_token" in special:
            ends.append(token_to_id(special["eos_token"]))
        eos = tuple(dict.fromkeys(item for item in ends if type(item) is int))
        return cls(bos=single("bos"), eos=eos, pad=single("pad"))

    @classmethod
    def read(cls, tokenizer_dir: Path) -> "SpecialTokens | None":
        """Find them among the tokens that were added to the vocabulary, which is a tenth of a
        percent of tokenizer.json; None where one of them is not there.

        Raises:
            CorruptCheckpoint: a file is missing or damaged.
        """
        added = _added_tokens(tokenizer_file(tokenizer_dir))
        special = special_texts(_optional(tokenizer_dir / "tokenizer_config.json"))
        if any(text not in added for name, text in special.items() if name != "unk_token"):
            return None
        return cls.find(tokenizer_dir, added.get)


def special_texts(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of special tokens, by the names in `SPECIAL_NAMES`, those that there are."""
    return {name: text for name in SPECIAL_NAMES if (text := _text(tokenizer_config.get(name)))}


def tokenizer_file(tokenizer_dir: Path) -> Path:
    """The path of tokenizer.json.

    Raises:
        CorruptCheckpoint: it is missing, or too large.
    """
    path = tokenizer_dir / "tokenizer.json"
    if not path.is_file():
        raise CorruptCheckpoint(f"{tokenizer_dir} has no {path.name}")
    if path.stat().st_size > JSON_SIZE_BYTES_MAX:
        raise CorruptCheckpoint(f"{path} is too large to be what its name says")
    return path


def _added_tokens(path: Path) -> dict[str, int]:
    """Ids of added tokens by text; none where the file does not begin with them as usual.

    The library that reads the whole file looks a text up among these first.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    at = text.find(_ADDED)
    start = text.find("[", at)
    if at < 0 or text[at + len(_ADDED) : start].strip() != ":":
        return {}
    try:
        entries, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return {}
    tokens = (entry for entry in entries if isinstance(entry, dict))
    return {
        entry["content"]: entry["id"]
        for entry in tokens
        if type(entry.get("content")) is str and type(entry.get("id")) is int
    }


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _text(token: Any) -> str | None:
    """A special token of tokenizer_config.json: a text, or an object with one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
