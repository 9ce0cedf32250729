"""The command line. Thin: every command calls one pipeline, which the scripts in jobs/ call too."""

from __future__ import annotations

import os
import sys
from typing import Any

from raymerge.cli import projects, routers, searches, standalone
from raymerge.cli.application import app
from raymerge.errors import RaymergeError

__all__ = ["app", "main", "projects", "routers", "searches", "standalone"]

_KEEP_NOTHING = frozenset({"inspect", "methods", "prompt"})  # commands that begin anew each time


def main(arguments: list[str] | None = None) -> Any:
    """Run a command. Exit status: 0 all done, 1 some items failed, 2 bad input or an unforeseen error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    # Before torch is loaded: threads that spin while another program holds a core make products thirty times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(args=[a for a in given if a != "--debug"], prog_name="raymerge", standalone_mode=True)
    except RaymergeError as error:
        if debug:
            raise
        print(f"raymerge: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        lines = str(error).strip().splitlines()
        print(f"raymerge: {type(error).__name__}{': ' + lines[0] if lines else ''}", file=sys.stderr)
        print("That was not foreseen. --debug shows where it happened.", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if _interrupted(end):
            command = next((word for word in given if not word.startswith("-")), None)
            goes_on = "" if command in _KEEP_NOTHING else " The same command goes on where it stopped."
            print(f"raymerge: interrupted.{goes_on}", file=sys.stderr)
            sys.exit(130)
        raise


def _interrupted(end: BaseException | None) -> bool:
    """Whether an exit was made of Ctrl-C, which typer turns into exits that differ by its version."""
    while end is not None and not isinstance(end, KeyboardInterrupt):
        end = end.__cause__ or end.__context__
    return end is not None
