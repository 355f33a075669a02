"""Owns argument parsing and supervision of processes; never computes."""
