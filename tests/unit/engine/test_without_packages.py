"""An engine in the caller's process needs none of the packages that other processes are spoken to
with, or that constraints are compiled by."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tests.unit.loader import tiny_gguf

from tokenspeed import LLM, SamplingParams
from tokenspeed.core.records import PlainRecord

# What GPUs' machines lack; the entrypoint's, what constraints and messages take, and bars.
ABSENT = (
    *("grpc", "httpx", "llguidance", "msgspec", "prometheus_client", "rich", "smg"),
    *("smg_grpc_proto", "starlette", "typer", "uvicorn", "uvloop", "zmq"),
)

PROGRAM = """
import json, sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import tokenspeed.execution, tokenspeed.control, tokenspeed.kernels, tokenspeed.modeling
from tokenspeed import LLM, SamplingParams, StructuredOutputs

greedy = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
drawn = SamplingParams(temperature=0.9, top_k=9, seed=3, max_new_tokens=6, logprobs=2, stop=("~",))
refused = []
with LLM(sys.argv[1], max_context=64, max_running=2) as llm:
    found = [
        llm.generate("hello hello", params)[0].completions[0].token_ids
        for params in (greedy, drawn)
    ]
    assert llm.stats().output_tokens >= 6
    try:
        constrained = SamplingParams(structured_outputs=StructuredOutputs(json={"type": "object"}))
        llm.generate(["hello", "hello"], [greedy, constrained])
    except Exception as error:
        refused.append([type(error).__name__, str(error)])
    found.append(llm.generate("hello hello", greedy)[0].completions[0].token_ids)
try:
    LLM(sys.argv[1], tp=2, max_context=64)
except Exception as error:
    refused.append([type(error).__name__, str(error)])
print(json.dumps([found, refused]))
"""


def test_llm_generates_without_the_packages_of_messages_and_constraints(tmp_path: Path) -> None:
    model = tiny_gguf.write(
        tmp_path / "tiny.gguf", tiny_gguf.weights("llama", np.random.default_rng(5))
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), ",".join(ABSENT)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found, refused = json.loads(done.stdout)
    assert [kind for kind, _ in refused] == ["InvalidParameter", "ConfigError"]
    assert "structured_outputs needs the package llguidance" in refused[0][1]
    assert "by the package msgspec, which is not installed" in refused[1][1]
    greedy = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
    drawn = SamplingParams(
        temperature=0.9, top_k=9, seed=3, max_new_tokens=6, logprobs=2, stop=("~",)
    )
    with LLM(str(model), max_context=64, max_running=2) as llm:
        wanted = [
            llm.generate("hello hello", params)[0].completions[0].token_ids
            for params in (greedy, drawn)
        ]
    assert found == [*wanted, wanted[0]]


class Point(PlainRecord, frozen=True, kw_only=True, array_like=True):
    x: int
    names: Mapping[str, int] = {}


class Named(Point, frozen=True, kw_only=True, tag="named"):
    name: str = "origin"


def test_a_plain_record_is_what_a_struct_is() -> None:
    point = Named(x=1)
    assert Named.__struct_fields__ == ("x", "names", "name")
    assert point == Named(x=1, names={}, name="origin")
    assert point.names is not Named(x=1).names
    with pytest.raises(AttributeError):
        point.x = 2  # type: ignore[misc]
