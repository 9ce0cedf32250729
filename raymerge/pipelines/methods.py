"""`raymerge methods`: what each method does, its parameters, their defaults and ranges."""

from __future__ import annotations

import inspect
import textwrap
import typing
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from raymerge.errors import MergeError
from raymerge.merging.dialects import method_of, methods_of
from raymerge.merging.methods import Method


def methods(names: Sequence[str] = (), *, dialect: str = "delta") -> int:
    """Print the methods of a dialect, all in short or those named in full. Raises MergeError for an unknown name.

    Returns the exit status.
    """
    chosen = [method_of(name, dialect) for name in names] or list(methods_of(dialect).values())
    console = Console()
    for number, method in enumerate(chosen):
        if number and names:
            console.print()
        _describe(console, method, full=bool(names))
    if not names:
        console.print("\n`raymerge methods NAME` says more of one.", style="dim", highlight=False)
    return 0


def range_of(method: Method, parameter: str) -> str:
    """The values that a parameter takes, in words: those of a choice, bounds, or what its own check expects."""
    field = method.parameters.model_fields[parameter]
    if typing.get_origin(field.annotation) is typing.Literal:
        return " or ".join(str(value) for value in typing.get_args(field.annotation))
    if field.annotation is bool:
        return "true or false"
    if field.annotation in (int, float):
        words = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
        bounds = [f"{word} {getattr(one, key)}" for one in field.metadata for key, word in words.items()
                  if getattr(one, key, None) is not None]  # fmt: skip
        return " ".join(["a whole number" if field.annotation is int else "a number", *bounds])
    try:
        method.resolve({parameter: {}})  # what no parameter can be
    except MergeError as error:
        return str(error).splitlines()[1].removeprefix("Expected ").partition(", or patterns")[0]
    raise AssertionError(f"{method.name}: {parameter} takes anything")


def _describe(console: Console, method: Method, *, full: bool) -> None:
    def say(text: str, indent: int, style: str = "") -> None:
        for line in textwrap.wrap(text, min(console.width, 100) - indent):
            console.print(Text(" " * indent + line, style=style), soft_wrap=True)

    say(method.name, 0, "bold")
    taken = _experts(method)
    say(method.summary + (f"; {taken}" if taken else ""), 2)
    for name, default in method.defaults.items():
        shown = "" if default is None else f" = {default}"
        say(f"{name}{shown}  ({range_of(method, name)})", 4, "dim")
    for part in _more(method) if full else []:
        say(part, 2)


def _experts(method: Method) -> str:
    if method.most is not None:
        return f"takes {method.fewest}" if method.fewest == method.most else f"takes {method.fewest} to {method.most}"
    return f"takes {method.fewest} or more" if method.fewest > 1 else ""


def _more(method: Method) -> list[str]:
    """What its parameters mean, and what its users should know."""
    found = []
    for model in reversed(method.parameters.__mro__):
        if set(inspect.get_annotations(model)) & set(method.parameters.model_fields) and model.__doc__:
            found.append(" ".join(model.__doc__.split()))
    if not method.signed:
        found.append("Weights may not be negative.")
    return found + ([method.note] if method.note else [])
