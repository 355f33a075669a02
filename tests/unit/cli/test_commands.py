"""The command line: its flags are promises."""

import os
import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tokenspeed import __version__
from tokenspeed.cli.main import app
from tokenspeed.cli.options import parse_kernels, parse_size, takes_engine_flags
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.errors import ConfigError

ENGINE_FLAGS = {
    "--served-model-name",
    "--device",
    "--dtype",
    "--kv-dtype",
    "--deterministic",
    "--max-context",
    "--max-running",
    "--max-step-tokens",
    "--page-size",
    "--kv-cache-memory",
    "--host-cache-memory",
    "--overlap-depth",
    "--prefix-cache",
    "--no-prefix-cache",
    "--speculate",
    "--draft-memory",
    "--threads",
    "--tp",
    "--ep",
    "--cp",
    "--distributed-executor-backend",
    "--ray-address",
    "--kernel",
    "--seed",
}
FLAGS: dict[str, set[str]] = {
    "serve": ENGINE_FLAGS
    | {
        "--host",
        "--port",
        "--api-key",
        "--dp",
        "--tool-call-parser",
        "--reasoning-parser",
        "--tps-floor",
        "--queue-timeout",
        "--token-exact-history",
        "--no-token-exact-history",
        "--stream-interval",
        "--restart",
        "--curl",
        "--no-curl",
        "--operations-port",
        "--operations-host",
        "--operations-socket",
        "--health-timeout",
        "--otlp-endpoint",
        "--shutdown-timeout",
        "--log-level",
    },
    "chat": ENGINE_FLAGS | {"--system", "--max-tokens", "--temperature", "--top-p", "--log-level"},
    "generate": ENGINE_FLAGS
    | {"--max-tokens", "--temperature", "--top-p", "--stop", "--json", "--log-level"},
    "bench replay": {
        "--sessions",
        "--synthetic",
        "--concurrency",
        "--repeats",
        "--duration",
        "--sessions-max",
        "--turns-max",
        "--max-context",
        "--output-tokens",
        "--tool-gap-scale",
        "--tool-gap-max",
        "--speed",
        "--model",
        "--api-key",
        "--timeout",
        "--errors-max",
        "--pid",
        "--tps-floor",
        "--ttft-limit",
        "--salt",
        "--label",
        "--seed",
        "--json",
        "--output",
        "--log-level",
    },
    "bench compare": {"--log-level"},
    "bench offline": ENGINE_FLAGS
    | {
        "--prefill",
        "--decode",
        "--batch",
        "--batch-depth",
        "--new-tokens",
        "--repeats",
        "--json",
        "--output",
        "--log-level",
    },
    "bench peers": {
        "--output",
        "--model",
        "--engines",
        "--sessions",
        "--synthetic",
        "--concurrency",
        "--repeats",
        "--duration",
        "--sessions-max",
        "--turns-max",
        "--max-context",
        "--output-tokens",
        "--tool-gap-scale",
        "--tps-floor",
        "--threads",
        "--seed",
        "--log-level",
    },
    "bench simulate": {
        "--experiment",
        "--hardware",
        "--step-time",
        "--jitter",
        "--kv-tokens",
        "--page-size",
        "--max-running",
        "--max-step-tokens",
        "--max-context",
        "--overlap-depth",
        "--replicas",
        "--group-replicas",
        "--router",
        "--load-bound",
        "--scale",
        "--speed",
        "--loop",
        "--tool-gap-ms",
        "--recorded-token-ms",
        "--tps-floor",
        "--keep-floor",
        "--ignore-floor",
        "--queue-timeout",
        "--limit",
        "--optimum",
        "--no-optimum",
        "--jobs",
        "--seed",
        "--json",
        "--output",
        "--log-level",
    },
    "plan": {
        "--tp",
        "--ep",
        "--dp",
        "--cp",
        "--dtype",
        "--max-context",
        "--memory",
        "--json",
        "--log-level",
    },
    "top": {"--operations", "--api-key", "--interval", "--once"},
    "pull": {"--force", "--log-level"},
    "models": set(),
    "env": set(),
    "kernels list": {"--log-level"},
    "kernels compile": {"--target", "--log-level"},
    "kernels tune": {"--output", "--log-level"},
    "kernels bench": {"--threads", "--format", "--experts", "--log-level"},
    "kernels roofline": {"--threads", "--log-level"},
    "kernels verify": {"--solution", "--dtype", "--device", "--threads", "--log-level"},
    "kernels explain": {"--device", "--dtype", "--format", "--trait", "--force", "--log-level"},
}


