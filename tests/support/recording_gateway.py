"""The real gateway before a servicer that keeps the tokens it is sent, and runs no model."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb

from tests.unit.entrypoint.scripted_engine import ScriptedEngine
from tokenspeed.entrypoint.gateway import Gateway, GatewayConfig, unused_port
from tokenspeed.entrypoint.parsers import PASSTHROUGH, Parsers
from tokenspeed.entrypoint.servicer import Servicer, start_server

CONTEXT_MAX = 1 << 20


class Recorder(Servicer):
    """Answers every prompt with one token, and keeps the ids of the last prompt."""

    def __init__(self, tokenizer_dir: Path) -> None:
        super().__init__(token_exact_history=False)
        engine = ScriptedEngine(tokenizer_dir)
        engine.info = msgspec.structs.replace(
            engine.info, context_max=CONTEXT_MAX, pages=CONTEXT_MAX
        )
        self.model = engine.info.model_name
        self.ids: list[int] = []
        self.attach(engine)  # type: ignore[arg-type]

    async def Generate(self, request: Any, context: Any) -> None:
        """Keep the prompt, and end."""
        self.ids = list(request.tokenized.input_ids)
        complete = pb.GenerateComplete(
            output_ids=[100], finish_reason="length", prompt_tokens=len(self.ids)
        )
        await context.write(pb.GenerateResponse(request_id=request.request_id, complete=complete))


@dataclass(frozen=True, kw_only=True)
class RecordingGateway:
    """A gateway that runs; `encode` gives the tokens it makes of a conversation."""

    pid: int
    client: httpx.AsyncClient
    recorder: Recorder

    async def encode(self, messages: list[dict[str, str]]) -> list[int]:
        body = {"model": self.recorder.model, "messages": messages, "max_tokens": 1}
        reply = await self.client.post("/v1/chat/completions", json=body)
        reply.raise_for_status()
        return self.recorder.ids


@asynccontextmanager
async def recording_gateway(
    tokenizer_dir: Path, *, encoding_cache: bool
) -> AsyncIterator[RecordingGateway]:
    """A gateway over a tokenizer, with its cache of encodings or without."""
    recorder = Recorder(tokenizer_dir)
    server, worker_port = await start_server(recorder)
    gateway = await Gateway.launch(
        GatewayConfig(
            host="127.0.0.1",
            port=unused_port(),
            worker_ports=(worker_port,),
            prometheus_port=unused_port(),
            tokenizer_dir=tokenizer_dir,
            parsers=Parsers(tool_call=PASSTHROUGH, reasoning=PASSTHROUGH),
            encoding_cache=encoding_cache,
        )
    )
    try:
        await gateway.wait_ready(model_name=recorder.model, timeout_s=60)
        async with httpx.AsyncClient(base_url=gateway.url, timeout=60, trust_env=False) as client:
            yield RecordingGateway(pid=gateway.pid, client=client, recorder=recorder)
    finally:
        await gateway.stop(is_idle=lambda: True)
        await server.stop(None)
