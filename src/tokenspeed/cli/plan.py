"""`tokenspeed plan`: what a model does between ranks, and what each rank holds."""

from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from tokenspeed.cli.options import DEFAULT_MODEL, DType, LogLevel, LogLevelOption, parse_size
from tokenspeed.cli.reporting import reported

if TYPE_CHECKING:
    from tokenspeed.engine.outline import Outline

__all__ = ["plan"]


def plan(
    *,
    model: Annotated[
        str, typer.Argument(help="As for `serve`; a config.json alone is enough.")
    ] = DEFAULT_MODEL,
    tp: Annotated[int, typer.Option(min=1, help="Ranks that share a layer.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Ranks that share the experts.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Groups with requests of their own.")] = 1,
    cp: Annotated[int, typer.Option(min=1, help="Ranks that share a context.")] = 1,
    dtype: Annotated[DType, typer.Option(help="Element type of what is not packed.")] = DType.AUTO,
    max_context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a context [default: the model's].")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of each rank, as 24GiB.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Print what a model's ranks would exchange and hold.

    No weight is loaded.
    """
    with reported(log_level):
        # Imported late: torch takes seconds, and `--help` should not.
        from tokenspeed.distributed import Mesh  # noqa: PLC0415
        from tokenspeed.engine.outline import outline  # noqa: PLC0415

        found = outline(
            model,
            Mesh(tp=tp, ep=ep, dp=dp, cp=cp),
            dtype=dtype.value,
            max_context=max_context,
            memory_size_bytes=None if memory is None else parse_size(memory, "--memory"),
        )
        if json:
            typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
            return
        _print(found)


def _print(found: "Outline") -> None:
    from tokenspeed.engine.sizing import format_size  # noqa: PLC0415

    degrees = " ".join(
        f"{name}={value}"
        for name, value in (("tp", found.tp), ("ep", found.ep), ("dp", found.dp), ("cp", found.cp))
        if value > 1 or name == "tp"
    )
    typer.echo(
        f"{found.model}: {found.architecture}, weights {found.weights}, {degrees}, "
        f"ranks: {found.ranks}"
    )
    for step in found.steps:
        into = ", float32 into the norm" if step.float32_sum else ""
        moved = ", ".join(
            f"{size:,.0f} B a {unit}"
            for size, unit in (
                (step.token_size_bytes, "token"),
                (step.sample_size_bytes, "sampled token"),
            )
            if size
        )
        typer.echo(
            f"  {step.count:4} x {step.kind} over {step.ranks}{into}: {step.source} -> "
            f"{step.before}, {step.parameter}{': ' + moved if moved else ''}"
        )
    typer.echo(
        f"a rank sends, in {found.collectives} collectives: {found.token_size_bytes:,.0f} B a "
        f"token, {found.sample_size_bytes:,.0f} B a sampled token"
    )
    typer.echo(
        f"a rank holds: {format_size(found.weights_size_bytes)} of weights, "
        f"{found.kv_token_size_bytes:,} B of KV a token, "
        f"{format_size(found.kv_token_size_bytes * found.context_max)} for a context of "
        f"{found.context_max:,}"
    )
    if found.fit is not None:
        room = format_size(found.fit.memory_size_bytes)
        if not found.fit.tokens:
            verdict = f"does not fit in {room}: the weights alone take more"
        elif found.fit.fits:
            verdict = f"fits in {room}, with KV for {found.fit.tokens:,} tokens"
        else:
            verdict = (
                f"does not fit in {room}: there is KV for {found.fit.tokens:,} tokens; "
                "--max-context may be lowered to that"
            )
        typer.echo(verdict)
