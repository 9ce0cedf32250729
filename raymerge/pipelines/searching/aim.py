"""What a search is for: its settings, where it keeps what it finds, and the names of the runs that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymerge.config import Project, Search
from raymerge.evaluation.scores import SEARCHED


@dataclass(frozen=True)
class Aim:
    """A search of its own.

    section: its settings. folder: for its trials, what it scored and what it found. run: name of the winner and of its
    run; those it is compared with begin with it. title: of the command, in what is shown. left_out: personas who score
    nothing. first: points that are tried before any is proposed. replaces: whether a search of something else in the
    folder is forgotten rather than refused.
    """

    section: Search
    folder: str
    run: str = SEARCHED
    title: str = "search"
    left_out: frozenset[str] = frozenset()
    first: Sequence[Mapping[str, Any]] = ()
    replaces: bool = False

    @property
    def random(self) -> str:
        """The run of random experts in the winner's place."""
        return f"{self.run}_random_k"

    @property
    def unified(self) -> str:
        """The run of the unified adapter, its scale chosen as that of the control is."""
        return f"{self.run}_unified"

    @property
    def runs(self) -> tuple[str, ...]:
        """All runs that are made of the winner and to compare it."""
        return self.run, self.random, self.unified


def aim_of(project: Project) -> Aim:
    """`raymerge search`, as the project file has it."""
    return Aim(project.search, project.search_folder())
