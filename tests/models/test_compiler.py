"""The compiler puts the cheapest legal transitions between modules."""

from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from torch.distributed import Store

from tests.models.published import PUBLISHED
from tests.models.test_config import LLAMA
from tests.support.dataflows import (
    FEATURES,
    Flow,
    Line,
    compile_flow,
    kernels,
    random_flow,
    run_flow,
    symbols,
)
from tests.support.ranks import in_threads
from tokenspeed.core.errors import ConfigError
from tokenspeed.distributed import Mesh, connect
from tokenspeed.modeling import ModelConfig, compile_model
from tokenspeed.modeling.compiler import Program, Tracer
from tokenspeed.modeling.compiler.events import Event
from tokenspeed.modeling.compiler.rules import RULES
from tokenspeed.modeling.compiler.solve import _outcomes, cost_of

MESHES = [Mesh(tp=2), Mesh(tp=4), Mesh(tp=4, ep=2)]


def shown(program: Program) -> list[str]:
    return [
        f"{step.path or 'model'}.{step.parameter}: {step.transition.kind}" for step in program.steps
    ]


def test_llama_sums_after_attention_and_after_the_mlp_and_gathers_logits() -> None:
    program = compile_model(ModelConfig.from_hf(LLAMA), kernels=kernels(), mesh=Mesh(tp=2))
    assert program.keeps_tokens_together
    assert shown(program) == [
        "blocks.0.attention_norm.x_TM: all_reduce",
        "blocks.0.mlp_norm.x_TM: all_reduce",
        "blocks.1.attention_norm.x_TM: all_reduce",
        "blocks.1.mlp_norm.x_TM: all_reduce",
        "norm.x_TM: all_reduce",
        "model.result: all_gather",
    ]
    assert [step.source for step in program.steps[:2]] == [
        "embedding (Embedding)",
        "blocks.0.attention (Attention)",
    ]
    # Float32 of 32 features four times a token, half of them twice; then a row of 100 logits.
    assert program.moved() == {"T": 4 * 32 * 4, "S": 32 * 4 + 100 * 4 // 2}
    divided = {name: set(weight.divided) for name, weight in program.weights.items()}
    assert divided["embedding.table"] == divided["head.table"] == {"vocabulary"}
    assert divided["blocks.1.attention.qkv.weight"] == {"outputs"}
    assert divided["blocks.1.attention.output.weight"] == {"inputs"}
    assert "norm.weight" not in divided


QWEN3_MOE = {
    **LLAMA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


@pytest.mark.parametrize(
    ("mesh", "gate_up"),
    [
        (Mesh(tp=4), {"outputs": (0,)}),
        (Mesh(tp=4, ep=4), {"experts": (0,)}),
        (Mesh(tp=4, ep=2), {"experts": (0,), "outputs": (1,)}),
    ],
    ids=str,
)
def test_a_mixture_sums_over_experts_and_shares_of_experts_at_once(
    mesh: Mesh, gate_up: dict[str, tuple[int, ...]]
) -> None:
    program = compile_model(ModelConfig.from_hf(QWEN3_MOE), kernels=kernels(), mesh=mesh)
    assert shown(program) == [
        "blocks.0.attention_norm.x_TM: all_reduce",
        "blocks.0.mlp_norm.x_TM: all_reduce",
        "blocks.1.attention_norm.x_TM: all_reduce",
        "blocks.1.mlp_norm.x_TM: all_reduce",
        "norm.x_TM: all_reduce",
        "model.result: all_gather",
    ]
    assert {step.transition.cells for step in program.steps} == {tuple(range(len(mesh.cells)))}
    assert program.weights["blocks.0.mlp.experts.gate_up"].divided == gate_up
    assert "blocks.0.mlp.router.scores.weight" not in program.weights


def test_requests_of_their_own_bring_their_tokens_together_at_the_experts() -> None:
    mesh = Mesh(dp=2, tp=2, ep=4)
    program = compile_model(ModelConfig.from_hf(QWEN3_MOE), kernels=kernels(), mesh=mesh)
    dp, tp = mesh.cells_of("dp"), mesh.cells_of("tp")
    found = [(step.path, step.transition.kind, step.transition.cells) for step in program.steps]
    assert ("blocks.0.mlp", "all_gather", dp) in found
    assert ("blocks.0.mlp_norm", "all_reduce", tp) in found
    # What experts of all ranks add up goes back to whose tokens they are.
    assert ("blocks.1", "reduce_scatter", dp) in found
    assert ("blocks.1.attention_norm", "all_reduce", tp) in found


def test_shared_experts_are_added_before_sums_of_both_are_made() -> None:
    config = {
        **QWEN3_MOE,
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    }
    program = compile_model(ModelConfig.from_hf(config), kernels=kernels(), mesh=Mesh(tp=4, ep=2))
    assert [line for line in shown(program) if "mlp." in line] == []
    assert len(program.collectives) == 6
    # With requests of their own, what is shared stays at home, and what was added up comes back.
    mesh = Mesh(dp=2, tp=2, ep=4)
    dp = mesh.cells_of("dp")
    steps = compile_model(ModelConfig.from_hf(config), kernels=kernels(), mesh=mesh).steps
    found = [(step.path, step.parameter, step.transition.kind) for step in steps]
    assert any(step.transition.cells == dp for step in steps)
    assert [line for line in found if line[2] == "reduce_scatter"]


DEEPSEEK = {**PUBLISHED["DeepSeek-V3"], "num_hidden_layers": 2, "first_k_dense_replace": 1}


@pytest.mark.parametrize(
    ("mesh", "gate_up"),
    [
        (Mesh(tp=4), {"outputs": (0,)}),
        (Mesh(tp=4, ep=4), {"experts": (0,)}),
        (Mesh(tp=4, ep=2), {"experts": (0,), "outputs": (1,)}),
    ],
    ids=str,
)
def test_latent_projections_are_made_on_shares_of_tokens(
    mesh: Mesh, gate_up: dict[str, tuple[int, ...]]
) -> None:
    program = compile_model(ModelConfig.from_hf(DEEPSEEK), kernels=kernels(), mesh=mesh)
    assert not program.keeps_tokens_together
    assert shown(program) == [
        # 7168 features are added up for a share of the tokens; 1536 and 576 come back of all.
        "blocks.0.attention_norm.x_TM: reduce_scatter",
        "blocks.0.attention.q_norm.x_TM: all_gather",
        "blocks.0.attention.heads.kv_TE: all_gather",
        "blocks.0.mlp_norm.x_TM: reduce_scatter",
        "blocks.0.mlp.x_TM: all_gather",
        "blocks.1.attention_norm.x_TM: reduce_scatter",
        "blocks.1.attention.q_norm.x_TM: all_gather",
        "blocks.1.attention.heads.kv_TE: all_gather",
        # What is sampled next is picked from among all tokens.
        "blocks.1.mlp_norm.x_TM: all_reduce",
        "blocks.1.mlp_norm.residual_TM: all_gather",
        "norm.x_TM: all_reduce",
        "model.result: all_gather",
    ]
    all_cells = tuple(range(len(mesh.cells)))
    assert {step.transition.cells for step in program.steps} == {all_cells}
    # Three quarters of: embedding, then for each block two latents; a block's two sums and the
    # gathering before its network; the last sum whole and the stream back. Float32 all of it.
    features, latents = 7168, 1536 + 512 + 64
    assert program.moved()["T"] == 3 * (
        features + 2 * latents + 3 * features + 2 * features + features
    )
    divided = {name: weight.divided for name, weight in program.weights.items()}
    assert divided["blocks.1.attention.q.weight"] == {"outputs": all_cells}
    assert divided["blocks.1.attention.heads.k_up"] == {"heads": all_cells}
    assert divided["blocks.1.attention.heads.v_up"] == {"heads": all_cells}
    assert divided["blocks.1.attention.output.weight"] == {"inputs": all_cells}
    assert divided["blocks.1.mlp.experts.gate_up"] == gate_up
    assert divided["blocks.1.mlp.shared.gate_up.weight"] == {"outputs": all_cells}
    whole = ("attention.q_down.weight", "attention.kv_down.weight", "mlp.router.scores.weight")
    assert not [name for name in whole if f"blocks.1.{name}" in divided]


def test_latents_of_requests_of_their_own_stay_at_home() -> None:
    mesh = Mesh(dp=2, tp=2, ep=4)
    program = compile_model(ModelConfig.from_hf(DEEPSEEK), kernels=kernels(), mesh=mesh)
    dp, tp = mesh.cells_of("dp"), mesh.cells_of("tp")
    found = [(step.path, step.transition.kind, step.transition.cells) for step in program.steps]
    assert ("blocks.0.attention.heads", "all_gather", tp) in found
    assert not [step for step in found if "attention" in step[0] and step[2] == dp]
    assert ("blocks.1.mlp", "all_gather", dp) in found
    assert ("blocks.1.mlp.both", "reduce_scatter", dp) in found


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (2, 4)])
def test_of_a_shared_context_values_move_and_not_compressed_kv(tp: int, ep: int) -> None:
    mesh = Mesh(cp=2, tp=tp, ep=ep)
    program = compile_model(ModelConfig.from_hf(DEEPSEEK), kernels=kernels(), mesh=mesh)
    merges = [f"blocks.{layer}.attention.heads.shared.merge.parts_TQX: merge" for layer in (0, 1)]
    # What experts of all ranks add up is made whole over both axes, one after the other.
    behind = "blocks.1.mlp.both.a_TM: all_reduce"
    if tp == 1:
        assert shown(program) == [*merges, behind]
    else:
        assert shown(program) == [
            "blocks.0.attention_norm.x_TM: all_reduce",
            merges[0],
            "blocks.0.mlp_norm.x_TM: all_reduce",
            "blocks.1.attention_norm.x_TM: all_reduce",
            merges[1],
            "blocks.1.mlp_norm.x_TM: all_reduce",
            behind,
            "norm.x_TM: all_reduce",
            "model.result: all_gather",
        ]
    found = [step.transition for step in program.steps if step.transition.kind == "merge"]
    assert {transition.cells for transition in found} == {mesh.cells_of("cp")}
    # Of each head 128 elements of its value and a logarithm, and not 512 of compressed KV.
    assert {transition.moved for transition in found} == {Fraction(128 // tp * 129 * 4)}
    heads = {"heads": mesh.cells_of("tp")} if tp > 1 else None
    divided = {name: weight.divided for name, weight in program.weights.items()}
    assert divided.get("blocks.1.attention.heads.v_up") == heads


def test_parts_are_put_together_before_values_are_made_where_these_are_larger() -> None:
    config = ModelConfig.from_hf({**DEEPSEEK, "v_head_dim": 1024})
    program = compile_model(config, kernels=kernels(), mesh=Mesh(cp=2))
    assert shown(program)[0] == "blocks.0.attention.heads.shared.values.parts_TQX: merge"
    assert program.steps[0].transition.moved == 128 * 513 * 4


def test_a_model_of_one_rank_is_left_as_it_is() -> None:
    program = compile_flow([Line("pair", (0,))], Mesh())
    assert program.steps == () and program.weights == {}
    flow = Flow([Line("pair", (0,))], kernels())
    program.place_weights(flow, 0)
    run_flow([Line("pair", (0,))], torch.randn(3, FEATURES), program=program)
    assert all("forward" not in vars(part) for part in (flow, flow.parts[0]))


def test_tokens_are_shared_out_where_fewer_features_come_back() -> None:
    """A sum is scattered, normed and projected on shares of tokens, and gathered when small."""
    lines = [Line("pair", (0,)), Line("norm", (1,)), Line("latent", (2,)), Line("pair", (3,))]
    assert "parts.1.x_TM: reduce_scatter" in shown(compile_flow(lines, Mesh(tp=4)))
    assert "parts.1.x_TM: all_reduce" not in shown(compile_flow(lines, Mesh(tp=4)))


def trace(lines: Sequence[Line], mesh: Mesh) -> Tracer:
    tracer = Tracer(mesh, 0, RULES)
    twin = Flow(lines, tracer.kernels(kernels()))
    tracer.adopt(twin, torch.float32)
    tracer.deliver(twin.forward(*symbols(tracer, twin)))
    return tracer


def fewest_bytes(
    mesh: Mesh, events: Sequence[Event], lying: dict[int, tuple[str, ...]]
) -> Fraction:
    """By trying every choice of every boundary, one after the other, and forgetting none."""
    if not events:
        return Fraction(0)
    found = []
    for made, choice, reason in _outcomes(mesh, events[0], lying):
        if reason is None:
            moved = Fraction(0) if choice is None else cost_of(choice.transitions)[0]
            try:
                found.append(moved + fewest_bytes(mesh, events[1:], lying | made))
            except ValueError:
                continue
    return min(found)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_no_legal_choice_moves_fewer_bytes(mesh: Mesh, seed: int) -> None:
    lines = random_flow(seed, lines=5)
    tracer = trace(lines, mesh)
    start = {number: ("R",) * len(mesh.cells) for number in tracer.given}
    moved = sum((step.transition.moved for step in compile_flow(lines, mesh).steps), Fraction(0))
    assert moved == fewest_bytes(mesh, tracer.events, start), (seed, lines)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("seed", range(100, 116))
def test_random_dataflows_give_what_one_rank_gives(mesh: Mesh, seed: int) -> None:
    lines = random_flow(seed, lines=12)
    for tokens in (1, 7):
        x_TM = torch.randn(tokens, FEATURES, generator=torch.Generator().manual_seed(seed))
        alone = run_flow(lines, x_TM)

        def run(rank: int, store: Store, x_TM: torch.Tensor = x_TM) -> tuple[torch.Tensor, int]:
            program = compile_flow(lines, mesh, rank=rank)
            groups = connect(mesh, rank, program.groups, store=store)
            found = run_flow(lines, x_TM, program=program, rank=rank, groups=groups)
            assert sum(group.calls for group in groups.values()) == len(program.collectives)
            return found

        for found in in_threads(mesh.world, run):
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4, msg=f"{seed} {lines}")


def test_more_ranks_than_pieces_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"up \(ColumnLinear\).*20 pieces; at most 20"):
        compile_flow([Line("pair", (0,))], Mesh(tp=32))
