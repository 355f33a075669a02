"""Owns configuration, errors and the values that rooms share; never imports a room of ours."""
