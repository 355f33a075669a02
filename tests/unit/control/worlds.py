"""Small worlds for the scheduler's tests."""

from types import SimpleNamespace
from typing import Any

from tests.scenario.simulation import Simulation
from tokenspeed.core.config import CacheGroup, CachePolicy

__all__ = ["world"]


def world(**changes: Any) -> Simulation:
    """A roomy world with pages of 4 tokens, but for the changes; `pages` is of a full group."""
    config = {
        "groups": (CacheGroup(pages=changes.pop("pages", 64)),),
        "page_size": 4,
        "slots_max": 8,
        "step_tokens_max": 16,
        "context_max": 128,
        "overlap_depth": 0,
        "prefix_cache": True,
        "cache_policy": CachePolicy.SESSION,
        "tps_floor": None,
        "queue_timeout_us": None,
        "step_drafts_max": 0,
        "step_proposals_max": 0,
        "proposal_length_max": 0,
        "proposal_window": 0,
        "draft_memory_size_bytes": 2**29,
    }
    return Simulation(SimpleNamespace(**{**config, **changes}))
