"""Decides what runs and who owns which KV page (in C++, typed here); never touches a tensor."""

from tokenspeed.control.scheduler import CacheEvents, Scheduler

__all__ = ["CacheEvents", "Scheduler"]
