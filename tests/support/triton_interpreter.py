"""Triton's interpreter, made to compute as GPUs do where version 3.6 does not.

It runs device code on CPU tensors with numpy. Four things of it are put right here: numpy from
2.4 on turns no array of one element into a loop's bound; conversions to bfloat16 and to FP8 are cut
off where GPUs round to the nearest; products of bfloat16 are taken of the bits; and a row's sums
depend on its place in a tile.
"""

import importlib.util
import os
from typing import Any

import numpy as np
import pytest
import torch

__all__ = ["needs_interpreter", "repair_interpreter"]

needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not installed (pip install 'tokenspeed[triton]'), or a GPU runs its kernels",
)
"""What interprets device code is skipped without Triton, and where a GPU runs it instead."""


def repair_interpreter() -> None:
    """Put right what is said above, in this process; to be called before any kernel runs."""
    import triton.language as tl
    from triton.runtime import interpreter

    types = {
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float32: torch.float32,
        tl.float64: torch.float64,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    words = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

    def to_torch(data: Any, dtype: Any) -> torch.Tensor:
        raw = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).reshape(-1))
        return raw.view(types[dtype]).reshape(data.shape)

    def convert(data: Any, from_type: Any, to_type: Any, rounding: Any) -> Any:
        converted = to_torch(data, from_type).to(types[to_type]).contiguous()
        size_bytes = converted.dtype.itemsize
        raw = converted.reshape(-1).view(torch.uint8).numpy()
        return raw.view(words[size_bytes]).reshape(data.shape)

    def create_dot(_: Any, a: Any, b: Any, d: Any, precision: Any, __: Any) -> Any:
        a_data, b_data = (
            to_torch(x.data, x.dtype).float().numpy() if x.dtype.is_floating() else x.data
            for x in (a, b)
        )
        # Row by row: in one product numpy's sums depend on where in the tile a row lies, which a
        # matrix unit's do not.
        rows = np.matmul(a_data[:, None, :], b_data, dtype=d.data.dtype)[:, 0]
        return interpreter.TensorHandle(rows + d.data, d.dtype.scalar)

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    if getattr(interpreter, "_repaired", False):
        return
    interpreter._repaired = True
    interpreter._convert_float = convert
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.InterpreterBuilder.create_dot = create_dot
