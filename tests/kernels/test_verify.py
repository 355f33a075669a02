"""Every registered kernel against its op's formula, and wrong kernels that must be found out."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tokenspeed.cli.main import app
from tokenspeed.core.errors import KernelError
from tokenspeed.kernels import ANY, Capability, Kernel, Platform, Priority, Registry, registry
from tokenspeed.kernels.cpu import CpuRuntime, supported_isas
from tokenspeed.kernels.reference import attention, gemm, kvcache, norm, rope, sampling
from tokenspeed.kernels.verify import CASES, TOLERANCES, Case, plan_runs, verify, worst
from tokenspeed.kernels.verify.case import compare, equal

CPU = Platform.of(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other are slow on a machine with other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def every_case() -> Iterator[Any]:
    for run in plan_runs(registry, platform=CPU):
        kernel = run.kernel
        # What does not ask for the runtime has no instruction set to choose.
        for isa in supported_isas() if kernel.takes_runtime else (None,):
            name = "-".join(filter(None, (kernel.op, kernel.solution, isa, run.operand)))
            for case in run.cases:
                yield pytest.param(kernel, case, isa, id=f"{name}-{case.name}")


@cache
def runtime(isa: str | None) -> CpuRuntime:
    return CpuRuntime(threads=2, isa=isa)


@pytest.mark.parametrize(("kernel", "case", "isa"), list(every_case()))
def test_a_kernel_computes_its_ops_formula(kernel: Kernel, case: Case, isa: str | None) -> None:
    outcome = verify(kernel, case, runtime=runtime(isa))
    assert outcome.failure is None, (outcome.error, outcome.tolerance)


def test_every_op_has_cases_and_a_tolerance() -> None:
    assert set(CASES) == set(TOLERANCES) == set(registry.ops)


def test_every_kernel_of_ours_is_checked_in_every_format() -> None:
    for run in plan_runs(registry, platform=CPU):
        if run.kernel.requires.device == "cuda":
            # These are checked in Triton's interpreter, by test_triton_ops.py and its neighbours.
            assert run.unchecked == "needs device cuda, not cpu"
            continue
        assert run.unchecked is None, (run.kernel, run.unchecked)
        assert run.cases


def only(op: str, call: Callable[..., Any], **terms: Any) -> tuple[Registry, Kernel]:
    """A registry of our ops in which one kernel is registered."""
    own = Registry(ops=dict(registry.ops))
    terms = {"formats": ("float32",), "priority": Priority.PORTABLE, **terms}
    traits = dict.fromkeys(registry.op(op).traits, ANY)
    own.kernel(op, solution="acme", **{"traits": traits, **terms})(call)
    (kernel,) = own.candidates(op)
    return own, kernel


def failures(op: str, call: Callable[..., Any]) -> list[str]:
    own, _ = only(op, call)
    outcomes = [
        verify(run.kernel, case, runtime=runtime(None))
        for run in plan_runs(own, platform=CPU)
        for case in run.cases
    ]
    assert outcomes
    return [outcome.failure for outcome in outcomes if outcome.failure is not None]


def last_output_lost(x_TI: Any, weight_OI: Any, bias_O: Any) -> torch.Tensor:
    y = gemm.linear(x_TI, weight_OI, bias_O)
    y[:, -1] *= 1 + 1e-4
    return y


def bias_forgotten(x_TI: Any, weight_OI: Any, bias_O: Any) -> torch.Tensor:
    return gemm.linear(x_TI, weight_OI, None)


def rounded_logits(x_SI: Any, weight_VI: Any) -> torch.Tensor:
    return gemm.logits(x_SI, weight_VI).bfloat16().float()


def logits_of_another_type(x_SI: Any, weight_VI: Any) -> torch.Tensor:
    return gemm.logits(x_SI, weight_VI).double()


def one_position_unseen(
    q_TQD: Any,
    k_PCHD: Any,
    v_PCHD: Any,
    rows: Any,
    scale: Any,
    *,
    window: Any = None,
    sinks_Q: Any = None,
    soft_cap: Any = None,
) -> Any:
    terms = {"window": window, "sinks_Q": sinks_Q, "soft_cap": soft_cap}
    out = attention.paged_mha(q_TQD, k_PCHD, v_PCHD, rows, scale, **terms)
    # As if each query saw the value at its own position a little less.
    return out - 1e-4 * out[:1]


def what_was_never_written(
    q_TQD: Any,
    k_PCHD: Any,
    v_PCHD: Any,
    rows: Any,
    scale: Any,
    *,
    window: Any = None,
    sinks_Q: Any = None,
    soft_cap: Any = None,
) -> Any:
    # Multiplied by zero, as if it were masked.
    terms = {"window": window, "sinks_Q": sinks_Q, "soft_cap": soft_cap}
    return attention.paged_mha(q_TQD, k_PCHD, v_PCHD, rows, scale, **terms) + 0 * v_PCHD.sum()


def rows_taken_as_contiguous(
    k_THD: Any, v_THD: Any, k_PCHD: Any, v_PCHD: Any, kv_slots_T: Any, *, k_offset_HD: Any = None
) -> None:
    _, heads, dim = k_THD.shape
    k_THD = k_THD.as_strided(k_THD.shape, (heads * dim, dim, 1))
    kvcache.append(k_THD, v_THD, k_PCHD, v_PCHD, kv_slots_T)


def one_slot_too_far(
    k_THD: Any, v_THD: Any, k_PCHD: Any, v_PCHD: Any, kv_slots_T: Any, *, k_offset_HD: Any = None
) -> None:
    kvcache.append(k_THD, v_THD, k_PCHD, v_PCHD, kv_slots_T)
    v_PCHD.view(-1, *v_PCHD.shape[2:])[kv_slots_T[-1]] += 1e-3


def epsilon_forgotten(x_TM: Any, weight_M: Any, epsilon: Any) -> torch.Tensor:
    return norm.rms_norm(x_TM, weight_M, 0.0)


def sum_of_another_order(x_TM: Any, residual_TM: Any, weight_M: Any, epsilon: Any) -> Any:
    normed, total = norm.add_rms_norm(x_TM, residual_TM, weight_M, epsilon)
    return normed, total + 1e-6


def turned_the_other_way(x_THD: Any, cos_TE: Any, sin_TE: Any) -> torch.Tensor:
    return rope.rotate(x_THD, cos_TE, -sin_TE)


def last_of_equals(logits_SV: Any) -> torch.Tensor:
    return logits_SV.shape[1] - 1 - sampling.argmax(logits_SV.flip(-1))


def one_token_allowed_too_many(logits_SV: Any, bitmask_SW: Any) -> None:
    kept = logits_SV[:, -1].clone()
    sampling.apply_bitmask(logits_SV, bitmask_SW)
    logits_SV[:, -1] = kept


def penalised_where_only_seen(
    logits_V: Any,
    seen_L: Any,
    output_counts_L: Any,
    *,
    repetition: Any,
    presence: Any,
    frequency: Any,
) -> None:
    sampling.penalise(
        logits_V, seen_L, output_counts_L + 1, repetition=repetition, presence=presence,
        frequency=frequency,
    )  # fmt: skip


def added_to_the_next_token(logits_V: Any, ids_N: Any, values_N: Any) -> None:
    sampling.add_bias(logits_V, (ids_N + 1) % len(logits_V), values_N)


def no_top_p(logits_SV: Any, uniforms_S: Any, **settings: Any) -> torch.Tensor:
    return sampling.draw(logits_SV, uniforms_S, **settings | {"top_ps_S": torch.ones(32).double()})


def one_row_a_little_off(logits_SV: Any, uniforms_S: Any, **settings: Any) -> torch.Tensor:
    off_S = 5e-4 * (torch.arange(len(uniforms_S)) == 0)
    return sampling.draw(logits_SV, uniforms_S + off_S, **settings)


def draws(wrong: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A draw with the parameters an op's kernel must have."""

    def draw(
        logits_SV: Any,
        uniforms_S: Any,
        *,
        temperatures_S: Any,
        top_ks_S: Any,
        top_ps_S: Any,
        min_ps_S: Any,
    ) -> torch.Tensor:
        return wrong(
            logits_SV,
            uniforms_S,
            temperatures_S=temperatures_S,
            top_ks_S=top_ks_S,
            top_ps_S=top_ps_S,
            min_ps_S=min_ps_S,
        )

    return draw


