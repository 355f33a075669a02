"""Owns conversations to replay, from files or drawn at random; never sends one."""

from tokenspeed.bench.sessions.arrivals import trace_sessions
from tokenspeed.bench.sessions.files import FORMATS, read_sessions
from tokenspeed.bench.sessions.model import (
    CHARACTERS_PER_TOKEN,
    Message,
    Session,
    Turn,
    Workload,
    cut,
    estimate_tokens,
)
from tokenspeed.bench.sessions.synthetic import SWE, Profile, generate_sessions

__all__ = [
    "CHARACTERS_PER_TOKEN",
    "FORMATS",
    "SWE",
    "Message",
    "Profile",
    "Session",
    "Turn",
    "Workload",
    "cut",
    "estimate_tokens",
    "generate_sessions",
    "read_sessions",
    "trace_sessions",
]
