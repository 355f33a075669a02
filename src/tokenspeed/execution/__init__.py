"""Owns turning a plan into one forward pass and its sampled tokens; never schedules and never allocates a page."""