def no_numbers(gate_up_T2F: Any) -> torch.Tensor:
    return gate_up_T2F.chunk(2, -1)[0] * torch.nan


def raises(gate_up_T2F: Any) -> torch.Tensor:
    raise RuntimeError("out of registers")


@pytest.mark.parametrize(
    ("op", "wrong", "said"),
    [
        ("gemm.linear", last_output_lost, "y: error"),
        ("gemm.linear", bias_forgotten, "y: error"),
        ("gemm.logits", rounded_logits, "logits: error"),
        ("gemm.logits", logits_of_another_type, "logits is float64 [1, 1], not float32 [1, 1]"),
        ("attention.paged_mha", one_position_unseen, "out: error"),
        ("attention.paged_mha", what_was_never_written, "out: error inf"),
        ("kvcache.append", one_slot_too_far, "the pool of V differs in"),
        ("kvcache.append", rows_taken_as_contiguous, "the pool of K differs in"),
        ("norm.rms_norm", epsilon_forgotten, "y: error"),
        ("norm.add_rms_norm", sum_of_another_order, "the sum differs in"),
        ("rope.rotate", turned_the_other_way, "x: error"),
        ("sampling.argmax", last_of_equals, "tokens differs in"),
        ("sampling.add_bias", added_to_the_next_token, "logits: error"),
        ("sampling.apply_bitmask", one_token_allowed_too_many, "logits differs in"),
        ("sampling.penalise", penalised_where_only_seen, "logits: error"),
        ("sampling.draw", draws(no_top_p), "tokens: error"),
        ("sampling.draw", draws(one_row_a_little_off), "tokens: error"),
        ("activation.silu_and_mul", no_numbers, "x: error inf"),
        ("activation.silu_and_mul", raises, "RuntimeError: out of registers"),
    ],
)
def test_a_wrong_kernel_is_found_out(op: str, wrong: Callable[..., Any], said: str) -> None:
    assert any(said in failure for failure in failures(op, wrong))


