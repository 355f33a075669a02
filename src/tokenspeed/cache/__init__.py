"""Owns the storage that KV pages name; never decides which page is whose."""

from tokenspeed.cache.pool import KVPool, KVPools

__all__ = ["KVPool", "KVPools"]
