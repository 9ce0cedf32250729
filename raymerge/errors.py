"""One class for each story a user can meet. Each is also the built-in it refines, and all survive pickling.

The first line of a message says what happened and where; the lines after it what was expected, what was found and
what to do. The command line prints the message alone; a traceback needs `--debug`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """` Did you mean NAME?` for the nearest of the allowed names, or nothing where none is near."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def unknown(what: str, name: str, allowed: Iterable[str], shown: str | None = None) -> str:
    """The text that refuses an unknown name, with the nearest and all allowed ones. shown: how it is printed."""
    names = sorted(allowed)
    return f"unknown {what} {shown or repr(name)}.{did_you_mean(name, names)}\nAllowed: {', '.join(names) or 'none'}."


class RaymergeError(Exception):
    """Anything raymerge refuses or gives up. Takes the whole message as its one argument."""


class StorageError(RaymergeError, OSError):
    """A file or folder that cannot be read or written."""

    def __str__(self) -> str:
        return str(self.args[0])


class ProjectError(RaymergeError, ValueError):
    """A project file that says something impossible or unknown."""


class RecipeError(RaymergeError, ValueError):
    """A recipe with an unknown strategy, method or parameter."""


class PersonaError(RaymergeError, ValueError):
    """Examples that cannot be used: a broken line, an unknown split, a persona without any."""


class AdapterError(RaymergeError, ValueError):
    """An adapter that cannot be read for what it is: truncated, NaN, a shape that does not fit."""


class UnsupportedAdapterError(AdapterError):
    """An adapter whose meaning is not plain LoRA; refused by name rather than read wrongly."""


class MergeError(RaymergeError, ValueError):
    """Adapters or weights that cannot be merged."""


class RankError(MergeError):
    """A rank that is no rank."""


class RoutingError(RaymergeError, ValueError):
    """A routing table or strategy that cannot be."""


class ModelError(RaymergeError, ValueError):
    """A base model that cannot be loaded, or does not fit an adapter."""


class EvaluationError(RaymergeError, ValueError):
    """Scores that are missing or cannot be compared."""


class PoolError(RaymergeError, RuntimeError):
    """Workers that cannot be had: the Ray cluster lacks what was asked for."""
