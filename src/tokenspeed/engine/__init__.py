"""Owns the step loop, the processes and clients around it; never decides what runs."""
