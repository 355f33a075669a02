"""The operations port of a real server: what it tells of real requests."""

import json
import re
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tokenspeed.loader import ModelFiles

from .serving import Serve, run_cli, wait_for

CHAT = {"model": "smollm2-135m", "ignore_eos": True}


@pytest.fixture(scope="module")
def watched(
    smollm2: ModelFiles, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Serve, httpx.Client]]:
    # A floor that leaves room for guesses however busy the machine is.
    log = tmp_path_factory.mktemp("operations") / "log"
    with Serve(log, "--no-curl", "--tps-floor", "1") as server:
        url = server.operations_url()
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
            yield server, http


def ask(server: Serve, words: str, *, request_id: str, max_tokens: int = 24) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/chat/completions",
        json={**CHAT, "messages": [{"role": "user", "content": words}], "max_tokens": max_tokens},
        headers={"x-request-id": request_id},
        timeout=500,
        trust_env=False,
    )


def test_every_millisecond_of_a_request_has_a_name(watched: tuple[Serve, httpx.Client]) -> None:
    server, http = watched
    began_s = time.time()
    name = f"tenant=ann/start={int(began_s * 1000)}/one"
    assert ask(server, "Tell me of the sea.", request_id=name).status_code == 200
    took_ms = (time.time() - began_s) * 1000
    view = wait_for(
        lambda: http.get(f"/requests/{name}").json(), lambda view: view.get("state") == "ended"
    )
    assert view["outcome"] == "length"
    assert view["output_tokens"] == 24
    assert view["tenant"] == "ann"
    assert view["ttft_ms"] > 0
    (sample,) = view["samples"]
    phases = sample["phases_ms"]
    assert min(phases.values()) >= 0
    assert phases["prefill"] > 0
    assert phases["decode"] > 0
    assert phases["gateway"] >= 0
    assert sum(phases.values()) == pytest.approx(view["total_ms"], abs=1e-3)
    # The client saw all of it, and what its own connection took; its clock is in whole ms.
    assert view["total_ms"] <= took_ms + 1
    cache = view["cache"]
    told = cache["cached_tokens"] + cache["evicted_tokens"]
    assert told + cache["unseen_tokens"] + cache["tail_tokens"] == view["prompt_tokens"]


def test_metrics_of_a_real_engine(watched: tuple[Serve, httpx.Client]) -> None:
    server, http = watched
    assert ask(server, "Count.", request_id="metrics").status_code == 200
    wait_for(lambda: http.get("/requests/metrics").json().get("state"), lambda s: s == "ended")
    values = {
        name: float(value)
        for name, value in (
            line.rsplit(" ", 1)
            for line in http.get("/metrics").text.splitlines()
            if not line.startswith("#")
        )
    }
    assert values['tokenspeed_requests_total{outcome="length"}'] >= 1
    assert values["tokenspeed_time_to_first_token_seconds_count"] >= 1
    assert values["tokenspeed_user_tokens_per_second_count"] >= 1
    intervals = values["tokenspeed_inter_token_seconds_count"]
    assert intervals >= 23
    assert values['tokenspeed_inter_token_seconds_bucket{le="+Inf"}'] == intervals
    assert values["tokenspeed_inter_token_seconds_sum"] > 0
    assert 0 <= values["tokenspeed_floor_violations_total"] <= intervals
    pages = [values[f'tokenspeed_pages{{state="{s}",tier="device"}}'] for s in PAGE_STATES]
    assert sum(pages) == http.get("/cache").json()["device"]["total"]
    assert values['tokenspeed_step_seconds_total{part="forward"}'] > 0
    # A step gives a user several tokens where guesses are right.
    steps = values['tokenspeed_steps_total{kind="decode"}']
    assert steps >= 23 - values["tokenspeed_accepted_tokens_total"]
    assert values['tokenspeed_request_phase_seconds_total{phase="decode"}'] > 0
    assert values["tokenspeed_healthy"] == 1


