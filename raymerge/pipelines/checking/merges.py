"""The merges of a run, counted before anything is routed: how many, of how many adapters, of what size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymerge import storage
from raymerge.merging.lowrank import costs
from raymerge.merging.rank import parse_rank
from raymerge.pipelines.checking import operations
from raymerge.pipelines.checking.adapters import recorded_bytes
from raymerge.pipelines.checking.estimate import ITEM_S, READ_S, Step, measured_items
from raymerge.pipelines.checking.known import Known
from raymerge.pipelines.planning import TRAINS_ITS_OWN, is_as_it_is
from raymerge.pipelines.trainings import is_foreign
from raymerge.recipes import Recipe
from raymerge.routing.named import by_persona
from raymerge.routing.strategies import SOFT_EXPERTS
from raymerge.runtime.tasks import ExpertRef

_ASKED = 3  # adapters that are asked who made them


@dataclass(frozen=True)
class Contributors:
    """How many merges a recipe takes, and how many adapters go into each."""

    merges: int
    each: int


def contributors(known: Known, recipe: Recipe) -> Contributors:
    """Merges of a recipe, and adapters in each, before anything is routed."""
    given = recipe.strategy_parameters.get("of") or {"strategy": recipe.strategy, **recipe.strategy_parameters}
    strategy, k = str(given["strategy"]), int(given.get("k", 1))
    people, groups = len(known.opened.names), known.cluster_count
    in_cluster = max(1, round(people / max(groups, 1)))
    apart = len((recipe.scale_offsets or {}).get("clusters", ()))  # clusters that share no row with others
    for_all = min(groups, apart + 1) if apart else 1
    if strategy == "named":
        return _named(known, recipe, given["weights"], for_all)
    each = {
        "simple_average": people,
        "cluster_average": in_cluster,
        "top_k": k,
        "learned_router": k,
        "sparse_moe": min(k, in_cluster),
        "soft": min(people, SOFT_EXPERTS),
        "hierarchical": min(people, int(given.get("top_clusters", 1)) * k),
        "hybrid": 2,
        **dict.fromkeys(("own", "unified", "cluster_trained"), 0 if _is_as_it_is(recipe, 1.0) else 1),
    }.get(strategy, 0)
    merges = {
        "simple_average": for_all,
        "unified": for_all,
        "cluster_average": groups,
        "cluster_trained": groups,
        "own": len({*known.opened.adapters, *known.opened.trainable}),
    }.get(strategy, people)
    return Contributors(merges, each) if each else Contributors(0, 0)


def _named(known: Known, recipe: Recipe, weights: Mapping[str, Any], for_all: int) -> Contributors:
    own = by_persona(weights)
    rows = [weights] if own is None else [own[name] for name in known.opened.names if name in own]
    kept = {tuple((name, weight) for name, weight in sorted(row.items()) if weight != 0) for row in rows}
    sizes = [len(row) for row in kept if len(row) > 1 or not _is_as_it_is(recipe, row[0][1])]
    if not sizes:
        return Contributors(0, 0)
    return Contributors(for_all if own is None else len(sizes), round(sum(sizes) / len(sizes)))


def _is_as_it_is(recipe: Recipe, weight: float) -> bool:
    """Whether an adapter alone in its row, at a weight, needs no merging."""
    trained = recipe.strategy in TRAINS_ITS_OWN  # on the rows of those whom the weights name
    return not trained and not recipe.tuned and is_as_it_is(recipe, [ExpertRef("", "", weight)])


def merge_step(known: Known, recipe: Recipe) -> Step:
    """The merges of one recipe that are missing, in the rank it asks for; a rank by energy is at most so large."""
    found = contributors(known, recipe)
    if recipe.strategy == "neighbours_trained" or not found.merges:
        return Step(f"merge {recipe.name}", "merge", 0, 0, 0, 0.0, 0)
    folder = storage.join(known.opened.project.run_folder(recipe.name), "adapters")
    there = min(found.merges, len(storage.list_folders(folder)))
    to_do = found.merges - there
    settings = known.opened.project.training.of("persona")
    shapes = known.layers.targets
    rank = max([max(one.ranks) for one, _ in known.bank.kinds if one.ranks], default=settings.rank)
    rule = parse_rank(recipe.rank)
    inner = found.each * rank
    most = 2 * rank if rule.kind == "energy" and _share_rows(known) else inner
    ranks = {path: min(rule.ceiling(shape, rank), inner, most) for path, shape in shapes.items()}
    each = sum(operations.adapter_bytes({path: shape}, ranks[path]) for path, shape in shapes.items()) - (
        len(shapes) - 1
    ) * operations.adapter_bytes({}, 0)
    seconds = sum(min(costs(shape, inner, ranks[path], rule).values()) for path, shape in shapes.items())
    read = found.each * operations.adapter_bytes(shapes, rank) / READ_S
    earlier = _earlier_bytes(known, recipe) if rule.kind in ("energy", "exact") else None
    return Step(
        f"merge {recipe.name}", "merge", to_do, to_do, there,
        to_do * sum(operations.merging_operations({p: s}, inner, ranks[p]) for p, s in shapes.items()),
        to_do * (each if earlier is None else earlier), 1 / max(to_do, 1),
        bound=rule.kind in ("energy", "exact") and earlier is None, fixed_s=to_do * (ITEM_S + seconds + read),
        measured_s=measured_items(known.run_timings, (f"merge/{recipe.name}/",), to_do),
    )  # fmt: skip


def _share_rows(known: Known) -> bool:
    """Whether the adapters come from one initial A, as those trained here: nearly all of a sum's energy then lies in
    about as many rows as one of them has."""
    project = known.opened.project
    foreign = any(is_foreign(project.adapter_location(name)) for name in known.opened.adapters[:_ASKED])
    return project.training.shared_init and not foreign


def _earlier_bytes(known: Known, recipe: Recipe) -> int | None:
    """Mean bytes of the adapters that a run of this recipe has written already."""
    folder = storage.join(known.opened.project.run_folder(recipe.name), "adapters")
    sizes = [recorded_bytes(storage.join(folder, name)) for name in storage.list_folders(folder)[:20]]
    found = [size for size in sizes if size is not None]
    return round(sum(found) / len(found)) if found else None


def joined(steps: Sequence[Step]) -> Step:
    """All merges as one step. Where any is measured, the others are taken to be as long each."""
    to_do = sum(step.makes for step in steps)
    measured = [step for step in steps if step.measured_s is not None and step.makes]
    known = sum(step.makes for step in measured)
    seconds = sum(step.measured_s or 0.0 for step in measured) * to_do / known if known else None
    return Step(
        "merge", "merge", to_do, to_do, sum(step.there for step in steps), sum(step.operations for step in steps),
        sum(step.nbytes for step in steps), 1 / max(to_do, 1), any(step.bound and step.makes for step in steps),
        fixed_s=sum(step.fixed_s for step in steps), measured_s=seconds,
    )  # fmt: skip
