"""The lines of the comparison: each run's figures, and its difference to the reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raymerge.evaluation import statistics
from raymerge.evaluation.scores import Aligned, Costs, Kind, RunScores, examples_in_prompt
from raymerge.evaluation.seeds import SeedSpread, spreads_over_seeds
from raymerge.evaluation.statistics import Chance, Values

REGRESSION = 10.0  # points of similarity
WORST_SHOWN = 5


@dataclass(frozen=True)
class Difference:
    """A row minus the reference, over personas, in points of similarity x 100.

    low, high: paired bootstrap 95 % interval. p: paired sign-flip test; p_holm: corrected over the recipes, None for
    other kinds of row. improved: share of personas; regressed: number that fall by more than 10 points.
    smallest_detectable: true difference found with power 0.8 at 0.05 divided by the number of recipes.
    """

    mean: float
    low: float
    high: float
    p: float
    p_holm: float | None
    improved: Chance
    regressed: Chance
    smallest_detectable: float


@dataclass(frozen=True)
class ClusterFigure:
    """A row in one cluster: mean similarity, and difference to the reference with its 95 % interval, in points."""

    cluster: str
    personas: int
    similarity: float
    difference: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PersonaFigure:
    """One persona of a row, in points."""

    persona: str
    similarity: float
    reference: float
    difference: float


@dataclass(frozen=True)
class Row:
    """One line of the comparison. similarity, low, high, chrf: 0 to 100; nll: nats per token; exact: percent.

    worst_decile: mean similarity over the tenth of the personas (at least one) that this row answers worst.
    """

    name: str
    kind: Kind
    recipe: Mapping[str, Any]
    similarity: float
    low: float
    high: float
    worst_decile: float
    chrf: float | None
    nll: float | None
    exact: float | None
    exact_correlation: float | None
    difference: Difference | None
    clusters: tuple[ClusterFigure, ...]
    worst: tuple[PersonaFigure, ...]
    costs: Costs
    compression_error: float | None
    tuned: Mapping[str, Any] | None
    over_seeds: SeedSpread | None
    notes: tuple[str, ...]


def differences_to(
    runs: Sequence[RunScores], scores: Values, means: Values, place: int | None, resamples: int, seed: int
) -> list[Difference | None]:
    """Each run minus the run at `place`, None for that run itself, and for all where `place` is None.

    scores: (runs, personas), points. means: bootstrap means (resamples, runs).
    """
    if place is None:
        return [None] * len(runs)
    paired = (scores - scores[place]).T
    low, high = statistics.interval(means - means[:, [place]], len(paired))
    p = statistics.sign_flip_p(paired, resamples=resamples, seed=seed)
    tested = [i for i, run in enumerate(runs) if run.kind == "recipe"]
    corrected = dict(zip(tested, statistics.holm(p[tested]).tolist(), strict=True))
    detectable = statistics.smallest_detectable(paired, alpha=0.05 / max(1, len(tested)))
    return [
        None
        if i == place
        else Difference(
            mean=float(paired[:, i].mean()),
            low=float(low[i]),
            high=float(high[i]),
            p=float(p[i]),
            p_holm=corrected.get(i),
            improved=statistics.share_improved(paired[:, i]),
            regressed=statistics.regressions(paired[:, i], REGRESSION),
            smallest_detectable=float(detectable[i]),
        )
        for i in range(len(runs))
    ]


def build_rows(
    runs: Sequence[RunScores],
    aligned: Aligned,
    scores: Values,
    means: Values,
    differences: Sequence[Difference | None],
    place: int | None,
    labels: tuple[str, ...] | None,
    resamples: int,
    seed: int,
) -> tuple[Row, ...]:
    """A line per run, in the order of runs. labels: cluster of each persona, or None."""
    low, high = statistics.interval(means, scores.shape[1])
    over_seeds = spreads_over_seeds(runs, aligned, scores, place)
    by_cluster = _by_cluster(scores, place, labels, resamples, seed)
    beside = {metric: aligned.persona_means(metric) for metric in ("chrf", "nll", "exact")}
    return tuple(
        Row(
            name=run.name,
            kind=run.kind,
            recipe=run.recipe,
            similarity=float(scores[i].mean()),
            low=float(low[i]),
            high=float(high[i]),
            worst_decile=worst_decile(scores[i]),
            chrf=_mean(beside["chrf"][i]),
            nll=_mean(beside["nll"][i]),
            exact=_mean(100 * beside["exact"][i]),
            exact_correlation=answer_correlation(aligned, slice(i, i + 1)),
            difference=differences[i],
            clusters=by_cluster[i],
            worst=_worst(aligned.personas, scores, i, place),
            costs=run.costs,
            compression_error=run.compression_error,
            tuned=run.tuned,
            over_seeds=over_seeds[i],
            notes=run.notes,
        )
        for i, run in enumerate(runs)
    )


def _by_cluster(
    scores: Values, place: int | None, labels: tuple[str, ...] | None, resamples: int, seed: int
) -> list[tuple[ClusterFigure, ...]]:
    figures: list[list[ClusterFigure]] = [[] for _ in scores]
    members = np.array(labels if labels else (), dtype=object)
    for label in sorted(set(labels or ())):
        inside = scores[:, members == label]
        if place is not None:
            means = statistics.bootstrap_means((inside - inside[place]).T, resamples=resamples, seed=seed)
            low, high = statistics.interval(means, inside.shape[1])
        for i, row in enumerate(figures):
            mean = float(inside[i].mean())
            if place is None or i == place:
                row.append(ClusterFigure(label, inside.shape[1], mean, None, None, None))
            else:
                difference = float((inside[i] - inside[place]).mean())
                row.append(ClusterFigure(label, inside.shape[1], mean, difference, float(low[i]), float(high[i])))
    return [tuple(row) for row in figures]


def _worst(personas: tuple[str, ...], scores: Values, row: int, place: int | None) -> tuple[PersonaFigure, ...]:
    if place is None or row == place:
        return ()
    difference = scores[row] - scores[place]
    lowest = np.argsort(difference, kind="stable")[:WORST_SHOWN]
    return tuple(
        PersonaFigure(personas[i], float(scores[row, i]), float(scores[place, i]), float(difference[i])) for i in lowest
    )


def row_of(rows: Sequence[Row | RunScores], strategy: str) -> int | None:
    """Place of the row of a strategy with plain prompts: the one of that name, else the first."""
    found = [i for i, r in enumerate(rows) if r.recipe.get("strategy") == strategy and not examples_in_prompt(r.recipe)]
    return next((i for i in found if rows[i].name == strategy), found[0] if found else None)


def worst_decile(similarity: Values) -> float:
    """Mean over the lowest tenth (rounded up) of values (personas,)."""
    count = -(-len(similarity) // 10)
    return float(np.partition(similarity, count - 1)[:count].mean())


def answer_correlation(aligned: Aligned, rows: slice) -> float | None:
    """Correlation of similarity with exactness over the answers of some runs, None where all or none are exact."""
    similarity, exact = aligned.metrics["similarity"][rows].ravel(), aligned.metrics["exact"][rows].ravel()
    known = np.isfinite(exact)
    return statistics.correlation(similarity[known], exact[known])


def _mean(values: Values) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
