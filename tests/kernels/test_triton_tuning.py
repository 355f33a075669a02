"""Tuning: candidates are tried in place of what kernels ask for, and the table is kept."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.kernels.triton_cases import interpreting
from tests.support.triton_interpreter import needs_interpreter
from tokenspeed.core.errors import ConfigError
from tokenspeed.kernels.triton.tuning import Found, read_table, tune, tuned, write_table
from tokenspeed.kernels.triton.workloads import workloads

__all__ = ["interpreting"]

CPU = torch.device("cpu")


class Machine:
    """A kernel of which the time is known for every size."""

    def __init__(self) -> None:
        self.us = 0.0

    def run(self) -> None:
        sizes = tuned("toy.op", "small", CPU, warps=4, stages=3)
        if sizes["warps"] == 8 and sizes["stages"] > 2:
            raise RuntimeError("out of shared memory")
        other = tuned("toy.op", "large", CPU, block=64)
        self.us = 100 / sizes["warps"] + 10 * abs(sizes["stages"] - 2) + other["block"] / 1000

    def time_us(self, calls: Sequence[Callable[[], object]]) -> float:
        for call in calls:
            call()
        return self.us


def test_the_fastest_of_what_runs_is_found() -> None:
    machine = Machine()
    (found,) = tune([machine.run], machine.time_us)
    # Each size for itself: 8 warps do not run with 3 stages. Less than 2% in a block is noise.
    assert dict(found.sizes) == {"warps": 4, "stages": 2}
    assert (found.op, found.bucket) == ("toy.op", "small")
    assert found.after_us == found.before_us - 10


def test_nothing_was_tuned_where_nothing_was_measured() -> None:
    assert tuned("toy.op", "small", CPU, warps=4) == {"warps": 4}


def test_a_table_is_added_to_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "below" / "tuned.json"
    assert read_table(path) == {}
    one = Found(op="a.b", bucket="x", sizes={"warps": 8}, before_us=2.0, after_us=1.0)
    two = Found(op="a.b", bucket="y", sizes={"stages": 2}, before_us=2.0, after_us=1.0)
    write_table(path, "H", [one])
    write_table(path, "G", [two])
    write_table(path, "H", [two])
    assert read_table(path) == {
        "G": {"a.b": {"y": {"stages": 2}}},
        "H": {"a.b": {"x": {"warps": 8}, "y": {"stages": 2}}},
    }


@pytest.mark.parametrize("text", ["no json", "[]", '{"H": {"a.b": {"x": {"warps": 3}}}}'])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(text)
    if text == "[]":
        path.write_text('["H"]')
    with pytest.raises(ConfigError, match="tokenspeed kernels tune"):
        read_table(path)


@needs_interpreter
def test_attention_asks_for_its_sizes_and_takes_them() -> None:
    """Fewer positions at once make more steps of the same result."""
    (work, *_) = (w for w in workloads(scale=512) if w.op == "attention.paged_mla")
    call = work.make(CPU, 0)
    asked: list[int] = []

    def time_us(calls: Sequence[Callable[[], object]]) -> float:
        asked.append(1)
        assert call.wanted is not None
        found, wanted = call.run(), call.wanted()
        assert torch.allclose(found[: len(wanted)].float(), wanted.float(), atol=0.05)
        return 100.0 / len(asked)

    found = tune([call.run], time_us)
    assert {entry.op for entry in found} == {"attention.paged_mla"}
    assert "576, torch.bfloat16" in {entry.bucket for entry in found}
