"""Requests shaped as agents send them are taken: no 4xx, whole and streamed."""

import asyncio
import json

from tests.support.agent_requests import AgentRequest, agent_requests
from tests.support.scripted_gateway import SpeakingEngine, behind_gateway
from tokenspeed.entrypoint.parsers import Parsers
from tokenspeed.loader import ModelFiles

# What the gateway (SMG 1.13.0) refuses by itself, before anything of ours sees it.
REFUSED = {
    "responses: local shell": 400,
}


async def statuses(engine: SpeakingEngine, requests: list[AgentRequest]) -> dict[str, str]:
    """What was not answered as it should be, by the request's name."""
    wrong = {}
    parsers = Parsers(tool_call="qwen", reasoning="passthrough")
    async with behind_gateway(engine, parsers) as client:
        for request in requests:
            for stream in (False, True) if request.streamed else (None,):
                body = request.body | {"model": "m"}
                if stream is not None:
                    body["stream"] = stream
                answer = await client.post(request.path, json=body, headers=request.headers)
                expected = REFUSED.get(request.name, 200)
                text = answer.text
                failed = (
                    stream and expected == 200 and ('"error"' in text or "response.failed" in text)
                )
                if answer.status_code != expected or failed:
                    wrong[f"{request.name}, stream {stream}"] = f"{answer.status_code} {text[:300]}"
    return wrong


def test_no_shape_of_an_agent_s_request_is_refused(qwen_coder: ModelFiles) -> None:
    engine = SpeakingEngine(qwen_coder.tokenizer_dir, model_name="m")
    engine.text = "On it."
    requests = agent_requests()
    assert len({request.name for request in requests}) == len(requests) >= 40
    wrong = asyncio.run(statuses(engine, requests))
    assert set(REFUSED) < {request.name for request in requests}
    assert not wrong, json.dumps(wrong, indent=1)
