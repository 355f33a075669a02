"""A model's files on disk: what they are, whether they are whole, and who may write them."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenspeed.core.errors import CorruptCheckpoint
from tokenspeed.loader.progress import Progress

__all__ = [
    "JSON_SIZE_BYTES_MAX",
    "ModelFiles",
    "file_sha256",
    "fingerprint",
    "locked",
    "read_json_object",
    "verify_sha256",
    "write_json",
]

CHUNK_SIZE_BYTES = 4 * 1024 * 1024
_SAMPLES = 64
_SAMPLE_SIZE_BYTES = 4096
_MODEL_ENDS = (".safetensors", ".json")
# A configuration or a tokenizer beyond this is no such thing.
JSON_SIZE_BYTES_MAX = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Where a model lies.

    Attributes:
        name: name to serve the model by.
        kind: "gguf" for one GGUF file, "hf" for a Hugging Face directory.
        path: the GGUF file, or the directory.
        tokenizer_dir: folder with tokenizer.json, tokenizer_config.json and config.json.
    """

    name: str
    kind: Literal["gguf", "hf"]
    path: Path
    tokenizer_dir: Path


def file_sha256(path: Path, *, progress: Progress | None = None) -> str:
    """SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    total, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_SIZE_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress.update(f"Verifying {path.name}", done, total, "bytes")
    return digest.hexdigest()


def fingerprint(files: ModelFiles) -> str:
    """What tells a model from others without reading it whole: the same on every host that has
    the same files, wherever they lie.

    It is a hash of each file's size and of samples of its bytes, so that weights which were
    trained further have another one.
    """
    paths = [files.path]
    if files.kind == "hf":
        paths = sorted(path for end in _MODEL_ENDS for path in files.path.glob(f"*{end}"))
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with path.open("rb") as file:
            for index in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_SIZE_BYTES) * index // max(1, _SAMPLES - 1))
                digest.update(file.read(_SAMPLE_SIZE_BYTES))
    return digest.hexdigest()


def verify_sha256(
    path: Path, expected: str, *, remedy: str, progress: Progress | None = None
) -> None:
    """Check a file against the hash it was published with.

    Raises:
        CorruptCheckpoint: the hashes differ; the message ends with the remedy.
    """
    found = file_sha256(path, progress=progress)
    if found != expected.lower():
        raise CorruptCheckpoint(
            f"{path} has the SHA-256 {found}, but should have {expected.lower()}: the file is "
            f"damaged or another one. {remedy}"
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that one process at a time can hold; the kernel drops it if we die."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_json_object(path: Path) -> dict[str, object]:
    """Read a JSON file that holds an object.

    Raises:
        CorruptCheckpoint: missing, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > JSON_SIZE_BYTES_MAX:
            raise CorruptCheckpoint(f"{path} is too large to be what its name says")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{path.parent} has no {path.name}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(
            f"{path} should hold a JSON object, but holds {type(value).__name__}"
        )
    return value


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader sees the whole file or none of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
