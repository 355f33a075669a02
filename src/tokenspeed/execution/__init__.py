"""Owns turning a plan into one forward pass and its sampled tokens; never schedules or pages."""

from tokenspeed.execution.cpu_sampler import CpuSampler
from tokenspeed.execution.draft_passes import Drafting
from tokenspeed.execution.draft_window import seat_pages
from tokenspeed.execution.platform import (
    give_back_memory,
    resolve_dtype,
    set_threads,
    usable_cpu_count,
)
from tokenspeed.execution.runner import LaunchedStep, Runner
from tokenspeed.execution.sampler import Sampler

__all__ = [
    "CpuSampler",
    "Drafting",
    "LaunchedStep",
    "Runner",
    "Sampler",
    "give_back_memory",
    "resolve_dtype",
    "seat_pages",
    "set_threads",
    "usable_cpu_count",
]
