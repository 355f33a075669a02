"""Gives the requests of a trace the tokens that its block ids stand for.

Equal blocks get equal tokens. What no id tells, the end of a prompt and the answer, is taken from
the request that goes on from there: its prompt holds them, as in a conversation whose next prompt
repeats the last answer. So a prefix cache sees what a real run would show it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenspeed.bench.trace import BLOCK_TOKENS, Trace, TraceRequest
from tokenspeed.core.step import Int32Array, Int64Array

__all__ = ["TraceTokens", "assign_tokens", "mix"]

_UInt64Array = npt.NDArray[np.uint64]
_VOCABULARY_BITS = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceTokens:
    """Where each of R requests finds its tokens.

    Attributes:
        flat: [N] all tokens.
        prompt_starts, output_starts: [R] request r's prompt is flat[prompt_starts[r] :][:input],
            its answer flat[output_starts[r] :][:output].
        chains: [R] the conversation of each request, counted from 0 by first request: its session,
            or what was inferred where the trace names none.
    """

    flat: Int32Array
    prompt_starts: Int64Array
    output_starts: Int64Array
    chains: Int64Array


def mix(values: _UInt64Array) -> _UInt64Array:
    """A well mixed 64-bit number for each (the finaliser of splitmix64, Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def assign_tokens(trace: Trace) -> TraceTokens:
    """Tokens for every request of a trace; the same trace always gets the same ones."""
    requests = trace.requests
    next_of = _continuations(requests)
    starts = np.zeros(len(requests), dtype=np.int64)
    outputs = np.zeros(len(requests), dtype=np.int64)
    pieces: list[Int32Array] = []
    size = 0

    def append(*tokens: Int32Array) -> int:
        nonlocal size
        start = size
        pieces.extend(tokens)
        size += sum(map(len, tokens))
        return start

    # From the last request to the first, so that whatever a request goes on in is there already.
    streams: dict[int, Int32Array] = {}
    for index in reversed(range(len(requests))):
        request, later = requests[index], next_of.get(index)
        known, need = request.input_tokens, request.input_tokens + request.output_tokens
        if later is None:
            prompt = np.concatenate([_blocks(request), _own(index, _own_count(request))])
            stream = np.concatenate([prompt, _own(index, request.output_tokens, known)])
            starts[index] = append(stream)
            outputs[index] = starts[index] + known
        else:
            stream = streams[later]
            held = requests[later].input_tokens
            starts[index] = starts[later]
            if held >= need:
                outputs[index] = starts[index] + known
            else:
                # The next prompt left out a part of the answer: what follows there is not of it.
                outputs[index] = append(stream[known:held], _own(index, need - held, held))
        streams[index] = stream
    flat = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
    return TraceTokens(
        flat=flat, prompt_starts=starts, output_starts=outputs, chains=_chains(requests, next_of)
    )


def _blocks(request: TraceRequest) -> Int32Array:
    """[at most input] tokens of the blocks that have an id."""
    ids = np.array(request.blocks, dtype=np.uint64)
    offsets = np.arange(BLOCK_TOKENS, dtype=np.uint64)
    keys = np.add.outer(mix(ids), offsets)
    return _tokens(keys.reshape(-1)[: request.input_tokens])


def _own_count(request: TraceRequest) -> int:
    """Tokens of the prompt that no block id covers."""
    return max(0, request.input_tokens - len(request.blocks) * BLOCK_TOKENS)


def _own(index: int, count: int, first: int = 0) -> Int32Array:
    """Tokens that no other request has, at `first` and on."""
    key = mix(np.array([index + 2**62], dtype=np.uint64))
    return _tokens(np.add(key, np.arange(first, first + count, dtype=np.uint64)))


def _tokens(keys: _UInt64Array) -> Int32Array:
    return (mix(keys) >> np.uint64(64 - _VOCABULARY_BITS)).astype(np.int32)


def _continuations(requests: tuple[TraceRequest, ...]) -> dict[int, int]:
    """The request in whose prompt each request goes on, where there is one.

    In a session it is the next turn. Elsewhere a request goes on in the first later one that is
    long enough and begins with all its full blocks, the last of which it brought first: a prompt
    that merely shares a system prompt is no conversation.
    """
    found: dict[int, int] = {}
    last_turn: dict[str, int] = {}
    brought: set[int] = set()
    last_block_of: dict[int, int] = {}
    for index, request in enumerate(requests):
        if request.session is not None:
            before = last_turn.get(request.session)
            if before is not None and _extends(requests[before], request):
                found[before] = index
            last_turn[request.session] = index
            continue
        for block in reversed(request.full_blocks):
            earlier = last_block_of.get(block)
            if earlier is None or earlier in found:
                continue
            before_all = requests[earlier]
            if _extends(before_all, request) and request.input_tokens >= (
                before_all.input_tokens + before_all.output_tokens
            ):
                found[earlier] = index
            break
        full = request.full_blocks
        if full and full[-1] not in brought:
            last_block_of[full[-1]] = index
        brought.update(full)
    return found


def _extends(before: TraceRequest, after: TraceRequest) -> bool:
    full = before.full_blocks
    return after.input_tokens > before.input_tokens and after.blocks[: len(full)] == full


def _chains(requests: tuple[TraceRequest, ...], next_of: dict[int, int]) -> Int64Array:
    chains = np.zeros(len(requests), dtype=np.int64)
    names: dict[str, int] = {}
    inherited: dict[int, int] = {}
    count = 0
    for index, request in enumerate(requests):
        chain = inherited.get(index)
        if request.session is not None:
            chain = names.get(request.session)
        if chain is None:
            chain = count
            count += 1
        if request.session is not None:
            names[request.session] = chain
        chains[index] = chain
        if index in next_of:
            inherited[next_of[index]] = chain
    return chains
