"""The one place that reads environment variables."""

import os
from pathlib import Path

__all__ = ["cache_dir"]


def cache_dir() -> Path:
    """The folder for downloads and exported tokenizers; it need not exist yet.

    `TOKENSPEED_CACHE_DIR` names it; else it is `tokenspeed` in `XDG_CACHE_HOME`, else in
    `~/.cache`.
    """
    own = os.environ.get("TOKENSPEED_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    root = Path(shared).expanduser() if shared else Path.home() / ".cache"
    return root / "tokenspeed"