def test_an_error_of_one_element_is_not_lost_among_many() -> None:
    exact = torch.ones(1_000_000, dtype=torch.float64)
    ours = exact.float()
    assert compare("x", ours, exact, torch.float32).error == 0.0
    ours[77] += 0.02
    assert compare("x", ours, exact, torch.float32).error == pytest.approx(0.01)
    assert equal("x", ours, exact.float()).error == pytest.approx(1e-6)


def test_what_cannot_be_checked_is_said_with_the_reason() -> None:
    own, _ = only("gemm.linear", bias_forgotten, formats=("w3",))
    (run,) = plan_runs(own, platform=CPU)
    assert (run.cases, run.operand) == ((), "w3")
    assert run.unchecked == "there are no cases of this format"
    own, _ = only("gemm.linear", bias_forgotten, requires=Capability(device="cuda"))
    (run,) = plan_runs(own, platform=CPU)
    assert run.unchecked == "needs device cuda, not cpu"
    own.declare_op("acme.magic")(lambda x: x)
    own.kernel("acme.magic", solution="acme", formats=ANY, priority=Priority.PORTABLE)(lambda x: x)
    (run,) = plan_runs(own, platform=CPU, ops=("acme.magic",))
    assert run.unchecked == "there are no cases of this op"


def test_a_kernel_is_given_only_what_it_handles() -> None:
    own, _ = only("attention.paged_mha", one_position_unseen, traits={"head_dim": {64, 128}})
    (run,) = plan_runs(own, platform=CPU)
    assert run.operand == "float32"
    assert {case.traits["head_dim"] for case in run.cases} == {64, 128}
    own, _ = only("rope.rotate", rope.rotate, formats=ANY)
    runs = plan_runs(own, platform=CPU, dtype=torch.bfloat16)
    assert [run.operand for run in runs] == ["bfloat16"]


