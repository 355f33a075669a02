"""Owns the op API, the registry and every implementation of an op; never knows a model."""
