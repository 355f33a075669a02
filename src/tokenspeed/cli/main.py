"""The `tokenspeed` command."""

from typing import Annotated

import typer

from tokenspeed import __version__
from tokenspeed.cli.bench import bench_app
from tokenspeed.cli.chat import chat
from tokenspeed.cli.env import env
from tokenspeed.cli.generate import generate
from tokenspeed.cli.kernels import kernels_app
from tokenspeed.cli.models import models, pull
from tokenspeed.cli.plan import plan
from tokenspeed.cli.serve import serve
from tokenspeed.cli.top import top

__all__ = ["app", "run"]

app = typer.Typer(
    name="tokenspeed",
    help="An LLM inference engine for coding agents.",
    no_args_is_help=True,
    # Plain help: boxes cut long flags short, and brackets would be read as markup.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tokenspeed {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_version, help="Show the version."),
    ] = False,
) -> None:
    """An LLM inference engine for coding agents."""


app.command()(serve)
app.command()(top)
app.command()(chat)
app.command()(generate)
app.command()(pull)
app.command()(models)
app.command()(plan)
app.command()(env)
app.add_typer(bench_app, name="bench")
app.add_typer(kernels_app, name="kernels")


def run() -> None:
    """Entry point of the `tokenspeed` script."""
    app()
