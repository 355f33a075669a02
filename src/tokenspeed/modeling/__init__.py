"""Owns placements, layers and models as equations over ops; never names a collective or a file."""
