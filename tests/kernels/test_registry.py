"""How a kernel is registered, chosen, forced, and explained."""

from typing import Any

import pytest
import torch

from tokenspeed.core.errors import KernelError
from tokenspeed.kernels import (
    ANY,
    Capability,
    KernelSelector,
    Op,
    Platform,
    Priority,
    Registry,
    explain,
)
from tokenspeed.kernels.cpu import CpuRuntime, start_runtime

CPU = Platform(device="cpu", features=frozenset({"avx2"}))


@pytest.fixture
def registry() -> Registry:
    registry = Registry()

    @registry.declare_op("toy.scale", traits=("width", "mode"))
    def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
        """x * factor."""
        return scale.best(x, width=1, mode="fast")(x, factor)

    return registry


def add(registry: Registry, solution: str, **terms: Any) -> Any:
    terms = {
        "formats": ("float32",),
        "traits": {"width": ANY, "mode": ANY},
        "priority": Priority.PORTABLE,
        **terms,
    }

    @registry.kernel("toy.scale", solution=solution, **terms)
    def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    return scale


def selector(registry: Registry, **terms: Any) -> KernelSelector:
    return KernelSelector(
        device=torch.device("cpu"),
        dtype=torch.float32,
        registry=registry,
        **{"platform": CPU, **terms},
    )


def op(registry: Registry) -> Op[Any, Any]:
    return registry.op("toy.scale")


STATED = {"width": 64, "mode": "fast"}


def test_the_highest_band_that_can_run_is_chosen(registry: Registry) -> None:
    add(registry, "reference", priority=Priority.REFERENCE)
    portable = add(registry, "portable")
    add(
        registry,
        "wide",
        priority=Priority.NATIVE,
        requires=Capability(features=frozenset({"avx512f"})),
    )
    assert selector(registry).select(op(registry), traits=STATED) is portable


def test_every_loser_is_told_where_and_why(registry: Registry) -> None:
    add(registry, "gpu", priority=Priority.SPECIAL, requires=Capability(device="cuda"))
    add(registry, "wide", requires=Capability(features=frozenset({"avx512f", "avx2"})))
    add(registry, "new", requires=Capability(arch_min=(9, 0)))
    add(registry, "packed", formats=("w4", "w8"))
    add(registry, "narrow", traits={"width": {16, 32}, "mode": ANY})
    add(registry, "silent", traits={"width": ANY})
    add(registry, "best", priority=Priority.NATIVE)
    add(registry, "good")
    explanation = selector(registry).explain("toy.scale", traits=STATED)
    assert explanation.winner is not None
    assert explanation.winner.solution == "best"
    lost = {verdict.kernel.solution: verdict.lost_at for verdict in explanation.verdicts}
    assert lost == {
        "gpu": "capability",
        "wide": "capability",
        "new": "capability",
        "packed": "format",
        "narrow": "traits",
        "silent": "traits",
        "best": None,
        "good": "priority",
    }
    text = str(explanation)
    for reason in (
        "toy.scale on cpu, format=float32, mode='fast', width=64:",
        "needs device cuda, not cpu",
        "needs avx512f, which the cpu lacks",
        "needs compute capability (9, 0) or above, not None",
        "reads w4, w8, not float32",
        "handles width of [16, 32], not 64",
        "silent:scale: does not declare mode",
        "best:scale: chosen",
        "can run, but best:scale of band NATIVE comes before band PORTABLE",
    ):
        assert reason in text


def test_an_undeclared_trait_never_matches(registry: Registry) -> None:
    add(registry, "silent", traits={"width": ANY})
    with pytest.raises(KernelError, match="does not declare mode"):
        selector(registry).select(op(registry), traits=STATED)


def test_a_restricted_trait_must_be_stated(registry: Registry) -> None:
    add(registry, "narrow", traits={"width": {16}, "mode": ANY})
    with pytest.raises(KernelError, match="depends on width, which the request does not state"):
        selector(registry).select(op(registry), traits={"mode": "fast"})


def test_a_request_may_name_a_packed_format(registry: Registry) -> None:
    add(registry, "dense")
    packed = add(registry, "packed", formats=("w4",))
    chosen = selector(registry).select(op(registry), format_name="w4", traits=STATED)
    assert chosen is packed


def test_an_override_beats_priority(registry: Registry) -> None:
    plain = add(registry, "reference", priority=Priority.REFERENCE)
    add(registry, "fast", priority=Priority.SPECIAL)
    forced = selector(registry, overrides={"toy.scale": "reference"})
    assert forced.select(op(registry), traits=STATED) is plain
    text = str(forced.explain("toy.scale", traits=STATED))
    assert "reference:scale: chosen: it was forced" in text
    assert "fast:scale: 'reference' was forced" in text


