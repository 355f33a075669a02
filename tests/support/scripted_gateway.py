"""The real gateway before an engine that says what a test tells it to."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from msgspec.structs import replace

from tests.unit.entrypoint.scripted_engine import ScriptedEngine
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import FinishReason
from tokenspeed.engine.stream import TokenStream
from tokenspeed.entrypoint.gateway import Gateway, GatewayConfig, unused_port
from tokenspeed.entrypoint.parsers import Parsers
from tokenspeed.entrypoint.servicer import Servicer, start_server
from tokenspeed.loader import Tokenizer

__all__ = ["SpeakingEngine", "behind_gateway", "folder_with_template"]


class SpeakingEngine(ScriptedEngine):
    """Answers each request with a text, one token a step.

    Attributes:
        text: what it says.
        delay_s: how long it is silent before.
        chunk_tokens: how many tokens it says at once.
        asked: what it was asked, as text.
        servicer: what asks it.
    """

    def __init__(self, tokenizer_dir: Path, **info: Any) -> None:
        super().__init__(tokenizer_dir)
        self.vocabulary = Tokenizer(tokenizer_dir)
        self.tokenizer = self.vocabulary  # type: ignore[assignment]
        self.info = replace(
            self.info, vocab_size=self.vocabulary.vocab_size, context_max=4096, **info
        )
        self.text = ""
        self.delay_s = 0.0
        self.chunk_tokens = 1
        self.asked: list[str] = []
        self.servicer = Servicer()
        self.speaking: list[asyncio.Task[None]] = []

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        salt: int = 0,
        priority: int = 0,
        tenant: str | None = None,
    ) -> TokenStream:
        stream = super().generate(prompt, params, salt=salt, priority=priority, tenant=tenant)
        self.asked.append(self.vocabulary.decode(prompt, skip_special=False))
        self.speaking.append(asyncio.create_task(self._speak(stream)))
        return stream

    async def _speak(self, stream: TokenStream) -> None:
        await asyncio.sleep(self.delay_s)
        tokens = self.vocabulary.encode(self.text)
        for start in range(0, len(tokens), self.chunk_tokens):
            for token in tokens[start : start + self.chunk_tokens]:
                stream.push(token, 0)
            # Long enough for the chunk to leave by itself.
            await asyncio.sleep(0.002)
        stream.push_end(FinishReason.STOP, stop_token_id=self.info.eos_token_ids[0])


def folder_with_template(
    tokenizer_dir: Path, template: str, target: Path, marks: Sequence[str] = ()
) -> Path:
    """A copy of a tokenizer that has another chat template, and a token for each of the marks."""
    shutil.copytree(tokenizer_dir, target)
    path = target / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    known = {token["content"] for token in tokenizer["added_tokens"]}
    unused = max(token["id"] for token in tokenizer["added_tokens"]) + 1
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"] += [
        {"id": unused + index, "content": mark, "special": False} | plain
        for index, mark in enumerate(mark for mark in marks if mark not in known)
    ]
    path.write_text(json.dumps(tokenizer))
    (target / "chat_template.jinja").unlink(missing_ok=True)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return target


@asynccontextmanager
async def behind_gateway(
    engine: SpeakingEngine, parsers: Parsers, **config: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the gateway's, which asks the engine through a servicer of ours."""
    engine.servicer.attach(engine)  # type: ignore[arg-type]
    server, port = await start_server(engine.servicer)
    gateway = await Gateway.launch(
        GatewayConfig(
            host="127.0.0.1",
            port=unused_port(),
            worker_ports=(port,),
            prometheus_port=unused_port(),
            tokenizer_dir=Path(engine.info.tokenizer_dir),
            parsers=parsers,
            **config,
        )
    )
    try:
        await gateway.wait_ready(model_name=engine.info.model_name, timeout_s=120)
        key = config.get("api_key")
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=120) as client:
            yield client
    finally:
        gateway.kill()
        await gateway.exited
        await server.stop(None)
