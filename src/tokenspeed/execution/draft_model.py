"""What proposes drafts, by what kind of model it is."""

from collections.abc import Sequence

import torch

from tokenspeed.core.config import SchedulerConfig
from tokenspeed.execution.buffers import PageTable
from tokenspeed.execution.captured import Capture
from tokenspeed.execution.draft_head import HeadDrafts
from tokenspeed.execution.draft_passes import Drafting
from tokenspeed.execution.draft_window import WindowDrafts

__all__ = ["DraftModel", "draft_model_of"]

DraftModel = HeadDrafts | WindowDrafts


def draft_model_of(
    drafting: Drafting | None,
    config: SchedulerConfig,
    *,
    vocabulary: int,
    tables: Sequence[PageTable],
    device: torch.device,
    capture: Capture | None,
) -> DraftModel | None:
    """A draft model beside a target; None where there is none.

    Args:
        drafting: what was loaded.
        config: of the target's steps.
        vocabulary: tokens that the target has logits of.
        tables: the target's page tables.
        device: where both run.
        capture: what records launches on a GPU; None on a CPU.
    """
    if drafting is None:
        return None
    if drafting.groups:
        return HeadDrafts(
            drafting,
            config,
            vocabulary=vocabulary,
            tables=tables,
            device=device,
            capture=capture,
        )
    return WindowDrafts(drafting, config, vocabulary=vocabulary, device=device, capture=capture)
