"""The C++ control plane as nanobind exposes it; `tokenspeed.control` is its typed face."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

class SuffixAutomaton:
    def __init__(self) -> None: ...
    def append(self, token: int) -> None: ...
    def longest(self) -> tuple[int, int]: ...
    def after(self, index: int) -> int: ...
    def size_bytes(self) -> int: ...
    def size_bytes_after(self, more: int) -> int: ...

def draft_lengths(
    *,
    chances: list[list[float]],
    rows: int,
    step_us: float,
    token_us: float,
    limit_us: float | None,
    most: int,
) -> list[int]: ...

class Scheduler:
    def __init__(
        self,
        *,
        groups: list[tuple[int, int, int, int, int]],
        page_size: int,
        slots_max: int,
        step_tokens_max: int,
        context_max: int,
        overlap_depth: int,
        prefix_cache: bool,
        cache_policy: int,
        tps_floor: float | None,
        queue_timeout_us: int | None,
        step_drafts_max: int,
        step_proposals_max: int,
        proposal_length_max: int,
        proposal_window: int,
        draft_memory_size_bytes: int,
    ) -> None: ...
    def submit(
        self,
        request: int,
        prompt: npt.NDArray[np.int32],
        max_new_tokens: int,
        min_new_tokens: int,
        stop_token_ids: npt.NDArray[np.int32],
        salt: int,
        priority: int,
        handover: int,
        tenant: int,
    ) -> None: ...
    def abort(self, request: int) -> None: ...
    def transferred(self, transfer: int, complete: bool) -> None: ...
    def plan(
        self, now_us: int
    ) -> (
        tuple[
            int,
            int,
            int,
            int,
            int,
            int,
            int,
            int,
            bytearray,
            bytearray,
            list[tuple[int, tuple[int, int, int, int, int, int, int], bytearray]],
        ]
        | None
    ): ...
    def commit(
        self,
        step: int,
        tokens: npt.NDArray[np.int32],
        now_us: int,
        proposed_starts: npt.NDArray[np.int32] = ...,
        proposed_tokens: npt.NDArray[np.int32] = ...,
        proposed_chances: npt.NDArray[np.float32] = ...,
        caught_up_tokens: int = ...,
        cuts: Sequence[tuple[int, int]] = ...,
    ) -> None: ...
    def take_outcome(
        self,
    ) -> tuple[int, int, int, bytearray, bytearray]: ...
    def tokens(self, request: int) -> npt.NDArray[np.int32]: ...
    def stats(
        self,
    ) -> tuple[int, ...]: ...
    def observe(
        self,
        *,
        prefill_tokens: int,
        decode_rows: int,
        draft_tokens: int,
        proposed_tokens: int,
        proposal_rounds: int,
        caught_up_tokens: int,
        context_tokens: int,
        prefill_pairs: float,
        took_us: int,
    ) -> None: ...
    def predict_us(
        self,
        *,
        prefill_tokens: int,
        decode_rows: int,
        draft_tokens: int,
        proposed_tokens: int,
        proposal_rounds: int,
        caught_up_tokens: int,
        context_tokens: int,
        prefill_pairs: float,
    ) -> float: ...
    def interval_bound_us(self, context: int) -> float | None: ...
    def flush_cache(self) -> bool: ...
    def record_cache_events(self, on: bool) -> None: ...
    def take_cache_events(
        self,
    ) -> tuple[int, npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.bool_]] | None: ...
    def audit(self) -> None: ...