def commands() -> dict[str, Any]:
    """Every command by its words."""
    found: dict[str, Any] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        if hasattr(command, "commands"):
            for name, child in command.commands.items():
                walk(child, (*words, name))
        else:
            found[" ".join(words)] = command

    walk(typer.main.get_command(app), ())
    return found


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_commands_and_flags_are_these() -> None:
    found = {
        words: {
            flag
            for parameter in command.params
            if parameter.param_type_name == "option"
            for flag in (*parameter.opts, *parameter.secondary_opts)
            if flag not in ("--help", "-h")
        }
        for words, command in commands().items()
    }
    assert found == FLAGS


@pytest.mark.parametrize("words", FLAGS)
def test_help_explains_the_command_and_every_flag(words: str) -> None:
    result = run(*words.split(), "--help")
    assert result.exit_code == 0
    for flag in FLAGS[words]:
        assert flag in result.stdout
    for parameter in commands()[words].params:
        assert parameter.help, f"{parameter.name} has no help"


def test_every_engine_flag_reaches_the_configuration() -> None:
    seen: list[EngineConfig] = []

    def command(*, engine: Any) -> None:
        seen.append(engine("m"))

    probe = typer.Typer()
    probe.command()(takes_engine_flags(command))
    line = (
        "--served-model-name name --device cuda --dtype float32 --kv-dtype int8 "
        "--max-context 100 --max-running 3 "
        "--max-step-tokens 5 --page-size 16 --kv-cache-memory 1.5GiB "
        "--host-cache-memory 1GiB --overlap-depth 1 "
        "--no-prefix-cache --speculate draft:small --draft-memory 64MiB --threads 2 "
        "--kernel a.b=c --kernel d.e=f --seed 9"
    )
    result = CliRunner().invoke(probe, line.split())
    assert result.exit_code == 0, result.output
    assert seen == [
        EngineConfig(
            model="m",
            served_model_name="name",
            device="cuda",
            dtype="float32",
            kv_dtype="int8",
            max_context=100,
            max_running=3,
            max_step_tokens=5,
            page_size=16,
            kv_cache_size_bytes=3 * 2**29,
            host_cache_size_bytes=2**30,
            overlap_depth=1,
            prefix_cache=False,
            speculate="draft:small",
            draft_memory_size_bytes=64 * 2**20,
            threads=2,
            kernels={"a.b": "c", "d.e": "f"},
            seed=9,
        )
    ]


def test_without_flags_the_configuration_has_its_own_defaults() -> None:
    seen: list[EngineConfig] = []

    def command(*, engine: Any) -> None:
        seen.append(engine("m"))

    probe = typer.Typer()
    probe.command()(takes_engine_flags(command))
    CliRunner().invoke(probe, [])
    assert seen == [EngineConfig(model="m")]


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1000", 1000),
        ("1kB", 1000),
        ("2GiB", 2**31),
        ("2 gib", 2**31),
        ("1.5G", 1_500_000_000),
        ("512MiB", 2**29),
        ("1T", 10**12),
    ],
)
def test_sizes_are_read(text: str, size_bytes: int) -> None:
    assert parse_size(text, "--draft-memory") == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 parsecs", "1e9", "nan", "2GiB2"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="2GiB"):
        parse_size(text, "--draft-memory")


@pytest.mark.parametrize("text", ["8000000000GiB", "9" * 400, "9" * 400 + "TiB"])
def test_a_size_that_no_machine_has_is_refused_by_its_flag(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--draft-memory .* is more than any machine has"
    ) as told:
        parse_size(text, "--draft-memory")
    assert len(str(told.value)) < 120


@pytest.mark.parametrize("flag", ["--kv-cache-memory", "--host-cache-memory", "--draft-memory"])
def test_a_wrong_size_is_refused_by_the_name_of_its_flag(flag: str) -> None:
    result = run("serve", flag, "much")
    assert result.exit_code == 1
    assert f"{flag} 'much' is no size" in result.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--max-running 3000000000", "max_running must be below 2^31, but is 3000000000"),
        (f"--cp {'9' * 400}", f"cp must be below 2^63, but is {'9' * 24}...\n"),
        ("--cp 100000", "--tp 1 --cp 100000 --dp 1 makes 100000 processes on this host"),
        ("--dp 100000", "--dp 100000 makes 100000 processes on this host"),
        ("--dp 4 --tp 8", "--tp 8 --cp 1 --dp 4 makes 32 processes on this host"),
        ("--tps-floor inf", "tps_floor must be above 0 and below 1e9"),
        ("--queue-timeout 1e30", "queue_timeout_s must be above 0 and below 1e9"),
        ("--kernel x", "must be OP=SOLUTION, such as attention.paged_mha=reference"),
        ("--health-timeout nan", "--health-timeout must be above 0, but is nan"),
        ("--speculate draft:", "must be one of auto, off, suffix, draft:MODEL, but is 'draft:'"),
    ],
    ids=lambda value: value[:24],
)
def test_a_value_of_another_kind_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, flags: str, told: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    result = run("serve", "no-such-model", *flags.split())
    assert result.exit_code == 1
    assert told in result.stderr


