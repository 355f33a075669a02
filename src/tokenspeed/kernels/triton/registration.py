"""How kernels of the solution `triton` are registered, and sizes that all of them use."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, ParamSpec, TypeVar

from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.kv_formats import FLOAT8
from tokenspeed.kernels.registry import ANY, Priority, registry

__all__ = ["DENSE", "GPU", "KV_FORMATS", "SOLUTION", "next_power_of_2", "triton_kernel"]

P = ParamSpec("P")
R = TypeVar("R")

SOLUTION: Final = "triton"
GPU: Final = Capability(device="cuda", features=frozenset({"triton"}))
DENSE: Final = ("float32", "bfloat16", "float16")
"""Element types that these kernels read and write."""
KV_FORMATS: Final = (*DENSE, FLOAT8)
"""Those that pages may have."""


def triton_kernel(
    op: str,
    *,
    formats: Collection[str] = DENSE,
    traits: Mapping[str, Collection[int] | None] | None = None,
    requires: Capability = GPU,
    priority: Priority = Priority.PORTABLE,
    batch_dependent: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function as the solution's kernel of an op; see `Registry.kernel`.

    Args:
        op: "family.op".
        formats: of the main operand.
        traits: values of each trait that the kernel handles; None for all.
        requires: what the device must offer.
        priority: its band.
        batch_dependent: whether a row's last bits depend on what shares its batch.
    """
    admitted: dict[str, Any] = {
        name: ANY if values is None else values for name, values in (traits or {}).items()
    }
    return registry.kernel(
        op,
        solution=SOLUTION,
        requires=requires,
        formats=formats,
        traits=admitted,
        priority=priority,
        batch_dependent=batch_dependent,
    )


def next_power_of_2(count: int) -> int:
    """The least power of 2 that is not below a positive number."""
    return 1 << (count - 1).bit_length()
