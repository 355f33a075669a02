"""Owns workloads, their replay and the reports on it; never serves a request."""

__all__: list[str] = []
