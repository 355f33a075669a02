"""Writes the tokenizer and the configuration inside a GGUF file as Hugging Face files."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from tokenspeed.loader.gguf_file import GGUFFile
from tokenspeed.loader.gguf_model import hf_config, special_token_ids
from tokenspeed.loader.gguf_tokenizer import tokenizer_config_json, tokenizer_json

__all__ = ["export_tokenizer", "exported_tokenizer"]

# Part of a folder's name: an export made by other rules is not found again.
_RULES = 1


def exported_tokenizer(path: Path, *, sha256: str | None, cache_dir: Path) -> Path:
    """The folder with a GGUF file's tokenizer.json, tokenizer_config.json, config.json and
    generation_config.json, exported on first use.

    Args:
        path: the GGUF file.
        sha256: its hash if known; else its place, size and time of change name the folder.
        cache_dir: root of the cache.

    Raises:
        CorruptCheckpoint, UnsupportedModel: as `GGUFFile.open`, `hf_config`, `tokenizer_json`.
    """
    folder = cache_dir / "tokenizers" / f"{_key(path, sha256)}-{_RULES}"
    if folder.is_dir():
        return folder
    gguf = GGUFFile.open(path)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        export_tokenizer(gguf, partial)
        _write(partial / "config.json", hf_config(gguf))
        _write(partial / "generation_config.json", special_token_ids(gguf))
        try:
            partial.rename(folder)
        except OSError:
            # Another process was first; its export is the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def export_tokenizer(gguf: GGUFFile, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Raises:
        CorruptCheckpoint, UnsupportedModel: as `tokenizer_json`.
    """
    _write(folder / "tokenizer.json", tokenizer_json(gguf))
    _write(folder / "tokenizer_config.json", tokenizer_config_json(gguf))


def _key(path: Path, sha256: str | None) -> str:
    if sha256 is not None:
        return sha256[:16].lower()
    state = path.stat()
    named = f"{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}"
    return hashlib.sha256(named.encode()).hexdigest()[:16]


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
