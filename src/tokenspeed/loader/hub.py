"""Fetches models from a Hugging Face hub: configuration, tokenizer and weights, never code."""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenspeed.core.errors import ModelNotFound
from tokenspeed.loader.progress import Progress

__all__ = ["HubId", "fetch_snapshot", "parse_hub_id"]

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_HUB_ID = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(@(?P<revision>[A-Za-z0-9._-]+))?(/(?P<file>[A-Za-z0-9._/-]+\.gguf))?"
)
# Pickled weights and Python files are not on the list, so they are never even downloaded.
_PATTERNS = ["*.json", "*.jinja", "*.safetensors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubId:
    """What `org/name[@revision][/file.gguf]` names."""

    repo: str
    revision: str | None
    file: str | None

    @property
    def name(self) -> str:
        """Name to serve the model by."""
        return self.repo if self.file is None else f"{self.repo}/{self.file}"


def parse_hub_id(text: str) -> HubId | None:
    """Read a hub id; None if the text is not one."""
    match = _HUB_ID.fullmatch(text)
    if match is None or ".." in text:
        return None
    return HubId(repo=match["repo"], revision=match["revision"], file=match["file"])


def fetch_snapshot(
    hub_id: HubId,
    *,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Download what a model needs, and return the folder, or the file if the id names one.

    Args:
        hub_id: what to fetch.
        cache_dir: folder for snapshots; None for the one all Hugging Face tools share.
        endpoint: the hub's URL; None for the user's own setting.
        force: download even what the cache has.
        progress: told of files and bytes.

    Raises:
        ModelNotFound: no such model or revision, no access, or no connection and no copy.
    """
    # The library is slow to import, and mostly not needed.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    try:
        folder = snapshot_download(
            hub_id.repo,
            revision=hub_id.revision,
            cache_dir=cache_dir,
            endpoint=endpoint,
            force_download=force,
            allow_patterns=_PATTERNS if hub_id.file is None else [hub_id.file],
            # Sub-folders hold other formats of the same weights.
            ignore_patterns=["*/*"] if hub_id.file is None else None,
            tqdm_class=_bar_class(f"Downloading {hub_id.name}", progress),
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelNotFound(
            f"cannot download {hub_id.name} from the hub: {' '.join(str(error).split())}"
        ) from error
    path = Path(folder) if hub_id.file is None else Path(folder) / hub_id.file
    if not path.exists():
        raise ModelNotFound(f"{hub_id.repo} on the hub has no {hub_id.file}")
    return path


def _bar_class(stage: str, progress: Progress | None) -> type[Any]:
    """A bar as the hub's library wants one, which draws nothing and tells `progress`."""
    from huggingface_hub.utils import tqdm  # noqa: PLC0415

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **options | {"disable": False, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> Any:
            shown = super().update(n)
            if progress is not None:
                in_bytes = self.unit == "B"
                # One bar counts bytes, another files: a stage has one unit.
                words = stage if in_bytes else f"{stage} (files)"
                total = int(self.total) if self.total else None
                progress.update(words, int(self.n), total, "bytes" if in_bytes else "files")
            return shown

    return Bar
