"""The asynchronous interface: an engine in a process of its own."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from tokenspeed.core.config import EngineConfig
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.engine.client import ProgressCallback
from tokenspeed.engine.facts import EngineInfo, EngineStats
from tokenspeed.engine.outputs import TextDelta
from tokenspeed.engine.process import EngineProcess
from tokenspeed.engine.text import TextAssembler
from tokenspeed.engine.validation import check_one_engine

__all__ = ["AsyncLLM"]


class AsyncLLM:
    """A model to stream from: `llm = await AsyncLLM.start("smollm2-135m")`."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process
        self.info: EngineInfo = process.client.info
        self.tokenizer = process.client.tokenizer

    @classmethod
    async def start(
        cls,
        model: str | EngineConfig = "smollm2-135m",
        *,
        on_progress: ProgressCallback | None = None,
        **options: Any,
    ) -> "AsyncLLM":
        """Start an engine.

        Args:
            model: a path, a name of the catalogue, `pypi:...` or a hub id; or an `EngineConfig`.
            on_progress: called as the model loads.
            options: fields of `EngineConfig`.

        Raises:
            ModelError, ConfigError: as `LLM` raises them.
            EngineDead: the engine process ended without a word.
        """
        config = (
            EngineConfig(model=model, **options)
            if isinstance(model, str)
            else replace(model, **options)
        )
        check_one_engine(config)
        return cls(await EngineProcess.start(config, on_progress=on_progress))

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        salt: int = 0,
        priority: int = 0,
        tenant: str | None = None,
    ) -> AsyncIterator[TextDelta]:
        """Complete a prompt, delta by delta. Leaving the iteration ends the request.

        A text gets what the tokenizer puts around one, such as the token that begins it.

        Requests of one `tenant` share their turns; without one those of a salt do.

        Raises:
            RequestError: the prompt or a parameter is wrong.
            Overloaded: the request would wait for longer than `queue_timeout_s`.
            EngineDead: the engine is gone.
        """
        params = self.default_params() if params is None else params
        encode = self.tokenizer.encode
        ids = encode(prompt, add_special=True) if isinstance(prompt, str) else prompt
        stream = self._process.client.generate(
            ids, params, salt=salt, priority=priority, tenant=tenant
        )
        assembler = TextAssembler(self.tokenizer, params.stop)
        try:
            async for delta in stream:
                yield TextDelta(
                    text=assembler.push(delta),
                    token_ids=delta.token_ids,
                    logprobs=delta.logprobs,
                    prompt_tokens=stream.prompt_tokens,
                    cached_tokens=delta.cached_tokens,
                    cache=stream.cache,
                    finish_reason=delta.finish_reason,
                    drafted_tokens=stream.drafted_tokens,
                    accepted_tokens=stream.accepted_tokens,
                )
        finally:
            stream.abort()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> AsyncIterator[TextDelta]:
        """Answer a conversation, rendered with the model's own chat template."""
        # A template writes out what begins a text.
        rendered = self.tokenizer.render_chat(messages, tools=tools)
        return self.generate(self.tokenizer.encode(rendered), params)

    def default_params(self) -> SamplingParams:
        """Sampling as the model's own generation config asks for."""
        return SamplingParams.recommended(self.info.default_sampling)

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._process.pid

    async def stats(self) -> EngineStats:
        """Counters of the engine."""
        return await self._process.client.stats()

    async def close(self) -> None:
        """End the engine process."""
        await self._process.stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
