"""What is known of a trial: plain data, shared by the study, the choice among trials, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["running", "complete", "stopped", "failed"]


@dataclass(frozen=True)
class Figures:
    """What scoring a recipe on the first so many personas gave.

    values: objective -> figure, always with `similarity`, the mean over personas in percent; `bytes` of an adapter as
    published (mean over personas), `experts` that contribute to a persona (mean). penalty: what offsets cost, in points
    of similarity, subtracted from it where trials compete and nowhere else. answers: that were generated for it, those
    that were known before left out. seconds: spent on it by workers.
    """

    personas: int
    values: Mapping[str, float]
    penalty: float = 0.0
    answers: int = 0
    seconds: float = 0.0

    @property
    def competes(self) -> float:
        """What trials compete by: similarity less the penalty."""
        return self.values["similarity"] - self.penalty


@dataclass
class Trial:
    """A point of the space and what became of it.

    values: by parameter; those that a condition leaves out are absent. rungs: figures after each nested subset of
    personas, the last of the whole where it is complete. stopped: by ASHA, after a rung that is not the last.
    """

    number: int
    values: Mapping[str, Any]
    state: State = "running"
    rungs: list[Figures] = field(default_factory=list)
    error: str | None = None

    @property
    def last(self) -> Figures | None:
        """The figures of the largest subset it was scored on."""
        return self.rungs[-1] if self.rungs else None
