"""Owns finding, verifying and reading weights and tokenizers; never holds a model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenspeed.loader.catalogue import CatalogueModel
from tokenspeed.loader.detokenizer import IncrementalDetokenizer
from tokenspeed.loader.files import ModelFiles, fingerprint
from tokenspeed.loader.progress import Progress, RichProgress, terminal_progress
from tokenspeed.loader.sources import ListedModel, list_models, pull, resolve
from tokenspeed.loader.special_tokens import SpecialTokens
from tokenspeed.loader.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenspeed.loader.checkpoint import Checkpoint, open_checkpoint

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


def __getattr__(name: str) -> Any:
    """Import what reads weights on first use: the tokenizer side must load without torch."""
    if name in ("Checkpoint", "open_checkpoint"):
        return getattr(import_module("tokenspeed.loader.checkpoint"), name)
    raise AttributeError(f"module 'tokenspeed.loader' has no attribute {name!r}")
