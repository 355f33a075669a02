"""Owns the op API, the registry and every implementation of an op; never knows a model."""

from tokenspeed.kernels.activations import QUANTISED_ROWS, Activations, QuantisedRows
from tokenspeed.kernels.capability import Capability, Platform
from tokenspeed.kernels.plugins import load_plugins
from tokenspeed.kernels.quantised import QUANTISED, QuantisedStored
from tokenspeed.kernels.quantised_weight import QuantisedWeight
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
from tokenspeed.kernels.weights import (
    GROUPED,
    PACKED,
    PACKED_FLOAT4,
    PACKED_GROUPS,
    PANELS,
    BlockMatrix,
    Matrix,
    PackedGroups,
    PackedWeight,
    Stored,
)

# Importing these fills the registry: first the ops, then our own kernels for them.
from tokenspeed.kernels import ops, reference  # isort: skip
from tokenspeed.kernels.cpu import solution as _cpu_solution  # noqa: F401  # isort: skip
from tokenspeed.kernels.triton import solution as _triton_solution  # noqa: F401  # isort: skip

__all__ = [
    "ANY",
    "GROUPED",
    "PACKED",
    "PACKED_FLOAT4",
    "PACKED_GROUPS",
    "PANELS",
    "QUANTISED",
    "QUANTISED_ROWS",
    "Activations",
    "BlockMatrix",
    "Capability",
    "Explanation",
    "Kernel",
    "KernelSelector",
    "Matrix",
    "Op",
    "PackedGroups",
    "PackedWeight",
    "Platform",
    "Priority",
    "QuantisedRows",
    "QuantisedStored",
    "QuantisedWeight",
    "Registry",
    "Stored",
    "Verdict",
    "declare_op",
    "explain",
    "kernel",
    "load_plugins",
    "ops",
    "reference",
    "registry",
]
