"""The offline interface: many prompts in, all completions out, in this process."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tokenspeed import loader
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.errors import InvalidParameter, RequestError
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.stats import SchedulerStats
from tokenspeed.core.step import CacheReport
from tokenspeed.engine.build import build_engine
from tokenspeed.engine.facts import EngineInfo
from tokenspeed.engine.outputs import Completion, GenerationOutput
from tokenspeed.engine.stream import StopStrings, StreamTable, TokenDelta, TokenStream
from tokenspeed.engine.text import TextAssembler, stop_of
from tokenspeed.engine.validation import check_one_engine, checked_max_new_tokens, checked_prompt
from tokenspeed.engine.wire import Submit, error_of

__all__ = ["LLM", "Message", "Prompt"]

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
COMPLETIONS_MAX = 128
# So that Ctrl-C is noticed.
WAIT_S = 0.5


class LLM:
    """A model to call: `LLM("smollm2-135m").generate("Hello")`.

    Args:
        model: a path, a name of the catalogue, `pypi:...` or a hub id; or a whole `EngineConfig`.
        progress: whether to show the progress of download and load.
        options: fields of `EngineConfig`.

    Raises:
        ModelError: the model cannot be had, read or run.
        ConfigError: an option is wrong, or does not suit the model or the machine.
    """

    def __init__(
        self, model: str | EngineConfig = "smollm2-135m", *, progress: bool = False, **options: Any
    ) -> None:
        config = (
            EngineConfig(model=model, **options)
            if isinstance(model, str)
            else replace(model, **options)
        )
        check_one_engine(config)
        if progress:
            with loader.RichProgress() as shown:
                engine = build_engine(config, progress=shown)
        else:
            engine = build_engine(config)
        self._core = engine.core
        self.info: EngineInfo = engine.info
        self.tokenizer = loader.Tokenizer(Path(self.info.tokenizer_dir))
        self._requests = itertools.count(1)
        self._streams = StreamTable()

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
    ) -> list[GenerationOutput]:
        """Complete prompts, all of them together.

        Args:
            prompts: one text, or a list of texts and of lists of token ids. Texts get what the
                tokenizer puts around a text, such as the token that begins one; ids go as they are.
            params: one for all prompts, or one each; the model's defaults where None.
            n: completions of each prompt.

        Returns:
            One output a prompt, in order.

        Raises:
            RequestError: a prompt or a parameter is wrong; nothing was run. That a constraint
                cannot be enforced may come out later; all are ended then.
            Overloaded: a prompt would wait for longer than `queue_timeout_s`; all are ended.
        """
        wanted: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        if not 1 <= n <= COMPLETIONS_MAX:
            raise InvalidParameter(f"n must be in [1, {COMPLETIONS_MAX}], but is {n}")
        if params is None:
            params = self.default_params()
        each = [params] * len(wanted) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(wanted):
            raise InvalidParameter(f"{len(wanted)} prompts came with {len(each)} sets of params")
        ids = [
            self.tokenizer.encode(prompt, add_special=True)
            if isinstance(prompt, str)
            else list(prompt)
            for prompt in wanted
        ]
        messages = [
            (prompt, param, self._message(prompt, param, index))
            for prompt, param in zip(ids, each, strict=True)
            for index in range(n)
        ]
        collectors: list[_Collector] = []
        try:
            for message in messages:
                collectors.append(self._submit(*message))
            while len(self._streams):
                self._step()
                for collector in collectors:
                    collector.take()
        except RequestError:
            for collector in collectors:
                collector.abort()
            while len(self._streams):
                self._step()
            raise
        return [
            GenerationOutput(
                prompt_token_ids=prompt,
                cached_tokens=collectors[index * n].cached_tokens,
                cache=collectors[index * n].cache,
                completions=[c.completion() for c in collectors[index * n : (index + 1) * n]],
            )
            for index, prompt in enumerate(ids)
        ]

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        n: int = 1,
    ) -> GenerationOutput:
        """Answer a conversation, rendered with the model's own chat template."""
        # A template writes out what begins a text.
        prompt = self.tokenizer.encode(self.tokenizer.render_chat(messages, tools=tools))
        return self.generate([prompt], params, n=n)[0]

    def default_params(self) -> SamplingParams:
        """Sampling as the model's own generation config asks for."""
        return SamplingParams.recommended(self.info.default_sampling)

    def stats(self) -> SchedulerStats:
        """Counters of the scheduler."""
        return self._core.control.stats()

    def close(self) -> None:
        """Free the model; the object is of no use afterwards."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _message(self, prompt: list[int], params: SamplingParams, index: int) -> Submit:
        """A checked request; completions of one prompt beyond the first get seeds of their own."""
        checked = checked_prompt(prompt, self.info)
        return Submit(
            request=next(self._requests),
            prompt=checked.tobytes(),
            params=params,
            max_new_tokens=checked_max_new_tokens(len(checked), params, self.info),
            seed=None if params.seed is None else (params.seed + index) % 2**64,
            salt=0,
            priority=0,
            tenant=None,
        )

    def _submit(self, prompt: list[int], params: SamplingParams, message: Submit) -> "_Collector":
        stops = None
        if params.stop:
            stops = StopStrings(params.stop, self.tokenizer.incremental_detokenizer())
        stream = TokenStream(
            request=message.request,
            prompt_tokens=len(prompt),
            stop_strings=stops,
            abort=lambda: self._core.abort(message.request),
        )
        # What is refused at once has no stream to end.
        self._core.submit(message)
        self._streams.add(message.request, stream)
        return _Collector(stream, TextAssembler(self.tokenizer, params.stop))

    def _step(self) -> None:
        self._core.wait(WAIT_S)
        outputs = self._core.step()
        for refused in self._core.take_refused():
            self._streams.fail(refused.request, error_of(refused.kind, refused.message))
        if outputs is not None:
            self._streams.take(outputs)


class _Collector:
    """Gathers one stream into a completion."""

    def __init__(self, stream: TokenStream, assembler: TextAssembler) -> None:
        self._stream = stream
        self._assembler = assembler
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[Any] | None = None
        self._end: TokenDelta | None = None
        self.cached_tokens = 0

    @property
    def cache(self) -> CacheReport | None:
        """Where the prompt came from, once it was admitted."""
        return self._stream.cache

    def abort(self) -> None:
        """End the request, if it has not ended."""
        self._stream.abort()

    def take(self) -> None:
        """Take what has arrived."""
        delta = self._stream.take()
        if delta is None:
            return
        self._pieces.append(self._assembler.push(delta))
        self._token_ids += delta.token_ids
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        if delta.logprobs is not None:
            self._logprobs = (self._logprobs or []) + delta.logprobs
        if delta.finish_reason is not None:
            self._end = delta

    def completion(self) -> Completion:
        """The whole of an ended stream."""
        assert self._end is not None
        assert self._end.finish_reason is not None
        return Completion(
            text="".join(self._pieces),
            token_ids=self._token_ids,
            logprobs=self._logprobs,
            finish_reason=self._end.finish_reason,
            stop=stop_of(self._end),
            drafted_tokens=self._stream.drafted_tokens,
            accepted_tokens=self._stream.accepted_tokens,
        )
