"""Kernels of third parties, found through the entry-point group `tokenspeed.kernels`."""

from importlib.metadata import entry_points

from tokenspeed.core.errors import KernelError

__all__ = ["ENTRY_POINT_GROUP", "load_plugins"]

ENTRY_POINT_GROUP = "tokenspeed.kernels"


def load_plugins() -> tuple[str, ...]:
    """Load every installed plugin, in order of name, and return the names.

    An entry point names a function of no arguments that imports what it needs and registers
    ops and kernels. The engine calls this once, before it builds a model.

    Raises:
        KernelError: a plugin could not be imported, or failed; names it and its distribution.
    """
    names = []
    for entry_point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        try:
            entry_point.load()()
        except Exception as error:
            distribution = entry_point.dist.name if entry_point.dist else "an unnamed distribution"
            raise KernelError(
                f"the kernel plugin {entry_point.name!r} ({entry_point.value}, from "
                f"{distribution}) failed: {type(error).__name__}: {error}. "
                f"Repair it, or uninstall {distribution}."
            ) from error
        names.append(entry_point.name)
    return tuple(names)
