"""Running a kernel where cases are not: on copies of its operands."""

from dataclasses import replace
from typing import Any

import torch

from tokenspeed.kernels.quantised_weight import QuantisedWeight
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.kernels.verify.case import Call

__all__ = ["on_device"]


def on_device(call: Call, device: torch.device) -> Call:
    """A kernel that takes operands of the host: it runs on copies with the same strides, and what
    it gives or writes in place is copied back.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []

        def there(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                copy = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=device
                )
                copies.append((value, copy.copy_(value)))
                return copy
            if isinstance(value, PagedRows):
                return replace(
                    value,
                    page_table_XP=value.page_table_XP.to(device),
                    kv_slots_T=value.kv_slots_T.to(device),
                )
            if isinstance(value, QuantisedWeight):
                return value.to(device)
            return value

        given = call(*map(there, args), **{name: there(value) for name, value in kwargs.items()})
        for value, copy in copies:
            value.copy_(copy)
        if isinstance(given, tuple):
            return tuple(part.cpu() for part in given)
        return given.cpu() if isinstance(given, torch.Tensor) else given

    return run
