"""More asked than can be served in time: some get their floor, the others hear when to return."""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tokenspeed import LLM, SamplingParams
from tokenspeed.core.errors import Overloaded
from tokenspeed.core.step import FinishReason
from tokenspeed.loader import ModelFiles

from .serving import Serve


def test_the_gateway_answers_429_and_when_to_return(
    smollm2: ModelFiles, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = tmp_path_factory.mktemp("overload") / "log"
    with Serve(log, "--max-running", "1", "--queue-timeout", "0.5") as server:

        def ask(index: int) -> tuple[int, str]:
            body = {
                "model": "smollm2-135m",
                "messages": [{"role": "user", "content": f"Tell story {index}."}],
                "max_tokens": 100,
                "ignore_eos": True,
                "stream": index % 2 == 0,
            }
            request = urllib.request.Request(
                f"{server.url}/v1/chat/completions",
                json.dumps(body).encode(),
                {
                    "content-type": "application/json",
                    "x-request-id": f"tenant=t{index % 3}/{index}",
                },
            )
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, range(6)))
        statuses = sorted(status for status, _ in answers)
        assert statuses[0] == 200, answers
        assert statuses[-1] == 429, answers
        assert set(statuses) == {200, 429}
        refusals = [json.loads(text)["error"] for status, text in answers if status == 429]
        assert all(refusal["type"] == "rate_limit_error" for refusal in refusals)
        assert all("retry after " in refusal["message"] for refusal in refusals)
        with server.servicer() as channel:
            counters = server.wait_until_idle(channel)
        assert counters["refusals"] == len(refusals)
        assert counters["pages_active"] == 0


def test_llm_raises_and_is_of_use_afterwards(smollm2: ModelFiles) -> None:
    params = SamplingParams(temperature=0.0, max_new_tokens=60, ignore_eos=True)
    options = {"max_context": 512, "max_running": 1, "tps_floor": 70.0, "queue_timeout_s": 0.2}
    with LLM(str(smollm2.path), **options) as llm:
        assert llm.info.tps_floor == 70.0
        assert llm.info.tps_alone is not None
        with pytest.raises(Overloaded) as caught:
            llm.generate(["One.", "Two.", "Three."], params)
        assert caught.value.retry_after_s >= 1.0
        stats = llm.stats()
        assert (stats.running, stats.waiting, stats.pages_active) == (0, 0, 0)
        (output,) = llm.generate("Once more.", params)
        assert output.completions[0].finish_reason is FinishReason.LENGTH