def test_guesses_are_counted_in_usage_requests_and_metrics(
    watched: tuple[Serve, httpx.Client],
) -> None:
    server, http = watched
    code = "def load(self, page: int) -> list[str]:\n    token = self.find(page, 12)\n" * 4
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={
            **CHAT,
            "messages": [{"role": "user", "content": f"Repeat this code:\n{code}"}],
            "max_tokens": 200,
            "temperature": 0.0,
        },
        headers={"x-request-id": "drafts"},
        timeout=500,
        trust_env=False,
    ).json()
    view = wait_for(
        lambda: http.get("/requests/drafts").json(), lambda view: view.get("state") == "ended"
    )
    (sample,) = view["samples"]
    drafted, accepted = sample["drafted_tokens"], sample["accepted_tokens"]
    assert 0 < accepted <= drafted
    told = answer["usage"]["completion_tokens_details"]
    assert told["accepted_prediction_tokens"] == accepted
    assert told["rejected_prediction_tokens"] == drafted - accepted
    counters = http.get("/metrics").text
    for name, least in (("draft", drafted), ("accepted", accepted)):
        found = re.search(rf"^tokenspeed_{name}_tokens_total (\S+)$", counters, re.MULTILINE)
        assert found is not None
        assert float(found[1]) >= least


PAGE_STATES = ("free", "cached", "active")


def test_turns_are_a_session_whose_prefix_comes_from_cache(
    watched: tuple[Serve, httpx.Client],
) -> None:
    server, http = watched
    messages = [{"role": "user", "content": "A story of a fox, a crow and a cheese. " * 8}]
    for turn in range(3):
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={**CHAT, "messages": messages, "max_tokens": 20},
            headers={"x-request-id": f"tenant=fox/{turn}"},
            timeout=500,
            trust_env=False,
        )
        messages.append(answer.json()["choices"][0]["message"])
        messages.append({"role": "user", "content": "Go on."})
    wait_for(lambda: http.get("/requests/tenant=fox/2").json().get("state"), lambda s: s == "ended")
    (session,) = [one for one in http.get("/sessions").json()["sessions"] if one["tenant"] == "fox"]
    assert session["requests"] == 3
    assert session["cached_tokens"] > 0
    assert session["running"] == []


def test_a_running_request_is_seen_with_its_rate(watched: tuple[Serve, httpx.Client]) -> None:
    server, http = watched
    thread = threading.Thread(
        target=ask,
        args=(
            server,
            "Go on and on.",
        ),
        kwargs={"request_id": "long", "max_tokens": 600},
    )
    thread.start()
    view = wait_for(
        lambda: http.get("/requests/long").json(),
        lambda view: (
            view.get("state") == "running" and view["samples"][0].get("tokens_per_s") is not None
        ),
    )
    (sample,) = view["samples"]
    assert sample["phases_ms"]["decode"] > 0
    assert sample["tokens_per_s"] > 0
    assert sample["floor_tokens_per_s"] is not None
    thread.join()


def test_drain_and_resume_over_the_gateway(watched: tuple[Serve, httpx.Client]) -> None:
    server, http = watched
    assert http.post("/drain").json()["draining"] is True
    refused = ask(server, "Anyone?", request_id="drained")
    assert refused.status_code == 429
    assert "draining" in refused.text
    assert http.post("/resume").json()["draining"] is False
    assert ask(server, "Anyone?", request_id="resumed").status_code == 200


def test_the_chat_box_streams_from_the_model(watched: tuple[Serve, httpx.Client]) -> None:
    _, http = watched
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    with http.stream("POST", "/chat", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 2
    words = "".join(
        choice["delta"].get("content") or ""
        for line in lines[:-1]
        for choice in json.loads(line[6:])["choices"]
    )
    assert words
    refused = http.post("/chat", json={"messages": [{"role": "user", "content": "x" * 60_000}]})
    assert refused.status_code == 400


def test_top_prints_one_look(watched: tuple[Serve, httpx.Client]) -> None:
    server, http = watched
    ask(server, "Hi", request_id="tenant=\x1b]0;evil/1")
    ask(server, "Hi", request_id="tenant=[bold]bob/1")
    looked = run_cli("top", "--once", "--operations", str(http.base_url))
    assert looked.returncode == 0, looked.stderr
    assert "smollm2-135m" in looked.stdout
    assert "[bold]bob" in looked.stdout
    assert "\x1b]0;evil" not in looked.stdout
    assert "pages of 32 tokens" in looked.stdout


def test_top_says_which_flag_is_wrong_when_nobody_answers() -> None:
    failed = run_cli("top", "--once", "--operations", "http://127.0.0.1:9")
    assert failed.returncode == 1
    assert "--operations" in failed.stderr
    assert "tokenspeed serve" in failed.stderr
    wrong = run_cli("top", "--once", "--operations", "ftp://x")
    assert wrong.returncode == 1
    assert "unix:PATH" in wrong.stderr


def test_a_server_without_an_operations_port(smollm2: ModelFiles, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    log = tmp_path_factory.mktemp("none") / "log"
    with Serve(log, "--operations-port", "0", "--no-curl") as server:
        assert ask(server, "Hi", request_id="a").status_code == 200
