"""Recording the forward of a model on its device, whatever that is.

Legend: X slots.
"""

import logging
from collections.abc import Sequence

import torch

from tokenspeed.cache import KVPools
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.errors import KernelError
from tokenspeed.execution.buffers import PageTable
from tokenspeed.execution.captured import Capture, CapturedSteps
from tokenspeed.execution.graph import StepGraph
from tokenspeed.execution.launched import RecordedSteps
from tokenspeed.modeling import Model

__all__ = ["record_steps"]

_log = logging.getLogger(__name__)


def record_steps(
    model: Model,
    pools: KVPools,
    config: SchedulerConfig,
    *,
    tables: Sequence[PageTable],
    last_token_X: torch.Tensor,
    capture: Capture | None,
    state_layers: Sequence[int] = (),
) -> RecordedSteps | None:
    """Steps that run without Python; None where a kernel of the model's cannot be recorded.

    Args:
        model: loaded.
        pools: the KV storage that plans name pages of.
        config: the greatest sizes of a step.
        tables: of each cache group.
        last_token_X: int64, the last token of each slot.
        capture: what records launches on a GPU; None on a CPU.
        state_layers: hidden states that steps are to keep.
    """
    if capture is not None and state_layers:
        _log.warning("steps run through Python: their states are kept for a head of drafts")
        return None
    if capture is not None and model.ranks > 1:
        # Ranks that follow would exchange as many rows as there are, and not a bucket's.
        _log.warning("steps run through Python: the model is shared by %d ranks", model.ranks)
        return None
    if capture is not None:
        try:
            return CapturedSteps(
                model, pools, config, tables=tables, last_token_X=last_token_X, capture=capture
            )
        except KernelError as error:
            _log.warning("steps run through Python: %s", error)
            return None
    if last_token_X.device.type != "cpu":
        return None
    pages = [table.pages_XP for table in tables]
    return StepGraph.record(
        model,
        pools,
        config,
        tables=pages,
        last_token_X=last_token_X,
        state_layers=state_layers,
    )
