"""Requests of a trace as sessions of one turn that begin at their recorded times.

A trace has lengths and block ids in place of text. Each block becomes the same words wherever its
id comes up, so that a prefix cache finds what the recorded one could have found.
"""

from tokenspeed.bench.sessions.model import Message, Session, Turn, Workload
from tokenspeed.bench.sessions.words import words
from tokenspeed.bench.trace import BLOCK_TOKENS, Trace, TraceRequest

__all__ = ["trace_sessions"]


def trace_sessions(trace: Trace) -> Workload:
    """One session a request; its prompt has about as many tokens as were recorded."""
    return Workload(
        source=trace.name,
        sessions=tuple(
            Session(
                name=f"request {index}",
                turns=(
                    Turn(
                        messages=(Message(role="user", content=_prompt(request, index)),),
                        new_tokens=request.input_tokens,
                        output_tokens=request.output_tokens,
                    ),
                ),
                start_s=request.sent_us / 1e6,
            )
            for index, request in enumerate(trace.requests)
        ),
    )


def _prompt(request: TraceRequest, index: int) -> str:
    left = request.input_tokens
    pieces = []
    for block in request.blocks:
        # A partial block is the beginning of its whole one.
        pieces.append(words(f"block {block}", BLOCK_TOKENS, keep=left))
        left = max(0, left - BLOCK_TOKENS)
    if left:
        pieces.append(words(f"request {index}", left))
    return " ".join(piece for piece in pieces if piece)
