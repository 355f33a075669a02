"""`tokenspeed chat`: a conversation in the terminal."""

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from tokenspeed.cli.generate import closing_deltas, sampling_overrides
from tokenspeed.cli.options import DEFAULT_MODEL, LogLevel, LogLevelOption, takes_engine_flags
from tokenspeed.cli.progress import load_progress
from tokenspeed.cli.reporting import reported
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.errors import ConfigError, RequestError
from tokenspeed.core.sampling import SamplingParams

if TYPE_CHECKING:
    from tokenspeed.engine.async_llm import AsyncLLM

__all__ = ["chat"]

# For a model that brings no sampling defaults of its own: at temperature 1, which they would mean,
# small models lose the thread.
_CALM = {"temperature": 0.3, "top_p": 0.9}
_HELP = "/reset begins anew, /exit ends, Ctrl-C stops an answer."


@takes_engine_flags
def chat(
    *,
    engine: Callable[[str], EngineConfig],
    model: Annotated[
        str, typer.Argument(help="Catalogue name, pypi:NAME, hub id ORG/NAME, or a path.")
    ] = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy [default: the model's, else 0.3].")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus sampling [default: the model's, else 0.9].")
    ] = None,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Talk to a model; a pipe gives one message a line."""
    with reported(log_level):
        overrides = sampling_overrides(
            max_new_tokens=max_tokens, temperature=temperature, top_p=top_p
        )
        asyncio.run(_chat(engine(model), system, overrides))


async def _chat(config: EngineConfig, system: str | None, overrides: dict[str, Any]) -> None:
    from tokenspeed.engine.async_llm import AsyncLLM  # noqa: PLC0415

    with load_progress() as on_progress:
        llm = await AsyncLLM.start(config, on_progress=on_progress)
    async with llm:
        if not llm.tokenizer.has_chat_template:
            raise ConfigError(
                f"{llm.info.model_name} has no chat template; use `tokenspeed generate` for it"
            )
        calm = {} if llm.info.default_sampling else _CALM
        params = msgspec.structs.replace(llm.default_params(), **{**calm, **overrides})
        opening = [] if system is None else [{"role": "system", "content": system}]
        await _Conversation(llm, opening, params).run()


class _Conversation:
    def __init__(
        self, llm: "AsyncLLM", opening: list[dict[str, str]], params: SamplingParams
    ) -> None:
        self._llm = llm
        self._opening = opening
        self._messages = list(opening)
        self._params = params
        self._interactive = sys.stdin.isatty()
        self._line: asyncio.Future[bool] | None = None
        self._answering: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Read and answer until the input ends."""
        if self._interactive:
            print(f"{self._llm.info.model_name}. {_HELP}", file=sys.stderr)
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._interrupt)
        while (line := await self._read_line()) is not None:
            match line.strip():
                case "":
                    continue
                case "/exit":
                    return
                case "/reset":
                    self._messages = list(self._opening)
                case text if text.startswith("/"):
                    print(f"no command {text.split()[0]}; {_HELP}", file=sys.stderr)
                case text:
                    await self._exchange(text)

    def _interrupt(self) -> None:
        """Ctrl-C ends the answer; where there is none, the conversation."""
        if self._answering is not None:
            self._answering.cancel()
        elif self._line is not None and not self._line.done():
            self._line.set_result(False)

    async def _read_line(self) -> str | None:
        """The next line, or None at the end of the input."""
        if not self._interactive:
            return sys.stdin.readline() or None
        print("> ", end="", file=sys.stderr, flush=True)
        # A thread that waits for a terminal cannot be ended; the loop watches it instead.
        loop = asyncio.get_running_loop()
        line = self._line = loop.create_future()
        loop.add_reader(sys.stdin.fileno(), _set, line)
        try:
            there = await line
        finally:
            loop.remove_reader(sys.stdin.fileno())
        return (sys.stdin.readline() or None) if there else None

    async def _exchange(self, text: str) -> None:
        """Answer one message; a message that cannot be answered is forgotten."""
        self._messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        self._answering = asyncio.create_task(self._answer(pieces))
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await self._answering
        except RequestError as error:
            print(f"tokenspeed: {error}", file=sys.stderr)
            self._messages.pop()
            return
        finally:
            self._answering = None
        print()
        self._messages.append({"role": "assistant", "content": "".join(pieces)})

    async def _answer(self, pieces: list[str]) -> None:
        """Print an answer as it comes, then its speed."""
        began_s = time.monotonic()
        first_s: float | None = None
        tokens = 0
        async with closing_deltas(self._llm.chat(self._messages, self._params)) as deltas:
            async for delta in deltas:
                first_s = first_s or time.monotonic()
                tokens += len(delta.token_ids)
                pieces.append(delta.text)
                print(delta.text, end="", flush=True)
        if first_s is None or tokens < 2:
            return
        speed = (tokens - 1) / max(time.monotonic() - first_s, 1e-9)
        print(
            f"\n[{delta.prompt_tokens} prompt tokens, {delta.cached_tokens} cached; {tokens} "
            f"tokens, the first after {first_s - began_s:.2f} s, then {speed:.1f} tokens/s]",
            end="",
            file=sys.stderr,
        )


def _set(line: "asyncio.Future[bool]") -> None:
    if not line.done():
        line.set_result(True)
