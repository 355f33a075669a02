"""`tokenspeed bench simulate` on a small trace."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokenspeed.bench import plots
from tokenspeed.cli.main import app


def small(folder: Path) -> Path:
    path = folder / "small.jsonl"
    path.write_text(
        "".join(
            f'{{"timestamp": {turn * 900}, "input_length": {600 + 100 * turn}, '
            f'"output_length": 30, "hash_ids": [7], "session": "a", "turn": {turn}}}\n'
            for turn in range(4)
        )
    )
    return path


def test_the_table_names_what_was_asked_for(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "simulate", str(small(tmp_path))])
    assert result.exit_code == 0, result.output
    for word in ("hit rate", "optimum", "TPM", "TPS of a user", "TTFT, turn 0", "floor of 70"):
        assert word in result.stdout


def test_json_and_files_say_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "run"
    line = ["bench", "simulate", str(small(tmp_path)), "--json", "--output", str(folder)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((folder / "report.json").read_text())
    assert (report["requests"], report["finished"], report["output_tokens"]) == (4, 4, 120)
    assert report["cached_tokens"] == sum(((600 + 100 * n + 29) // 32) * 32 for n in range(3))
    for name in ("throughput", "tps", "ttft", "intervals", "hit_rate"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda _: None)
    line = ["bench", "simulate", str(small(tmp_path)), "--output", str(tmp_path)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 1
    assert "tokenspeed[bench]" in result.stderr
