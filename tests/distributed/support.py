"""Servers of several ranks, started as users of torchrun and of Ray start them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import openai
import psutil

from tests.e2e.serving import Serve, unused_port, wait_for
from tokenspeed import LLM, SamplingParams
from tokenspeed.loader import ModelFiles

PROMPTS = ["def fib(n):", "The capital of France is", "1, 2, 3, 4, 5, 6, 7,"]
TOKENS = 16
# Weights that are not packed: rounding inputs to bytes would amplify the last bits, in which two
# ranks' sums differ from one's.
DENSE_OPS = ("gemm.linear", "gemm.logits", "embedding.lookup")
DENSE = ("--dtype", "float32", *(f"--kernel={op}=reference" for op in DENSE_OPS))


def torchrun(*flags: str) -> tuple[str, ...]:
    """What comes before `serve`."""
    return ("-m", "torch.distributed.run", *flags, "-m", "tokenspeed.cli")


def texts_of_one_rank(model: ModelFiles) -> list[str]:
    kernels = dict.fromkeys(DENSE_OPS, "reference")
    params = SamplingParams(temperature=0.0, max_new_tokens=TOKENS, ignore_eos=True)
    with LLM(str(model.path), dtype="float32", max_context=512, kernels=kernels) as llm:
        return [output.completions[0].text for output in llm.generate(PROMPTS, params)]


def texts(server: Serve) -> list[str]:
    """What the gateway gives for the prompts."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    model = client.models.list().data[0].id
    found = []
    for prompt in PROMPTS:
        answer = client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0.0,
            extra_body={"ignore_eos": True},
        )
        found.append(answer.choices[0].text)
    return found


def torchrun_ranks(server: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that torchrun started, by rank."""
    found = {}
    for process in psutil.Process(server.pid).children():
        with contextlib.suppress(psutil.Error):
            found[int(process.environ()["RANK"])] = process
    return [found[rank] for rank in sorted(found)]


def failed(command: Sequence[str], *, variables: dict[str, str] | None = None) -> str:
    """The stderr of a `tokenspeed` command that must fail with one line and no traceback."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **(variables or {})},
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


@contextlib.contextmanager
def ray_nodes(folder: Path, *, count: int) -> Iterator[str]:
    """A Ray cluster of nodes with a CPU each, all on this host; its address."""
    address = f"127.0.0.1:{unused_port()}"
    variables = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Below the length that a Unix socket's path may have.
        "RAY_TMPDIR": str(folder),
    }
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for index in range(count):
            where = ["--address", address]
            if index == 0:
                where = ["--head", "--port", address.rpartition(":")[2]]
                where += ["--include-dashboard=false"]
            log = folder / f"node{index}.log"
            with log.open("wb") as file:
                nodes.append(
                    subprocess.Popen(
                        [
                            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
                            *where,
                            *("--node-ip-address", "127.0.0.1", "--num-cpus", "1"),
                            *("--object-store-memory", "80000000"),
                        ],
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=variables,
                        start_new_session=True,
                    )
                )
            wait_for(log.read_text, lambda text: "--block" in text, 120)
        yield address
    finally:
        family = []
        for node in nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                family += psutil.Process(node.pid).children(recursive=True)
            node.send_signal(signal.SIGTERM)
        for node in nodes:
            node.wait(60)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def last_error(log: str) -> str:
    """The line that a command ended with."""
    (line,) = re.findall(r"^.*tokenspeed: error: (.*)$", log, re.MULTILINE)
    return str(line)
