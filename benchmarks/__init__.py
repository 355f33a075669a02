"""Measures, each a command of its own; what they share is in `support`."""