def test_an_override_that_cannot_run_is_an_error_with_its_reasons(registry: Registry) -> None:
    add(registry, "reference", priority=Priority.REFERENCE)
    add(registry, "wide", requires=Capability(features=frozenset({"avx512f"})))
    forced = selector(registry, overrides={"toy.scale": "wide"})
    with pytest.raises(KernelError) as caught:
        forced.select(op(registry), traits=STATED)
    assert "'wide' was forced for toy.scale, but no such kernel can run" in str(caught.value)
    assert "needs avx512f, which the cpu lacks" in str(caught.value)
    with pytest.raises(KernelError, match="'absent' was forced"):
        selector(registry, overrides={"toy.scale": "absent"}).select(op(registry), traits=STATED)


def test_an_override_must_name_an_op(registry: Registry) -> None:
    with pytest.raises(KernelError, match=r"no op 'toy\.other'; ops are toy\.scale"):
        selector(registry, overrides={"toy.other": "reference"})


def test_a_request_may_state_only_the_ops_traits(registry: Registry) -> None:
    with pytest.raises(KernelError, match="no trait depth; it has mode, width"):
        selector(registry).explain("toy.scale", traits={"depth": 1})


def test_with_no_kernel_at_all_the_error_says_so(registry: Registry) -> None:
    with pytest.raises(KernelError, match="no kernel is registered"):
        selector(registry).select(op(registry), traits=STATED)


def test_the_order_of_registration_does_not_matter() -> None:
    winners = set()
    for names in (("a", "b"), ("b", "a")):
        registry = Registry()
        registry.declare_op("toy.scale", traits=("width", "mode"))(lambda x, factor: x)
        for name in names:
            add(registry, name)
        winner = selector(registry).explain("toy.scale", traits=STATED).winner
        assert winner is not None
        winners.add(winner.solution)
    assert winners == {"a"}


def test_a_kernel_must_take_the_ops_parameters(registry: Registry) -> None:
    register = registry.kernel(
        "toy.scale", solution="other", formats=ANY, priority=Priority.PORTABLE
    )
    with pytest.raises(KernelError, match=r"takes \(x\), but the op is declared with \(x, factor"):
        register(lambda x: x)


def test_wrong_registrations_are_errors(registry: Registry) -> None:
    add(registry, "once")
    with pytest.raises(KernelError, match="registered twice"):
        add(registry, "once")
    with pytest.raises(KernelError, match="traits are mode, width"):
        add(registry, "other", traits={"depth": ANY})
    with pytest.raises(KernelError, match="declared twice"):
        registry.declare_op("toy.scale")(lambda x: x)
    with pytest.raises(KernelError, match=r"family\.op"):
        registry.declare_op("scale")(lambda x: x)
    with pytest.raises(KernelError, match=r"ops are toy\.scale"):
        registry.kernel("toy.none", solution="x", formats=ANY, priority=Priority.NATIVE)(
            lambda x: x
        )


def test_a_direct_call_selects_for_its_arguments(registry: Registry) -> None:
    add(registry, "single")
    assert torch.equal(op(registry)(torch.ones(2), 3.0), torch.full((2,), 3.0))
    with pytest.raises(KernelError, match="not float64"):
        op(registry)(torch.ones(2, dtype=torch.float64), 3.0)


def test_the_platform_of_this_machine_is_found() -> None:
    platform = Platform.of(torch.device("cpu"))
    assert platform.device == "cpu"
    assert Capability(device="cpu").unmet_by(platform) is None


def test_our_own_ops_can_be_explained() -> None:
    explanation = explain(
        "gemm.linear",
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        overrides={"gemm.linear": "reference"},
        traits={"bias": True},
    )
    assert explanation.winner is not None
    assert explanation.winner.solution == "reference"


def test_a_weight_takes_the_best_format_in_which_all_its_ops_have_a_kernel(
    registry: Registry,
) -> None:
    add(registry, "reference", priority=Priority.REFERENCE)
    add(registry, "native", formats=("packed",), priority=Priority.NATIVE)
    formats = {"weight_formats": ("packed", "float32")}
    assert selector(registry, **formats).weight_format(op(registry)) == "packed"
    assert selector(registry).weight_format(op(registry)) == "float32"
    forced = selector(registry, overrides={"toy.scale": "reference"}, **formats)
    assert forced.weight_format(op(registry)) == "float32"
    elsewhere = selector(registry, platform=Platform(device="cuda"), **formats)
    assert elsewhere.weight_format(op(registry)) == "packed"

    @registry.declare_op("toy.read")
    def read(x: torch.Tensor) -> torch.Tensor:
        """x."""
        return x

    assert selector(registry, **formats).weight_format(op(registry), read) == "float32"


def test_a_kernel_that_asks_for_the_runtime_gets_the_selectors(registry: Registry) -> None:
    @registry.kernel(
        "toy.scale", solution="native", formats=ANY, traits={}, priority=Priority.NATIVE
    )
    def scale(x: torch.Tensor, factor: float, *, runtime: CpuRuntime) -> CpuRuntime:
        return runtime

    own = start_runtime(threads=1)
    assert selector(registry, runtime=own).select(op(registry))(1.0, 2.0) is own
    started = selector(registry)
    assert started.select(op(registry))(1.0, 2.0) is started.runtime
