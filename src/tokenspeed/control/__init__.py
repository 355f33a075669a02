"""Typed face of the C++ control plane; decides what runs and who owns which KV page, never touches a tensor."""

from tokenspeed.control.scheduler import CacheEvents, Scheduler, SchedulerStats

__all__ = ["CacheEvents", "Scheduler", "SchedulerStats"]
