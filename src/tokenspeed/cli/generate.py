"""`tokenspeed generate`: one completion of one prompt."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec
import typer

from tokenspeed.cli.options import DEFAULT_MODEL, LogLevel, LogLevelOption, takes_engine_flags
from tokenspeed.cli.progress import load_progress
from tokenspeed.cli.reporting import reported
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.errors import ConfigError

if TYPE_CHECKING:
    from tokenspeed.engine.outputs import TextDelta

__all__ = ["closing_deltas", "generate", "sampling_overrides"]


@takes_engine_flags
def generate(
    *,
    engine: Callable[[str], EngineConfig],
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help=f"The prompt, after the model if not {DEFAULT_MODEL}; - reads it from stdin.",
        ),
    ],
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy [default: the model's].")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus sampling [default: the model's].")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends the text; repeatable.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end, not the text.")
    ] = False,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Complete a prompt as plain text, without the chat template."""
    with reported(log_level):
        model, prompt = _model_and_prompt(words)
        overrides = sampling_overrides(
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=tuple(stop) if stop else None,
        )
        asyncio.run(_generate(engine(model), prompt, overrides, as_json=as_json))


def sampling_overrides(**values: Any) -> dict[str, Any]:
    """The fields of `SamplingParams` that were given on the command line."""
    return {name: value for name, value in values.items() if value is not None}


def closing_deltas(
    deltas: AsyncIterator["TextDelta"],
) -> "contextlib.aclosing[AsyncGenerator[TextDelta]]":
    """A context that ends the request when it is left, however it is left."""
    return contextlib.aclosing(cast("AsyncGenerator[TextDelta]", deltas))


def _model_and_prompt(words: list[str]) -> tuple[str, str]:
    if len(words) > 2:
        raise ConfigError(
            f"generate takes [MODEL] PROMPT, but got {len(words)} words; quote the prompt"
        )
    model, prompt = (DEFAULT_MODEL, words[0]) if len(words) == 1 else (words[0], words[1])
    return model, sys.stdin.read() if prompt == "-" else prompt


async def _generate(
    config: EngineConfig, prompt: str, overrides: dict[str, Any], *, as_json: bool
) -> None:
    # One request runs, so that room for more would be room for nobody.
    config = replace(config, max_running=1)
    from tokenspeed.engine.async_llm import AsyncLLM  # noqa: PLC0415

    with load_progress() as on_progress:
        llm = await AsyncLLM.start(config, on_progress=on_progress)
    async with llm:
        params = msgspec.structs.replace(llm.default_params(), **overrides)
        began_s = time.monotonic()
        text, token_ids, last = "", [], None
        async with closing_deltas(llm.generate(prompt, params)) as deltas:
            async for delta in deltas:
                text += delta.text
                token_ids += delta.token_ids
                last = delta
                if not as_json:
                    print(delta.text, end="", flush=True)
        elapsed_s = time.monotonic() - began_s
    if not as_json:
        print()
        return
    assert last is not None
    assert last.finish_reason is not None
    print(
        json.dumps(
            {
                "model": llm.info.model_name,
                "text": text,
                "token_ids": token_ids,
                "finish_reason": last.finish_reason.name.lower(),
                "prompt_tokens": last.prompt_tokens,
                "cached_tokens": last.cached_tokens,
                "completion_tokens": len(token_ids),
                "seconds": round(elapsed_s, 3),
            },
            ensure_ascii=False,
        )
    )
