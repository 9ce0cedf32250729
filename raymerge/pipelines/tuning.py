"""Tuning: values that a recipe leaves to validation examples, tried side by side for a part of the personas.

Every recipe chooses its factor from the same grid, by the same examples and the same measure, so that no row of a
comparison has its scale chosen with more care than another. One value serves all personas: a few examples of one would
not carry a choice of its own.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from raymerge import storage
from raymerge.errors import EvaluationError, PersonaError
from raymerge.manifest import read_manifest
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.placing import write_if_new
from raymerge.pipelines.planning import cut, merges_of
from raymerge.pipelines.scoring import Answering, answering_of, asking_of, retrieval_of, waits_for
from raymerge.pipelines.trials import spread
from raymerge.recipes import Recipe
from raymerge.routing.table import RoutingTable
from raymerge.runtime.scheduler import Item
from raymerge.runtime.tasks import Candidate, TuneTask

OWN_WEIGHTS = (0.2, 0.4, 0.6, 0.8)
NAME = "tuning.json"


def check_tuning(opened: Opened) -> None:
    """Raise now if a recipe leaves something to validation examples and there are none."""
    for recipe in opened.recipes.values():
        chooses = [*recipe.tuned, *(["its adapters"] if recipe.strategy == "selective" else [])]
        if not chooses:
            continue
        personas = opened.need_personas(f"recipe {recipe.name}")
        opened.need_base(f"recipe {recipe.name}")
        if len(personas.missing("validation")) == len(personas.names):
            raise PersonaError(
                f"recipe {recipe.name}: {chooses[0]} is to be chosen on validation examples, and nobody has any.\n"
                "Add rows with split validation, or give the recipe a number."
            )


def tuning_items(
    opened: Opened, recipe: Recipe, route: Callable[[Recipe], RoutingTable], trained: Mapping[str, str]
) -> list[Item]:
    """Items that try every combination of what a recipe leaves open, each for a part of the personas; none where nobody
    has both a row and validation examples.

    route: from a recipe with nothing left open to its routing table.
    """
    tried: list[tuple[dict[str, float], dict[str, Answering]]] = []
    by_weight: dict[float | None, dict[str, Answering]] = {}
    for values in grid(opened, recipe):
        weight = values.get("own_weight")
        if weight not in by_weight:
            plain = recipe.resolved({**values, "factor": 1.0} if "factor" in values else values)
            table = route(plain)
            merges = merges_of(opened, plain, table)
            by_weight[weight] = answering_of(opened, plain, table, merges, trained, in_memory=True)
        tried.append((values, by_weight[weight]))
    settings = opened.project.evaluation
    personas = spread(_with_examples(opened, tried[0][1]), settings.tuning_personas)
    asking = asking_of(opened, "validation", retrieval_of(opened, recipe), settings.tuning_examples)
    items = []
    for number, part in enumerate(cut(personas, settings.personas_per_item)):
        candidates = tuple(
            Candidate(json.dumps(values), tuple(found[name].source for name in part), values.get("factor", 1.0))
            for values, found in tried
        )
        folder = storage.join(folder_of(opened, recipe), f"{number:04d}")
        task = TuneTask(folder, candidates, **vars(asking))
        waits = frozenset().union(*(waits_for(found, part) for found in by_weight.values()))
        items.append(Item(f"tune/{recipe.name}/{number:04d}", "model", "tune", task, after=waits))
    return items


def _with_examples(opened: Opened, names: Iterable[str]) -> list[str]:
    without = set(opened.need_personas("tuning").missing("validation"))
    return [name for name in sorted(names) if name not in without]


def described(opened: Opened, recipe: Recipe) -> str:
    """What a recipe that leaves something open does first, in a line, as far as it is known before routing."""
    able, settings = len(_with_examples(opened, opened.names)), opened.project.evaluation
    if not recipe.tuned:
        among = ", ".join(recipe.strategy_parameters["among"])
        return f"{recipe.name}: its adapters are chosen among {among} first, by their scores for {_personas(able)}"
    candidates = f"{len(grid(opened, recipe))} candidates of {' and '.join(recipe.tuned)} are tried first"
    asked = f"up to {settings.tuning_examples} validation examples of {_personas(min(able, settings.tuning_personas))}"
    return f"{recipe.name}: {candidates}, on {asked}"


def _personas(count: int) -> str:
    return f"{count} persona{'s' if count != 1 else ''}"


def nobody_to_ask(recipe: Recipe) -> str:
    """Why a recipe without tuning items cannot be carried out."""
    return (
        f"{recipe.name}: {' and '.join(recipe.tuned)} is to be chosen on validation examples, and nobody who has a row "
        "has any.\nAdd rows with split validation for them, or give the recipe a number."
    )


def grid(opened: Opened, recipe: Recipe) -> list[dict[str, float]]:
    """The combinations to try of what a recipe leaves open."""
    axes = {"factor": opened.project.evaluation.scales, "own_weight": OWN_WEIGHTS}
    names = recipe.tuned
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(axes[n] for n in names))]


def folder_of(opened: Opened, recipe: Recipe) -> str:
    """Where the tuning of a run lies."""
    return storage.join(opened.project.run_folder(recipe.name), "tuning")


def chosen(opened: Opened, recipe: Recipe, items: Sequence[Item]) -> dict[str, float]:
    """The values of the highest mean similarity over personas, noted in `tuning.json`; of equals the one nearest to a
    factor of 1. items: those that were carried out. Raises EvaluationError where nothing was scored."""
    scores: dict[str, list[float]] = {}
    for item in items:
        if read_manifest(item.payload.folder) is None:
            continue
        table = storage.read_parquet(storage.join(item.payload.folder, "similarity.parquet"))
        means = table.group_by(["candidate", "persona"]).aggregate([("similarity", "mean")]).to_pylist()
        for row in sorted(means, key=lambda row: (row["candidate"], row["persona"])):
            scores.setdefault(row["candidate"], []).append(float(row["similarity_mean"]))
    if not scores:
        raise EvaluationError(f"{recipe.name}: nothing could be scored, so {' and '.join(recipe.tuned)} is not chosen.")
    tried = [
        {**json.loads(label), "similarity": round(100 * float(np.mean(values)), 4)} for label, values in scores.items()
    ]
    best = max(tried, key=lambda one: (one["similarity"], -abs(math.log(one.get("factor", 1.0)))))
    values = {name: float(best[name]) for name in recipe.tuned}
    order = grid(opened, recipe)
    tried.sort(key=lambda one: order.index({name: one[name] for name in recipe.tuned}))
    result: dict[str, Any] = {"chosen": values, "tried": tried, "personas": len(next(iter(scores.values())))}
    write_if_new(storage.join(folder_of(opened, recipe), NAME), storage.encode_json(result))
    return values
