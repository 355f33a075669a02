"""The gateway's command line, its parsers, and the addresses it may serve on."""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from smg.router_args import RouterArgs

from tokenspeed.core.errors import ConfigError, EngineError
from tokenspeed.entrypoint.gateway import (
    Gateway,
    GatewayConfig,
    check_address,
    gateway_arguments,
    is_loopback,
    unused_port,
)
from tokenspeed.entrypoint.parsers import (
    REASONING_PARSERS,
    TOOL_CALL_PARSERS,
    Parsers,
    choose_parsers,
    read_template,
)

PLAIN = Parsers(tool_call="passthrough", reasoning="passthrough")


def config(**fields: Any) -> GatewayConfig:
    standard: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 8000,
        "worker_ports": (9000,),
        "prometheus_port": 9001,
        "tokenizer_dir": Path("/models/tok"),
        "parsers": PLAIN,
    }
    return GatewayConfig(**(standard | fields))


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The arguments as the gateway's own parser reads them."""
    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser, use_router_prefix=False)
    assert arguments[0] == "launch"
    return parser.parse_args(arguments[1:])


def test_the_gateway_understands_its_command_line() -> None:
    read = parsed(gateway_arguments(config(api_key="key")))
    assert (read.host, read.port, read.api_key) == ("127.0.0.1", 8000, "key")
    assert read.worker_urls == ["grpc://127.0.0.1:9000"]
    assert (read.prometheus_host, read.prometheus_port) == ("127.0.0.1", 9001)
    assert (read.tool_call_parser, read.reasoning_parser) == ("passthrough", "passthrough")
    assert read.disable_retries
    assert read.disable_circuit_breaker
    assert read.tokenizer_path == "/models/tok"
    assert read.shutdown_grace_period_secs == 10


def test_without_a_key_none_is_passed() -> None:
    assert "--api-key" not in gateway_arguments(config())


@pytest.mark.parametrize("name", TOOL_CALL_PARSERS)
def test_the_gateway_knows_every_tool_parser(name: str) -> None:
    parsers = Parsers(tool_call=name, reasoning="passthrough")
    assert parsed(gateway_arguments(config(parsers=parsers))).tool_call_parser == name


@pytest.mark.parametrize("name", REASONING_PARSERS)
def test_the_gateway_knows_every_reasoning_parser(name: str) -> None:
    parsers = Parsers(tool_call="passthrough", reasoning=name)
    assert parsed(gateway_arguments(config(parsers=parsers))).reasoning_parser == name


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_beyond_loopback_a_key_is_needed(host: str) -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        config(host=host)
    assert config(host=host, api_key="key").api_key == "key"


def test_an_empty_key_is_no_key() -> None:
    with pytest.raises(ConfigError, match="--api-key is empty"):
        config(api_key="")


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("::1", True), ("127.8.8.8", True), ("::", False)]
)
def test_loopback_is_told_from_the_rest(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_name_that_resolves_to_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="--host"):
        is_loopback("no such host")


def test_a_port_in_use_names_the_flag() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--port"):
            check_address("127.0.0.1", port)
    check_address("127.0.0.1", unused_port())


@pytest.mark.parametrize(
    ("template", "prompt", "expected"),
    [
        (None, "", ("passthrough", "passthrough")),
        ("{{ messages }}", "", ("passthrough", "passthrough")),
        ('<tool_call>\n{"name": ...}', "", ("qwen", "passthrough")),
        ("<tool_call>\n<function=f>", "", ("qwen_coder", "passthrough")),
        ("<tool_call>f<arg_key>", "", ("glm45_moe", "passthrough")),
        ("[TOOL_CALLS]", "", ("mistral", "passthrough")),
        ("<|python_tag|>", "", ("llama", "passthrough")),
        ("<tool_call> <think> </think>", "assistant\n", ("qwen", "qwen3")),
        ("<tool_call> <think> </think>", "assistant\n<think>\n", ("qwen", "qwen3_thinking")),
    ],
)
def test_parsers_follow_the_template(
    template: str | None, prompt: str, expected: tuple[str, str]
) -> None:
    chosen = choose_parsers(template, prompt)
    assert (chosen.tool_call, chosen.reasoning) == expected


