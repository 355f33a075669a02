"""Several ranks run recorded steps: what lies between their exchanges without Python, with the bits
of the forward."""

from pathlib import Path

import pytest
import torch
from torch.distributed import Store

from tests.models.test_ranks import load
from tests.models.tiny import write_tiny
from tests.support.ranks import in_threads
from tests.unit.execution.tiny import CPU, GREEDY, Planner, Request, bind, config_of
from tokenspeed.cache import KVPools
from tokenspeed.distributed import Mesh
from tokenspeed.execution import Runner
from tokenspeed.execution.graph import StepGraph
from tokenspeed.modeling import Model


def runner_of(model: Model) -> tuple[Runner, Planner]:
    config = config_of(page_size=16, context_max=128)
    pools = KVPools(model.kv_specs(), pages=config.groups[0].pages, page_size=16, device=CPU)
    runner = Runner(model, pools, config, device=CPU, threads=1)
    runner.record()
    return runner, Planner(config)


@pytest.mark.parametrize(
    ("name", "mesh", "dtype"),
    [
        ("llama-tied", Mesh(tp=2), torch.float32),
        # Biases that one rank adds.
        ("llama-bias", Mesh(tp=2), torch.bfloat16),
        ("deepseek-v3", Mesh(tp=4, ep=2), torch.float32),
        # More than two ranks add up in their own type, in shares that are long enough.
        ("llama-mha", Mesh(tp=4), torch.bfloat16),
        ("qwen3-moe", Mesh(tp=2, ep=2), torch.bfloat16),
    ],
    ids=str,
)
def test_recorded_ranks_give_the_bits_of_the_forward(
    tmp_path: Path, name: str, mesh: Mesh, dtype: torch.dtype
) -> None:
    write_tiny(name, tmp_path)

    def run(rank: int, store: Store) -> list[torch.Tensor]:
        model = load(tmp_path, mesh, rank, store, dtype=dtype, native=True)
        runner, planner = runner_of(model)
        steps = runner._steps
        assert isinstance(steps.recorded, StepGraph)
        requests = [Request(slot=slot, prompt=[*range(9 * slot, 40)]) for slot in (0, 2)]
        for request in requests:
            bind(runner, request, GREEDY)
        found = []
        for decodes, prefills in (
            # The first chunk samples nothing, so that no logits are put together.
            ([], [(requests[0], 7)]),
            ([], [(requests[0], 33)]),
            ([requests[0]], [(requests[1], 22)]),
            (requests, []),
        ):
            plan = planner.plan(decodes, prefills)
            last_token_X = steps.last_token_X.clone()
            with torch.inference_mode():
                found.append(steps.logits(plan).clone())
                # One rank may be recorded and another not, or be profiled.
                mixed_SV = steps.recorded.run(plan)[0] if rank % 2 else steps.logits(plan)
            assert torch.equal(mixed_SV, found[-1])
            # A recorded step leaves the tokens that it chose for the next one.
            steps.last_token_X.copy_(last_token_X)
            assert torch.equal(steps.recorded.run(plan)[0], found[-1])
        runner.close()
        return found

    results = in_threads(mesh.world, run)
    for found in results:
        assert [len(logits) for logits in found] == [0, 1, 2, 2]
        assert all(torch.equal(ours, first) for ours, first in zip(found, results[0], strict=True))


@pytest.mark.parametrize(
    ("name", "mesh", "native"),
    [
        # What a rank sees of a context is found out on the host, step by step.
        ("llama", Mesh(cp=2), True),
        ("llama", Mesh(tp=2), False),
    ],
    ids=str,
)
def test_what_cannot_be_recorded_runs_through_python(
    tmp_path: Path, name: str, mesh: Mesh, native: bool
) -> None:
    write_tiny(name, tmp_path)

    def run(rank: int, store: Store) -> bool:
        runner, _ = runner_of(load(tmp_path, mesh, rank, store, native=native))
        return runner._steps.recorded is None

    assert in_threads(mesh.world, run) == [True] * mesh.world
