"""Triton's row-wise kernels and sampling, interpreted, against the ops' formulas."""

import random

import pytest
import torch

from tests.kernels.triton_cases import GPU, SEED, drawn_cases, interpreting, verify_interpreted
from tests.support.triton_interpreter import needs_interpreter
from tokenspeed.kernels import explain, reference, registry
from tokenspeed.kernels.selection import KernelSelector
from tokenspeed.kernels.triton import kvcache, rope, sampling

pytestmark = needs_interpreter
__all__ = ["interpreting"]

ROWWISE = (
    "activation.gelu_tanh_and_mul",
    "activation.silu_and_mul",
    "embedding.lookup",
    "embedding.take",
    "kvcache.append",
    "kvcache.append_latents",
    "kvcache.rotate_and_append",
    "norm.add_rms_norm",
    "norm.rms_norm",
    "rope.angles",
    "rope.rotate",
    "sampling.apply_bitmask",
    "sampling.argmax",
    "sampling.penalise",
)


@pytest.mark.parametrize("op", ROWWISE)
def test_a_row_is_what_the_formula_says(op: str) -> None:
    for kernel, case in drawn_cases(op, each=4):
        verify_interpreted(kernel, case)


def test_log_probabilities_are_what_the_formula_says() -> None:
    for kernel, case in drawn_cases("sampling.logprobs", each=3):
        verify_interpreted(kernel, case)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn])
def test_one_launch_rotates_and_writes_the_bits_that_two_do(stored: torch.dtype) -> None:
    torch.manual_seed(SEED)
    qkv_TXD = (torch.randn(5, 13, 20) * 200).bfloat16()
    q_TQD, k_THD, v_THD = torch.split(qkv_TXD, (7, 3, 3), dim=1)
    turns_TE = torch.randn(5, 10) * 100
    angles = turns_TE.cos(), turns_TE.sin()
    slots_T = torch.tensor([17, 3, 30, 0, 9])
    ours = [torch.zeros(2, 16, 3, 20, dtype=stored) for _ in range(2)]
    theirs = [torch.zeros(2, 16, 3, 20, dtype=stored) for _ in range(2)]
    found_TQD = kvcache.rotate_and_append(
        q_TQD, k_THD, v_THD, *angles, k_PCHD=ours[0], v_PCHD=ours[1], kv_slots_T=slots_T
    )
    assert torch.equal(found_TQD, rope.rotate(q_TQD, *angles))
    kvcache.append(rope.rotate(k_THD, *angles), v_THD, *theirs, slots_T)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our.view(torch.uint8), their.view(torch.uint8))


@pytest.mark.parametrize("size", [1, 130, 5000])
def test_a_draw_is_the_references(size: int) -> None:
    """Filters alone and together, with ties at every threshold."""
    choose = random.Random(SEED + size)
    torch.manual_seed(SEED + size)
    rows = 6
    logits_SV = torch.randn(rows, size) * 3
    logits_SV[::2] = logits_SV[::2].round()
    logits_SV[1, size // 2] = torch.nan
    logits_SV[2, size // 3] = -torch.inf
    settings = {
        "temperatures_S": torch.tensor([choose.choice((1.0, 0.4, 2.0)) for _ in range(rows)]),
        "top_ps_S": torch.tensor([choose.choice((1.0, 0.95, 0.6)) for _ in range(rows)]),
        "min_ps_S": torch.tensor([choose.choice((0.0, 0.03)) for _ in range(rows)]),
    }
    settings = {name: column.double() for name, column in settings.items()}
    settings["top_ks_S"] = torch.tensor([choose.choice((size, 40, 7)) for _ in range(rows)])
    uniforms_S = torch.rand(rows, dtype=torch.float64)
    wanted_S = reference.sampling.draw(logits_SV.clone(), uniforms_S, **settings)
    assert sampling.draw(logits_SV, uniforms_S, **settings).tolist() == wanted_S.tolist(), settings


def test_rows_in_which_no_token_is_possible_give_the_first() -> None:
    logits_SV = torch.full((2, 50), -torch.inf)
    logits_SV[1, 3] = torch.nan
    half_S = torch.full((2,), 0.5, dtype=torch.float64)
    drawn_S = sampling.draw(
        logits_SV,
        half_S,
        temperatures_S=half_S,
        top_ks_S=torch.tensor([50, 3]),
        top_ps_S=half_S,
        min_ps_S=half_S,
    )
    assert drawn_S.tolist() == [0, 0]
    assert sampling.argmax(logits_SV).tolist() == [0, 0]


def test_no_rows_are_no_launch() -> None:
    """An empty batch is a step whose prompts give no token yet."""
    for op in ("sampling.argmax", "norm.rms_norm", "activation.silu_and_mul"):
        (kernel,) = (k for k in registry.candidates(op) if k.solution == "triton")
        args = (torch.ones(8), 1e-5) if op == "norm.rms_norm" else ()
        assert len(kernel.call(torch.zeros(0, 8), *args)) == 0


def test_a_gpu_with_triton_gets_these_kernels_and_a_cpu_does_not() -> None:
    on_gpu = KernelSelector(device=torch.device("cuda"), dtype=torch.bfloat16, platform=GPU)
    for op in ROWWISE:
        format_name = "float32" if op.startswith(("sampling", "rope.angles")) else "bfloat16"
        traits = dict.fromkeys(registry.op(op).traits, 128)
        winner = on_gpu.explain(op, format_name=format_name, traits=traits).winner
        assert winner is not None
        assert winner.solution == "triton", op
    said = str(explain("norm.rms_norm", device=torch.device("cpu"), dtype=torch.bfloat16))
    assert "triton:rms_norm: needs device cuda, not cpu" in said
