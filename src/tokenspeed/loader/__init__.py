"""Owns finding, verifying and reading weights and tokenizers; never holds a model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenspeed.loader.catalogue import CatalogueModel
from tokenspeed.loader.files import ModelFiles, fingerprint
from tokenspeed.loader.progress import Progress
from tokenspeed.loader.sources import ListedModel, list_models, pull, resolve
from tokenspeed.loader.special_tokens import SpecialTokens

if TYPE_CHECKING:
    from tokenspeed.loader.bars import RichProgress, terminal_progress
    from tokenspeed.loader.checkpoint import Checkpoint, open_checkpoint
    from tokenspeed.loader.detokenizer import IncrementalDetokenizer
    from tokenspeed.loader.tokenizer import Tokenizer

__all__ = [
    "CatalogueModel",
    "Checkpoint",
    "IncrementalDetokenizer",
    "ListedModel",
    "ModelFiles",
    "Progress",
    "RichProgress",
    "SpecialTokens",
    "Tokenizer",
    "fingerprint",
    "list_models",
    "open_checkpoint",
    "pull",
    "resolve",
    "terminal_progress",
]

# The tokenizer's side must load without torch, and an engine starts sooner without the libraries
# of tokenizers, templates and bars.
_HOMES = {
    "Checkpoint": "checkpoint",
    "IncrementalDetokenizer": "detokenizer",
    "RichProgress": "bars",
    "Tokenizer": "tokenizer",
    "open_checkpoint": "checkpoint",
    "terminal_progress": "bars",
}


def __getattr__(name: str) -> Any:
    """Import on first use what not everybody who loads needs."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
