"""What a selective recipe chooses among: other recipes' adapters, with their scores on validation examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raymerge import storage
from raymerge.errors import EvaluationError
from raymerge.manifest import read_manifest
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.placing import Placed
from raymerge.pipelines.planning import Merges, merges_of
from raymerge.recipes import Recipe
from raymerge.routing.selective import Candidate, Values


@dataclass(frozen=True)
class Option:
    """A recipe to choose: the adapter of each persona with its scores, and what becomes of the recipe's rows."""

    name: str
    candidate: Candidate
    merges: Merges


def options_of(opened: Opened, recipe: Recipe, decided: Sequence[Recipe], placed: Placed, folder: str) -> list[Option]:
    """The recipes that were scored. decided: those that a selective one chooses among, with nothing left open. folder:
    of a run, where the validation scores lie. Raises EvaluationError if there is nothing to choose."""
    found = []
    for one in decided:
        place = storage.join(opened.project.run_folder(one.name), folder)
        scores = _scores(place) if read_manifest(place) is not None else {}
        if not scores:
            continue
        table, _ = placed.route(one)
        experts: dict[str, tuple[str, float] | None] = {}
        for group in table.groups():
            for persona in group.personas:
                experts[persona] = (group.adapter, 1.0) if group.experts else None
        if one.strategy != "base":  # a persona without its own adapter cannot be given it
            experts = {persona: expert for persona, expert in experts.items() if expert is not None}
        found.append(Option(one.name, Candidate(experts, scores), merges_of(opened, one, table)))
    if len(found) < 2:
        raise EvaluationError(
            f"{recipe.name}: of what it chooses among, {len(found)} could be scored.\n"
            "The failures of the others say why."
        )
    return found


def merges_of_options(options: Sequence[Option], *, in_memory: bool) -> Merges:
    """What answers for whom a row of an option was chosen: the option's own adapters, which are there by then.

    in_memory: no adapter was written, and they are merged again on the worker.
    """
    if in_memory:
        tasks = {name: task for option in options for name, task in option.merges.tasks.items()}
        return Merges(tasks, {n: place for option in options for n, place in option.merges.as_they_are.items()})
    return Merges({}, {name: place for option in options for name, place in option.merges.locations.items()})


def _scores(place: str) -> dict[str, Values]:
    metrics = storage.read_parquet(storage.join(place, "metrics.parquet"))
    by_persona: dict[str, list[tuple[int, float]]] = {}
    columns = [metrics.column(name).to_pylist() for name in ("persona", "example", "similarity")]
    for persona, example, similarity in zip(*columns, strict=True):
        by_persona.setdefault(persona, []).append((example, similarity))
    return {p: np.array([value for _, value in sorted(rows)]) for p, rows in by_persona.items()}
