"""Native experts: one call for all of a step, and a token's bits whatever else the step has."""

from typing import Any

import pytest
import torch

from tokenspeed._cpu import Runtime, supported_isas
from tokenspeed.core.errors import KernelError
from tokenspeed.kernels import PackedGroups, PackedWeight
from tokenspeed.kernels.cpu import moe
from tokenspeed.kernels.reference import moe as reference
from tokenspeed.kernels.verify.blocks import packed_weight
from tokenspeed.kernels.verify.case import noise
from tokenspeed.kernels.verify.quantised import random_float4, random_int4

EXPERTS, CHOSEN, TOKENS, FEATURES, HIDDEN = 5, 3, 83, 96, 64


def groups(
    outputs: int, inputs: int, dtype: torch.dtype, runtime: Runtime, *, seed: int
) -> PackedGroups:
    """Of four bits, of five, and dense, all in one or each alone."""
    half = outputs // 2
    weight = PackedGroups((outputs, inputs), parts=(half, half), dtype=dtype, runtime=runtime)
    weight.pack(0, random_int4(half, inputs, 32, zeros=seed % 2 == 0, seed=seed))
    weight.pack(1, random_float4(half, inputs, seed=seed))
    for part in range(2):
        if seed >> part & 1:
            weight.pack_dense(part, noise(half, inputs, dtype=dtype, seed=seed) * 0.1)
    return weight


def matrices(kind: str, outputs: int, inputs: int, dtype: torch.dtype, runtime: Runtime) -> Any:
    found = []
    for expert in range(EXPERTS):
        if kind == "groups":
            found.append(groups(outputs, inputs, dtype, runtime, seed=expert))
            continue
        if kind == "dense":
            weight = PackedWeight((outputs, inputs), parts=(outputs,), dtype=dtype, runtime=runtime)
            weight.pack_dense(0, noise(outputs, inputs, dtype=dtype, seed=expert))
        else:
            # Two parts of different types, as gates and ups may have.
            half = outputs // 2
            weight, _ = packed_weight(
                (("Q8_0", half), ("Q4_1", outputs - half)), inputs, dtype=dtype, runtime=runtime
            )
        found.append(weight)
    return found


def results(
    kind: str, dtype: torch.dtype, runtime: Runtime, rows: slice | list[int], limit: float | None
) -> torch.Tensor:
    x_TM = noise(TOKENS, FEATURES, dtype=dtype)[rows]
    logits_TE = noise(TOKENS, EXPERTS + 2, dtype=torch.float32, seed=3)[rows]
    experts_TK, weights_TK = moe.route(
        logits_TE,
        None,
        CHOSEN,
        scoring="softmax",
        normalise=True,
        scale=1.0,
        groups=1,
        groups_kept=1,
        runtime=runtime,
    )
    return moe.experts(
        x_TM,
        matrices(kind, 2 * HIDDEN, FEATURES, dtype, runtime),
        matrices(kind, FEATURES, HIDDEN, dtype, runtime),
        experts_TK,
        weights_TK,
        # Some tokens ask for experts that are held elsewhere.
        first=1,
        gate_up_bias_E2F=noise(EXPERTS, 2 * HIDDEN, dtype=dtype, seed=5),
        down_bias_EM=noise(EXPERTS, FEATURES, dtype=dtype, seed=6),
        limit=limit,
        runtime=runtime,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "packed", "groups"])
@pytest.mark.parametrize("limit", [None, 1.5])
def test_a_token_gets_the_same_bits_in_any_batch_and_on_any_number_of_threads(
    kind: str, dtype: torch.dtype, limit: float | None
) -> None:
    one, two = Runtime(threads=1, isa=None), Runtime(threads=3, isa=None)
    whole_TM = results(kind, dtype, one, slice(None), limit)
    assert torch.equal(whole_TM, results(kind, dtype, two, slice(None), limit))
    for rows in (slice(0, 1), slice(7, 12), slice(20, 60), [80, 3, 41], slice(82, 83)):
        assert torch.equal(whole_TM[rows], results(kind, dtype, two, rows, limit)), rows


