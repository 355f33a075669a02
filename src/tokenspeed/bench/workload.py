"""Turns a trace into the requests that a group of replicas gets: copied, shifted, dealt out."""

from dataclasses import dataclass

import numpy as np

from tokenspeed.bench.config import SimulationConfig
from tokenspeed.bench.tokens import TraceTokens, assign_tokens
from tokenspeed.bench.trace import Trace
from tokenspeed.core.errors import ConfigError
from tokenspeed.core.step import Int32Array, Int64Array

__all__ = ["GroupWorkload", "Workload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupWorkload:
    """The R requests that one router gets, by the time they are sent.

    Attributes:
        trace_index: [R] the request of the trace that each one is a copy of.
        copy: [R] which copy of the trace; also its salt.
        sent_us: [R] when it is sent; in a closed loop, only the first turns' are kept to.
        input_tokens, output_tokens, turn: [R]
        prompt_starts, output_starts: [R] places in `flat`.
        followers: the next turn of each request that has one, closed loop only.
        gap_us: [R] the tool's time before a turn, closed loop only.
        flat: [N] tokens of all requests.
    """

    trace_index: Int64Array
    copy: Int64Array
    sent_us: Int64Array
    input_tokens: Int64Array
    output_tokens: Int64Array
    turn: Int64Array
    prompt_starts: Int64Array
    output_starts: Int64Array
    followers: dict[int, int]
    gap_us: Int64Array
    flat: Int32Array

    def prompt(self, request: int) -> Int32Array:
        """[input] tokens of a request's prompt."""
        start = int(self.prompt_starts[request])
        return self.flat[start : start + int(self.input_tokens[request])]


class Workload:
    """A trace and its copies, dealt out to groups of replicas conversation by conversation.

    Raises:
        ConfigError: a closed loop over a trace that names no session.
    """

    def __init__(self, trace: Trace, config: SimulationConfig) -> None:
        if config.loop == "closed" and not trace.has_sessions:
            raise ConfigError(
                f"--loop closed needs sessions, but the trace {trace.name!r} names none; "
                "use --loop open"
            )
        self.trace = trace
        self.config = config
        self.tokens: TraceTokens = assign_tokens(trace)
        requests = trace.requests
        chains = self.tokens.chains
        self._recorded_us = np.array([entry.sent_us for entry in requests], dtype=np.int64)
        self._sent_us = np.round(self._recorded_us / config.speed).astype(np.int64)
        self._input = np.array([entry.input_tokens for entry in requests], dtype=np.int64)
        self._output = np.array([entry.output_tokens for entry in requests], dtype=np.int64)
        self._turn = np.array([entry.turn for entry in requests], dtype=np.int64)
        _, firsts = np.unique(chains, return_index=True)
        starts_us = self._sent_us[firsts]
        span_us = int(self._sent_us.max()) + 1
        rng = np.random.Generator(np.random.Philox(config.seed))
        shifts_us = rng.integers(0, span_us, config.scale)
        shifts_us[0] = 0
        # [copies, chains] when each conversation begins, and which group gets it.
        self._begin_us = (starts_us[None, :] + shifts_us[:, None]) % span_us
        rank = np.empty(self._begin_us.size, dtype=np.int64)
        rank[np.argsort(self._begin_us, axis=None, kind="stable")] = np.arange(rank.size)
        self._group = (rank % config.groups).reshape(self._begin_us.shape)
        self._starts_us = starts_us

    def group(self, group: int) -> GroupWorkload:
        """What the router of a group gets."""
        chains = self.tokens.chains
        index_parts, copy_parts, sent_parts = [], [], []
        for copy in range(self.config.scale):
            (chosen,) = np.nonzero(self._group[copy][chains] == group)
            delay_us = (self._begin_us[copy] - self._starts_us)[chains[chosen]]
            index_parts.append(chosen)
            copy_parts.append(np.full(len(chosen), copy, dtype=np.int64))
            sent_parts.append(self._sent_us[chosen] + delay_us)
        index = np.concatenate(index_parts)
        copies = np.concatenate(copy_parts)
        sent_us = np.concatenate(sent_parts)
        order = np.lexsort((index, copies, sent_us))
        index, copies, sent_us = index[order], copies[order], sent_us[order]
        followers: dict[int, int] = {}
        gap_us = np.zeros(len(index), dtype=np.int64)
        if self.config.loop == "closed":
            followers = self._follow(index, copies, gap_us)
        return GroupWorkload(
            trace_index=index,
            copy=copies,
            sent_us=sent_us,
            input_tokens=self._input[index],
            output_tokens=self._output[index],
            turn=self._turn[index],
            prompt_starts=self.tokens.prompt_starts[index],
            output_starts=self.tokens.output_starts[index],
            followers=followers,
            gap_us=gap_us,
            flat=self.tokens.flat,
        )

    def _follow(self, index: Int64Array, copy: Int64Array, gap_us: Int64Array) -> dict[int, int]:
        """Who follows whom in a session; fills in the tool's time before each follower."""
        config = self.config
        last: dict[tuple[int, int], int] = {}
        followers: dict[int, int] = {}
        for request, (entry, number) in enumerate(zip(index.tolist(), copy.tolist(), strict=True)):
            key = (number, int(self.tokens.chains[entry]))
            before = last.get(key)
            last[key] = request
            if before is None:
                continue
            followers[before] = request
            if config.tool_gap_ms is not None:
                gap_us[request] = round(config.tool_gap_ms * 1000)
            else:
                earlier = int(index[before])
                served_us = config.recorded_token_ms * 1000 * self._output[earlier]
                between_us = self._recorded_us[entry] - self._recorded_us[earlier]
                gap_us[request] = max(0, round(between_us - served_us))
        return followers