def test_a_template_is_found_wherever_a_tokenizer_keeps_it(tmp_path: Path) -> None:
    assert read_template(tmp_path) is None
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"chat_template": "one"}))
    assert read_template(tmp_path) == "one"
    named = [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "three"}]
    file.write_text(json.dumps({"chat_template": named}))
    assert read_template(tmp_path) == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert read_template(tmp_path) == "four"


def test_a_gateway_that_cannot_start_says_why() -> None:
    async def run() -> str:
        gateway = await Gateway.launch(
            config(
                port=unused_port(),
                prometheus_port=unused_port(),
                worker_ports=(unused_port(),),
                parsers=Parsers(tool_call="no-such-parser", reasoning="passthrough"),
            )
        )
        try:
            with pytest.raises(EngineError) as caught:
                await gateway.wait_ready(model_name="none", timeout_s=30)
        finally:
            await gateway.stop(is_idle=lambda: True)
        return str(caught.value)

    message = asyncio.run(run())
    assert "ended with exit code" in message
    assert "no-such-parser" in message


def test_a_gateway_with_no_worker_is_not_ready() -> None:
    async def run() -> str:
        gateway = await Gateway.launch(
            config(port=unused_port(), prometheus_port=unused_port(), worker_ports=(unused_port(),))
        )
        try:
            with pytest.raises(EngineError) as caught:
                await gateway.wait_ready(model_name="none", timeout_s=2)
            assert not gateway.exited.done()
        finally:
            await gateway.stop(is_idle=lambda: True)
        return str(caught.value)

    assert "not ready" in asyncio.run(run())


CHILD = """
import json, subprocess, sys
child = subprocess.Popen([sys.executable, "-m", "tokenspeed.entrypoint.gateway_child"],
                         stdin=subprocess.PIPE, text=True)
child.stdin.write(json.dumps({"parent_pid": PARENT, "arguments": ARGUMENTS}))
child.stdin.close()
print(child.pid, flush=True)
print(child.wait())
"""


def gateway_of_a_parent(parent: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    arguments = gateway_arguments(
        config(
            port=unused_port(),
            prometheus_port=unused_port(),
            worker_ports=(unused_port(),),
            api_key="a-secret",
        )
    )
    script = CHILD.replace("PARENT", parent).replace("ARGUMENTS", repr(arguments))
    process = subprocess.Popen(
        [sys.executable, "-c", "import os\n" + script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ,
    )
    assert process.stdout is not None
    return process, psutil.Process(int(process.stdout.readline()))


@pytest.mark.skipif(sys.platform != "linux", reason="timer slack is Linux's")
def test_the_gateways_threads_may_be_woken_for_several_timers_at_once() -> None:
    script = (
        "import ctypes, threading; "
        "from tokenspeed.entrypoint.gateway_child import wake_together; "
        "wake_together(); "
        "thread = threading.Thread(target=lambda: print(ctypes.CDLL(None).prctl(30, 0, 0, 0, 0))); "
        "thread.start(); thread.join()"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout == "50000000\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_the_gateway_dies_with_its_parent_and_hides_its_key() -> None:
    parent, child = gateway_of_a_parent("os.getpid()")
    deadline_s = time.monotonic() + 30
    # Its name changes once it has taken its arguments from stdin, and is the gateway.
    while "smg" not in "".join(child.cmdline()):
        assert time.monotonic() < deadline_s
    assert "a-secret" not in " ".join(child.cmdline())
    parent.kill()
    parent.communicate()
    child.wait(10)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_gateway_whose_parent_has_gone_already_does_not_start() -> None:
    parent, _ = gateway_of_a_parent("1")
    code, _ = parent.communicate(timeout=30)
    assert code == "1\n"
