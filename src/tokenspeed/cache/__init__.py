"""Owns the storage that KV pages name; never decides which page is whose."""
