"""Kernels of third parties come in through an installed distribution's entry point."""

import sys
from pathlib import Path

import pytest
import torch

from tokenspeed.core.errors import KernelError
from tokenspeed.kernels import KernelSelector, load_plugins, ops, registry


def install(site: Path, module: str, source: str, entry_points: dict[str, str]) -> None:
    """Lay out a distribution as an installer does: a module and its metadata."""
    (site / f"{module}.py").write_text(source)
    metadata = site / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entry_points.items()]
    (metadata / "entry_points.txt").write_text("[tokenspeed.kernels]\n" + "\n".join(lines) + "\n")


KERNEL = """
import torch
from tokenspeed.kernels import ANY, Priority, kernel

def register():
    @kernel("activation.silu_and_mul", solution="acme", formats=ANY, priority=Priority.SPECIAL)
    def doubled(gate_up_T2F: torch.Tensor) -> torch.Tensor:
        return gate_up_T2F * 2
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    for op, kernels in list(registry.kernels.items()):
        monkeypatch.setitem(registry.kernels, op, list(kernels))
    return tmp_path


def test_an_installed_plugins_kernel_is_chosen(site: Path) -> None:
    install(site, "acme_kernels", KERNEL, {"acme": "acme_kernels:register"})
    assert "acme" in load_plugins()
    device = torch.device("cpu")
    chosen = KernelSelector(device=device, dtype=torch.float32).select(ops.activation.silu_and_mul)
    assert torch.equal(chosen(torch.ones(1, 2)), torch.full((1, 2), 2.0))
    del sys.modules["acme_kernels"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module_anywhere\n", "ModuleNotFoundError: No module named"),
        ("def register():\n    raise ValueError('no licence')\n", "ValueError: no licence"),
        ("def other():\n    pass\n", "AttributeError"),
    ],
)
def test_a_failing_plugin_is_named_with_its_distribution(
    site: Path, source: str, message: str
) -> None:
    install(site, "broken_kernels", source, {"broken": "broken_kernels:register"})
    with pytest.raises(KernelError) as caught:
        load_plugins()
    text = str(caught.value)
    assert "'broken' (broken_kernels:register, from broken_kernels)" in text
    assert message in text
    assert "uninstall broken_kernels" in text
    sys.modules.pop("broken_kernels", None)
