"""What an engine tells of itself and of its requests."""

from tokenspeed.core.records import Record
from tokenspeed.core.stats import SchedulerStats

__all__ = ["EngineInfo", "EngineStats", "LiveRequest", "RequestTimes", "StepTiming"]


class EngineInfo(Record, frozen=True, kw_only=True):
    """What a client may know of the engine it talks to; constant from its start to its end.

    `tps_floor` is the floor it was asked for, `tps_alone` what one user alone gets at a context of
    some hundred tokens, as measured at the start; None where no floor is held.
    """

    model_name: str
    architecture: str
    model_type: str
    model_path: str
    tokenizer_dir: str
    quantisation: str
    dtype: str
    vocab_size: int
    context_max: int
    eos_token_ids: list[int]
    bos_token_id: int | None
    pad_token_id: int | None
    default_sampling: dict[str, float | int]
    pages: int
    page_size: int
    slots_max: int
    step_tokens_max: int
    overlap_depth: int
    weights_size_bytes: int
    kv_size_bytes: int
    tps_floor: float | None
    tps_alone: float | None


class StepTiming(Record, frozen=True, kw_only=True):
    """Where the engine's time went since its start, and how evenly tokens came.

    Attributes:
        plan_us to mixed_steps: as in `engine.ledger.StepClock`.
        intervals: intervals between two tokens of a request, counted by length: the buckets of
            `engine.ledger.INTERVAL_BOUNDS_US`, and one for all that are longer.
        intervals_us: their sum.
        floor_violations: how many were longer than the floor allows; tokens that come together
            may take as many of its intervals.
    """

    plan_us: int = 0
    launch_us: int = 0
    forward_us: int = 0
    commit_us: int = 0
    outputs_us: int = 0
    messages_us: int = 0
    decode_us: int = 0
    prefill_us: int = 0
    mixed_us: int = 0
    decode_steps: int = 0
    prefill_steps: int = 0
    mixed_steps: int = 0
    intervals: list[int]
    intervals_us: int = 0
    floor_violations: int = 0


class RequestTimes(Record, frozen=True, kw_only=True):
    """Where a request's time went in the engine, in microseconds; see `engine.ledger.Ledger`.

    Attributes:
        first_token_at_us, ended_at_us: times of the monotonic clock, which all processes of a
            machine share; None for what has not been.
    """

    constraint_us: int
    queue_us: int
    restore_us: int
    prefill_us: int
    stall_us: int
    decode_us: int
    first_token_at_us: int | None
    ended_at_us: int | None


class LiveRequest(Record, frozen=True, kw_only=True):
    """A request that has not ended.

    Attributes:
        times: where its time went so far.
        tokens: generated so far.
        drafted_tokens, accepted_tokens: guesses that steps verified for it, and those that were
            right.
        interval_us: its usual time between two tokens of late; None before there were two.
        floor_interval_us: the longest that keeps the floor; None where none is held.
    """

    request: int
    times: RequestTimes
    tokens: int
    interval_us: int | None
    floor_interval_us: int | None
    drafted_tokens: int
    accepted_tokens: int


class EngineStats(SchedulerStats, frozen=True, kw_only=True):
    """Counters of the engine: the scheduler's, and time.

    Attributes:
        uptime_s: since the engine takes requests.
        output_tokens_per_s: over the last seconds.
        timing: where its time went.
    """

    uptime_s: float
    output_tokens_per_s: float
    timing: StepTiming
