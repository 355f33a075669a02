"""The tokenizer's files as one archive, for a gateway that cannot read the engine's disk."""

import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tokenspeed.core.errors import EngineError

__all__ = ["CHUNK_SIZE_BYTES", "archive_chunks"]

CHUNK_SIZE_BYTES = 64 * 1024

# A checkpoint's folder holds weights beside these; only what a tokenizer is made of travels.
_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
# The first moment a zip archive can name: the same files give the same bytes, and the same hash.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def archive_chunks(tokenizer_dir: Path) -> Iterator[tuple[bytes, str]]:
    """Pieces of a zip of the tokenizer's files, each at most `CHUNK_SIZE_BYTES`.

    Yields:
        the piece, and with the last one the SHA-256 of the whole in hexadecimal ("" before).

    Raises:
        EngineError: the folder holds no tokenizer file.
    """
    data = _archive(tokenizer_dir)
    digest = hashlib.sha256(data).hexdigest()
    for start in range(0, len(data), CHUNK_SIZE_BYTES):
        end = start + CHUNK_SIZE_BYTES
        yield data[start:end], digest if end >= len(data) else ""


def _archive(tokenizer_dir: Path) -> bytes:
    buffer = io.BytesIO()
    files = [path for name in _FILES if (path := tokenizer_dir / name).is_file()]
    if not files:
        raise EngineError(f"{tokenizer_dir} holds no tokenizer file")
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.writestr(
                zipfile.ZipInfo(path.name, _EPOCH), path.read_bytes(), zipfile.ZIP_DEFLATED
            )
    return buffer.getvalue()