def test_the_worst_outcome_is_the_one_that_failed() -> None:
    own, kernel = only("norm.rms_norm", epsilon_forgotten)
    (run,) = plan_runs(own, platform=CPU)
    outcomes = [verify(kernel, case, runtime=runtime(None)) for case in run.cases]
    assert worst(outcomes).failure is not None


def test_the_error_of_a_case_is_that_of_its_worst_result() -> None:
    def sum_far_off(x_TM: Any, residual_TM: Any, weight_M: Any, epsilon: Any) -> Any:
        normed, total = norm.add_rms_norm(x_TM, residual_TM, weight_M, epsilon)
        return normed, total + 1.0

    own, kernel = only("norm.add_rms_norm", sum_far_off)
    (run,) = plan_runs(own, platform=CPU)
    assert all(verify(kernel, case, runtime=runtime(None)).error == 1.0 for case in run.cases)


@pytest.mark.parametrize("op", ["kvcache.append", "norm.add_rms_norm", "attention.paged_mha"])
def test_a_kernel_elsewhere_works_on_copies_whose_results_come_back(op: str) -> None:
    (reference, *_) = (k for k in registry.candidates(op) if k.solution == "reference")
    own, wrong = only("kvcache.append", one_slot_too_far)
    for kernel in (reference, wrong) if op == "kvcache.append" else (reference,):
        runs = plan_runs(own if kernel is wrong else registry, platform=CPU, ops=(op,))
        cases = next(run.cases for run in runs if run.kernel is kernel)[:8]
        for case in cases:
            outcome = verify(kernel, case, runtime=runtime(None), device=torch.device("cpu"))
            assert (outcome.failure is None) == (kernel is reference), outcome


def test_what_is_not_there_is_refused_with_the_choices() -> None:
    plan = partial(plan_runs, registry, platform=CPU)
    with pytest.raises(KernelError, match=r"no op 'norm\.none'; ops are .*norm\.rms_norm"):
        plan(ops=("norm.none",))
    with pytest.raises(KernelError, match=r"solution 'magic' to verify; .* cpu, reference, triton"):
        plan(ops=("norm.rms_norm",), solution="magic")


def run_command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["kernels", "verify", "--threads", "1", *arguments])


def test_the_command_prints_a_line_for_each_kernel_and_operand() -> None:
    result = run_command("rope.rotate", "rope.angles", "--solution", "reference")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [line[:5] for line in lines] == [
        ["rope.angles", "reference:angles", "float32", "3", "cases"],
        ["rope.rotate", "reference:rotate", "float32", "4", "cases"],
        ["rope.rotate", "reference:rotate", "bfloat16", "4", "cases"],
        ["rope.rotate", "reference:rotate", "float16", "4", "cases"],
    ]
    assert {line[-1] for line in lines} == {"pass"}


def test_the_command_fails_where_a_plugins_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    op = "norm.rms_norm"
    _, wrong = only(op, epsilon_forgotten)
    monkeypatch.setitem(registry.kernels, op, [*registry.kernels[op], wrong])
    result = run_command(op, "--dtype", "float32")
    assert result.exit_code == 1
    assert "acme:epsilon_forgotten" in result.stdout
    assert "FAIL" in result.stdout
    assert "y: error" in result.stdout
    assert "cases failed" in result.stderr
    assert run_command(op, "--solution", "cpu").exit_code == 0
