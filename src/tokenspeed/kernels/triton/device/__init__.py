"""Owns what runs on the device; never allocates, and never decides a grid."""
