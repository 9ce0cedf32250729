"""What `raymerge search` tries, and how long."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from raymerge.config.section import Section

Objective = Literal["similarity", "bytes", "experts"]
OBJECTIVES: tuple[Objective, ...] = ("similarity", "bytes", "experts")


class Search(Section):
    """A search over recipes, scored on validation examples.

    recipe: what every trial begins from, as a recipe is written, or the name of one. space: what is tried instead, by
    the names of a recipe's parameters; see `raymerge.search.space`. The search ends at the first of `trials`, `minutes`
    and `evaluations` (answers scored) that is reached.
    """

    recipe: str | dict[str, Any] = Field(default_factory=lambda: {"strategy": "top_k"})
    space: dict[str, Any] = Field(default_factory=dict)
    sampler: Literal["tpe", "cmaes", "random", "grid"] = "tpe"
    seed: int = 0
    trials: int = Field(default=60, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    evaluations: int | None = Field(default=None, ge=1)
    concurrency: int | None = Field(default=None, ge=1)  # trials at once; None: one for each model worker, and one more
    objectives: tuple[Objective, ...] = ("similarity",)  # the others are made small; several give a Pareto front
    stop_early: bool = True  # ASHA: a poor recipe is dropped after a part of the personas; with one objective alone
    smallest: int = Field(default=20, ge=1)  # personas that every trial is scored on at least
    reduction: int = Field(default=3, ge=2)  # of what is scored, one in so many goes on to so many times the personas
    examples: int | None = Field(default=None, ge=1)  # validation examples of a persona; None: all
    free: int = Field(default=8, ge=1)  # numbers that may be searched at once; a few examples carry no more
    ranks: tuple[int | Literal["exact"], ...] = (8, 16, 32, 64, "exact")  # at which the winner is scored

    @field_validator("objectives")
    @classmethod
    def _similarity_first(cls, value: tuple[Objective, ...]) -> tuple[Objective, ...]:
        if not value or value[0] != "similarity" or len(set(value)) < len(value):
            raise ValueError("begin with similarity, and name each once")
        return value