def test_no_memory_for_the_kv_cache_is_refused_and_none_for_drafts_is_not() -> None:
    result = run("serve", "--kv-cache-memory", "0GiB")
    assert result.exit_code == 1
    assert "--kv-cache-memory '0GiB' is less than 1 byte" in result.stderr
    assert parse_size("0", "--draft-memory") == 0


@pytest.mark.parametrize("choices", [["gemm"], ["=x"], ["gemm.linear="], ["a.b=c", "a.b=d"]])
def test_a_kernel_choice_of_another_form_is_refused(choices: list[str]) -> None:
    with pytest.raises(ConfigError, match="--kernel"):
        parse_kernels(choices)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("serve --host 0.0.0.0", "--api-key"),
        ("serve --kv-cache-memory lots", "2GiB"),
        ("serve --kernel x", "OP=SOLUTION"),
        ("serve --tool-call-parser magic", "qwen"),
        ("serve --reasoning-parser magic", "deepseek_r1"),
        ("generate one two three", "quote the prompt"),
        ("generate x --distributed-executor-backend ray", "--tp 1 --cp 1 makes one"),
        ("bench simulate", "--experiment"),
        ("bench offline --prefill x", "--prefill"),
        ("bench offline --new-tokens 1", "--new-tokens"),
        ("bench offline --output no-such/report.json", "the folder no-such: make it first"),
        ("bench offline --prefill= --decode= --batch=", "--prefill, --decode or --batch"),
        ("bench peers --output x --engines magic", "openvino-int8"),
        ("bench peers --output x --concurrency 0", "--concurrency"),
        ("bench compare no-such-report no-such-report", "no-such-report"),
        ("bench simulate x --experiment oversubscription", "either"),
        ("bench simulate --experiment floor --max-context 4096", "65537"),
        ("bench simulate --experiment floor --tps-floor 0", "--tps-floor"),
        ("bench simulate x --queue-timeout -1", "--queue-timeout"),
        ("bench simulate --experiment oversubscription --kv-tokens 9000", "--kv-tokens"),
        ("bench simulate no-such-trace", "no-such-trace"),
        ("bench simulate pyproject.toml", "line 1"),
        ("bench simulate x --hardware magic", "h200-32b"),
        ("bench simulate x --step-time fast", "prefill_token"),
        ("bench simulate x --step-time step=-1", "step_us"),
        ("bench simulate x --kv-tokens 1", "pages"),
        ("bench simulate x --speed 0", "--speed"),
        ("bench simulate x --scale 0", "--scale"),
        ("pull no-such-model", "no-such-model"),
        ("kernels explain no.such_op", "no.such_op"),
        ("kernels explain norm.rms_norm --dtype int7", "bfloat16"),
        ("kernels explain norm.rms_norm --trait x", "NAME=VALUE"),
        ("kernels verify no.such_op", "norm.rms_norm"),
        ("kernels verify norm.rms_norm --solution magic", "cpu, reference, triton"),
        ("kernels verify --dtype int7", "bfloat16"),
        ("kernels compile no.such_op", "norm.rms_norm"),
        ("kernels tune no.such_op", "attention.paged_mla"),
    ],
)
def test_an_error_is_one_clear_line_and_exit_code_1(line: str, named: str) -> None:
    result = run(*line.split())
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("tokenspeed: error: ")
    assert named in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "line", ["serve --port 0", "serve --port 99999", "serve --max-running 0", "serve --no-such"]
)
def test_wrong_usage_is_exit_code_2(line: str) -> None:
    assert run(*line.split()).exit_code == 2


def test_with_log_level_debug_the_error_itself_is_raised() -> None:
    result = run("serve", "--host", "0.0.0.0", "--log-level", "debug")
    assert isinstance(result.exception, ConfigError)


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"tokenspeed {__version__}\n")


def test_models_names_the_default() -> None:
    result = run("models")
    assert result.exit_code == 0
    assert "smollm2-135m (default)" in result.stdout


def test_env_tells_versions_cpu_memory_and_cache() -> None:
    result = run("env")
    assert result.exit_code == 0
    for name in ("python", "torch", "smg", "cpu flags", "cores", "memory", "devices", "cache"):
        assert f"\n{name} " in result.stdout


def test_kernels_list_and_explain() -> None:
    listed = run("kernels", "list")
    assert "norm.rms_norm\n  cpu:" in listed.stdout
    assert "\n  reference:rms_norm" in listed.stdout
    explained = run("kernels", "explain", "norm.rms_norm")
    assert "chosen" in explained.stdout


def test_the_command_starts_without_torch_and_grpc() -> None:
    script = (
        "import sys, tokenspeed.cli.main\n"
        "print(*sorted({'torch', 'grpc', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""
