"""Device code that is imported when it is first asked for."""

import importlib
from typing import Any

__all__ = ["DeviceCode"]


class DeviceCode:
    """A module of `tokenspeed.kernels.triton.device`, and with it Triton, once it is needed.

    Args:
        name: the module's own name.
    """

    def __init__(self, name: str) -> None:
        self._name = f"{__package__}.device.{name}"

    def __getattr__(self, function: str) -> Any:
        found = getattr(importlib.import_module(self._name), function)
        # Found without a look-up from now on.
        setattr(self, function, found)
        return found
