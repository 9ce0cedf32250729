"""The application that commands register with, and what they share."""

from __future__ import annotations

from typing import Any

import typer

app = typer.Typer(
    name="raymerge",
    help="Merge hundreds of LoRA adapters into better ones, on Ray.\n\nExit status: 0 all done, 1 some items failed, "
    "2 bad input. --debug shows a traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def option(name: str, metavar: str, text: str) -> Any:
    """An option with its name in the help's own terms."""
    return typer.Option(name, metavar=metavar, help=text)


def end(status: int) -> None:
    """Leave with an exit status."""
    raise typer.Exit(status)
