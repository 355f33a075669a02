"""The models known by name, and the manifests that describe such models."""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from tokenspeed.core.errors import ModelNotFound

__all__ = ["CatalogueModel", "catalogue", "read_manifest"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]|\{part\})*")
_VERSION = re.compile(r"[A-Za-z0-9.!+_-]+")
_PARTS_MAX = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueModel:
    """A model that Python packages carry, whole or in parts.

    Attributes:
        name: what users call it.
        description: one line about it.
        licence: the weights' licence.
        file: name of the joined GGUF file.
        size_bytes: of the joined file.
        sha256: of the joined file, in hexadecimal.
        package: package name; `{part}` stands for 1 to `parts`.
        parts: how many packages.
        version: the packages' version.
        member: glob of the wanted files inside each package.
    """

    name: str
    description: str = ""
    licence: str = ""
    file: str
    size_bytes: int
    sha256: str
    package: str
    parts: int = 1
    version: str
    member: str

    @property
    def requirements(self) -> tuple[str, ...]:
        """`NAME==VERSION` of each package, in the order of the parts."""
        return tuple(
            f"{self.package.replace('{part}', str(part))}=={self.version}"
            for part in range(1, self.parts + 1)
        )


@cache
def catalogue() -> dict[str, CatalogueModel]:
    """The models that ship with the package, by name."""
    text = resources.files("tokenspeed.loader").joinpath("catalogue.toml").read_text("utf-8")
    models = [_model(table, "the catalogue") for table in tomllib.loads(text)["model"]]
    return {model.name: model for model in models}


def read_manifest(path: Path) -> CatalogueModel:
    """Read a user's manifest: a TOML file with the fields of one catalogue entry.

    Raises:
        ModelNotFound: no such file, or not a manifest.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelNotFound(f"cannot read the manifest {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelNotFound(f"{path} is not TOML: {error}") from error
    return _model(table, str(path))


def _model(table: dict[str, Any], where: str) -> CatalogueModel:
    fields: dict[str, Any] = dict(CatalogueModel.__annotations__)
    optional = {"description", "licence", "parts"}
    missing = [name for name in fields if name not in table and name not in optional]
    unknown = [name for name in table if name not in fields]
    if missing or unknown:
        raise ModelNotFound(
            f"{where} is not a manifest: missing {', '.join(missing) or 'nothing'}, unknown "
            f"{', '.join(unknown) or 'nothing'}; a manifest has the fields {', '.join(fields)}"
        )
    for name, value in table.items():
        if type(value) is not fields[name]:
            raise ModelNotFound(
                f"{name} in {where} should be {fields[name].__name__}, but is {value!r}"
            )
    model = CatalogueModel(**table)
    checks = {
        "name": _NAME.fullmatch(model.name),
        "file": _NAME.fullmatch(model.file),
        "package": _PACKAGE.fullmatch(model.package),
        "version": _VERSION.fullmatch(model.version),
        "sha256": re.fullmatch(r"[0-9a-fA-F]{64}", model.sha256),
        "size_bytes": model.size_bytes > 0,
        "parts": 1 <= model.parts <= _PARTS_MAX and (model.parts == 1 or "{part}" in model.package),
    }
    for name, fine in checks.items():
        if not fine:
            raise ModelNotFound(f"{name} in {where} cannot be {getattr(model, name)!r}")
    return model
