"""Owns the op API, the registry and every implementation of an op; never knows a model."""

from tokenspeed.kernels.capability import Capability, Platform
from tokenspeed.kernels.plugins import load_plugins
from tokenspeed.kernels.registry import (
    ANY,
    Kernel,
    Op,
    Priority,
    Registry,
    declare_op,
    kernel,
    registry,
)
from tokenspeed.kernels.selection import Explanation, KernelSelector, Verdict, explain

# Importing these fills the registry: first the ops, then our own kernels for them.
from tokenspeed.kernels import ops, reference  # isort: skip

__all__ = [
    "ANY",
    "Capability",
    "Explanation",
    "Kernel",
    "KernelSelector",
    "Op",
    "Platform",
    "Priority",
    "Registry",
    "Verdict",
    "declare_op",
    "explain",
    "kernel",
    "load_plugins",
    "ops",
    "reference",
    "registry",
]
