"""What a selective recipe chooses among: other recipes' rows, with their scores on validation examples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from raymerge import storage
from raymerge.manifest import read_manifest
from raymerge.merging.scale import parse_scale
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.placing import Placed
from raymerge.recipes import Recipe
from raymerge.routing.selective import Candidate


def candidates_of(
    opened: Opened, recipe: Recipe, decided: Mapping[str, Recipe], placed: Placed, folder: str
) -> dict[str, Candidate]:
    """The recipes that were scored, by name, each persona's adapter with its factor and its scores.

    folder: of a run, where the validation scores lie.
    """
    found = {}
    for name in recipe.strategy_parameters["among"]:
        place = storage.join(opened.project.run_folder(name), folder)
        scores = _scores(place) if name in decided and read_manifest(place) is not None else {}
        if not scores:
            continue
        table, _ = placed.route(decided[name])
        factor = parse_scale(decided[name].scale)[0]
        experts: dict[str, tuple[str, float] | None] = {}
        for group in table.groups():
            for persona in group.personas:
                experts[persona] = (group.experts[0][0], factor) if group.experts else None
        if decided[name].strategy != "base":  # a persona without its own adapter cannot be given it
            experts = {persona: expert for persona, expert in experts.items() if expert is not None}
        found[name] = Candidate(experts, scores)
    return found


def _scores(place: str) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    metrics = storage.read_parquet(storage.join(place, "metrics.parquet"))
    by_persona: dict[str, list[tuple[int, float]]] = {}
    columns = [metrics.column(name).to_pylist() for name in ("persona", "example", "similarity")]
    for persona, example, similarity in zip(*columns, strict=True):
        by_persona.setdefault(persona, []).append((example, similarity))
    return {p: np.array([value for _, value in sorted(rows)]) for p, rows in by_persona.items()}
