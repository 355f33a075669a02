"""Triton's kernels are compiled for GPUs that are not here."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tokenspeed.core.errors import ConfigError
from tokenspeed.kernels.registry import registry
from tokenspeed.kernels.triton.compile_only import compiling
from tokenspeed.kernels.triton.samples import samples

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: pip install 'tokenspeed[triton]'",
)


def compile_for(target: str, *ops: str) -> list[str]:
    """Lines of the command, in a process that interprets nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = (sys.executable, "-m", "tokenspeed.cli", "kernels", "compile", "--target", target)
    done = subprocess.run(
        [*command, *ops], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_kernel_compiles_and_says_what_it_takes(target: str) -> None:
    (line,) = compile_for(target, "norm.rms_norm")
    assert line.startswith(target)
    assert re.search(r" [1-9]\d* registers, +0 B spilled", line)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_kernel_compiles_and_products_use_the_matrix_unit(target: str) -> None:
    lines = compile_for(target)
    assert {line.split()[1] for line in lines} == {sample.op for sample in samples()}
    products = [line for line in lines if " attend" in line]
    assert products
    assert all(line.endswith("matrix unit") for line in products)


def test_every_kernel_has_a_sample() -> None:
    ours = {
        op
        for op in registry.ops
        if any(kernel.solution == "triton" for kernel in registry.candidates(op))
    }
    assert {sample.op for sample in samples()} == ours


def test_what_is_interpreted_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", True)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET"), compiling("sm_90"):
        pass
    with pytest.raises(ConfigError, match="sm_90, gfx942"), compiling("sm_20"):
        pass