def test_experts_of_which_some_are_dense_give_what_each_kind_gives_alone() -> None:
    runtime = Runtime(threads=1, isa=None)
    x_TM = noise(9, FEATURES, dtype=torch.float32)
    gate_up = matrices("groups", 2 * HIDDEN, FEATURES, torch.float32, runtime)
    down = matrices("groups", FEATURES, HIDDEN, torch.float32, runtime)

    def out(experts: list[int]) -> torch.Tensor:
        """Every token goes to all of these."""
        return moe.experts(
            x_TM,
            [gate_up[expert] for expert in experts],
            [down[expert] for expert in experts],
            torch.arange(len(experts)).expand(9, -1).contiguous(),
            torch.ones(9, len(experts)),
            first=0,
            runtime=runtime,
        )

    alone = [out([expert]) for expert in range(EXPERTS)]
    total_TM = alone[0]
    for expert in range(1, EXPERTS):
        total_TM = total_TM + alone[expert]
    assert torch.equal(out(list(range(EXPERTS))), total_TM)


@pytest.mark.parametrize("kind", ["packed", "groups"])
def test_every_instruction_set_gives_the_same_bits_of_packed_experts(kind: str) -> None:
    # Products of dense matrices are made of other sums where there are products of bfloat16.
    found = [
        results(kind, torch.float32, Runtime(threads=1, isa=isa), slice(0, 40), 1.5)
        for isa in supported_isas()
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_token_whose_experts_are_all_elsewhere_gets_nothing() -> None:
    runtime = Runtime(threads=1, isa=None)
    out_TM = moe.experts(
        noise(2, FEATURES, dtype=torch.float32),
        matrices("dense", 2 * HIDDEN, FEATURES, torch.float32, runtime),
        matrices("dense", FEATURES, HIDDEN, torch.float32, runtime),
        torch.full((2, CHOSEN), 99),
        torch.ones(2, CHOSEN),
        first=0,
        runtime=runtime,
    )
    assert not out_TM.any()


def routed(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, *, groups: int, groups_kept: int
) -> list[list[int]]:
    experts_TK, _ = moe.route(
        logits_TE,
        bias_E,
        2,
        scoring="sigmoid",
        normalise=True,
        scale=1.0,
        groups=groups,
        groups_kept=groups_kept,
        runtime=Runtime(threads=1, isa=None),
    )
    chosen: list[list[int]] = experts_TK.tolist()
    return chosen


def test_groups_of_one_expert_are_worth_that_one() -> None:
    logits_TE = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
    assert routed(logits_TE, torch.zeros(4), groups=4, groups_kept=2) == [[3, 2], [0, 1]]
    experts_TK, _ = reference.route(
        logits_TE,
        torch.zeros(4),
        2,
        scoring="sigmoid",
        normalise=True,
        scale=1.0,
        groups=4,
        groups_kept=2,
    )
    assert experts_TK.tolist() == [[3, 2], [0, 1]]


def test_a_logit_that_is_no_number_comes_last_and_no_expert_is_chosen_twice() -> None:
    none = float("nan")
    logits_TE = torch.tensor([[none, 1.0, none, none], [none, none, none, none]])
    assert routed(logits_TE, None, groups=1, groups_kept=1) == [[1, 0], [0, 1]]


def test_matrices_that_do_not_fit_are_refused() -> None:
    runtime = Runtime(threads=1, isa=None)
    with pytest.raises(KernelError, match="gives 192 outputs, but 128 are wanted"):
        moe.experts(
            noise(2, FEATURES, dtype=torch.float32),
            matrices("dense", 2 * FEATURES, FEATURES, torch.float32, runtime),
            matrices("dense", FEATURES, HIDDEN, torch.float32, runtime),
            torch.zeros(2, CHOSEN, dtype=torch.int64),
            torch.ones(2, CHOSEN),
            first=0,
            runtime=runtime,
        )
    with pytest.raises(KernelError, match="9 of 7 experts in 1 groups cannot be chosen"):
        moe.route(
            noise(2, 7, dtype=torch.float32),
            None,
            9,
            scoring="softmax",
            normalise=False,
            scale=1.0,
            groups=1,
            groups_kept=1,
            runtime=runtime,
        )
