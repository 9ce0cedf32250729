"""The comparison: what each run reached, what it differs from unified by, and what that difference is worth."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymerge.evaluation import statistics
from raymerge.evaluation.best import Best, best_rows
from raymerge.evaluation.criteria import Criterion, judge_criteria
from raymerge.evaluation.curves import TrainingCurve
from raymerge.evaluation.data_needed import DataNeeded, data_needed, noise_of
from raymerge.evaluation.exhibits import RoutingMap, Sample, choose_samples, map_routing
from raymerge.evaluation.guide import Guide, advise
from raymerge.evaluation.guide.facts import Facts
from raymerge.evaluation.remarks import remarks
from raymerge.evaluation.rows import Row, answer_correlation, build_rows, differences_to, row_of
from raymerge.evaluation.scores import Aligned, RunScores, align
from raymerge.evaluation.seeds import describe_spread
from raymerge.evaluation.verdict import Standing, Verdict, judge

NO_CLUSTER = "no cluster"


@dataclass(frozen=True, eq=False)
class Comparison:
    """All rows over the personas they have in common, best similarity first, and what follows from them.

    criteria: what was asked, of the recipe that the verdict speaks of. guide: what to run next. best: the best row of
    each persona, None where fewer than two rows can be served. curves: of the trainings that rows are made of.
    scores: similarity x 100 per persona, float64 (rows, personas), rows in the order of `rows`.
    clusters: label of each persona, None where no clusters are known. smallest_detectable: the median over the recipes,
    None without a reference. exact_correlation: similarity with exact accuracy, over single answers of all rows;
    exact_row_correlation: over the rows.
    """

    criteria: tuple[Criterion, ...]
    verdict: Verdict
    guide: Guide
    smallest_detectable: float | None
    reference: str | None
    rows: tuple[Row, ...]
    personas: tuple[str, ...]
    examples: int
    clusters: tuple[str, ...] | None
    scores: NDArray[np.float64]
    exact_correlation: float | None
    exact_row_correlation: float | None
    missing: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    samples: tuple[Sample, ...]
    routing: tuple[RoutingMap, ...]
    best: Best | None
    curves: tuple[TrainingCurve, ...]
    similarity_model: str | None
    resamples: int
    seed: int

    def row(self, name: str) -> int:
        """Place of a row in `rows` and `scores`. Raises KeyError."""
        for place, row in enumerate(self.rows):
            if row.name == name:
                return place
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """Everything but answers and routing, as plain JSON values, criteria first; figures to six decimals, unknown
        ones null."""
        kept = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("samples", "routing", "scores", "clusters", "guide", "best")
        }
        plain = _plain(kept)
        plain["guide"] = {
            "in_hand": self.guide.in_hand,
            "steps": [{**_plain(step), "sentence": step.sentence} for step in self.guide.steps],
        }
        plain["clusters"] = dict(zip(self.personas, self.clusters, strict=True)) if self.clusters else None
        plain["similarity_by_persona"] = {
            row.name: dict(zip(self.personas, _plain(values), strict=True))
            for row, values in zip(self.rows, self.scores.tolist(), strict=True)
        }
        plain["best"] = None if self.best is None else self._best_json(self.best)
        assert isinstance(plain, dict)
        return plain

    def _best_json(self, best: Best) -> dict[str, Any]:
        by_persona = {
            persona: {
                "row": self.rows[row].name,
                "similarity": _plain(float(self.scores[row, i])),
                "over_reference": _plain(best.gain[i]) if best.gain else None,
            }
            for i, (persona, row) in enumerate(zip(self.personas, best.row, strict=True))
        }
        rest = {key: value for key, value in _plain(best).items() if key not in ("row", "gain")}
        return {**rest, "by_persona": by_persona}


def compare(
    runs: Sequence[RunScores],
    *,
    clusters: Mapping[str, str] | None = None,
    reference: str = "unified",
    similarity_model: str | None = None,
    routing_model: str | None = None,
    curves: Sequence[TrainingCurve] = (),
    project: str = "PROJECT",
    unified_adapter: str = "unified",
    recipes: Collection[str] | None = None,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare runs over the personas that all of them answered in full.

    clusters: persona -> label. reference: the row that all others are compared with; without it no difference is
    computed, and a note says so. similarity_model, routing_model: names of the encoders; where they are the same the
    report says that a model judges its own choice. curves: of the trainings that the runs are made of. project: the
    project file, as the guide's commands are to name it. unified_adapter, recipes: where the project file has the
    unified adapter, and the recipes in it, None where they are not known. Raises EvaluationError as `align` does.
    """
    figures = _figures(runs, clusters, reference, resamples, seed)
    runs, aligned, scores, place = figures.runs, figures.aligned, figures.scores, figures.place
    judged = _judged(figures, reference, resamples, seed)
    as_trained = best_rows(runs, aligned, scores, place, frozenset({"reference"}), seed)
    facts = Facts(
        figures.rows, figures.means, len(aligned.personas), place, judged.verdict, judged.needed, as_trained, project,
        unified_adapter, recipes, any(run.validation_similarity is not None for run in runs),
    )  # fmt: skip
    shown = judged.chosen if judged.chosen is not None else _first_other(place, len(runs))
    warnings, notes = remarks(runs, aligned, reference, similarity_model, routing_model)
    return Comparison(
        criteria=judged.criteria,
        verdict=judged.verdict,
        guide=advise(facts),
        smallest_detectable=_typically_detectable(figures.rows),
        reference=reference if place is not None else None,
        rows=figures.rows,
        personas=aligned.personas,
        examples=len(aligned.person),
        clusters=figures.labels,
        scores=scores,
        exact_correlation=answer_correlation(aligned, slice(None)),
        exact_row_correlation=_row_correlation(figures.rows),
        missing=aligned.missing,
        warnings=(*judged.warnings, *warnings),
        notes=notes,
        samples=choose_samples(runs, aligned, scores, shown, place),
        routing=map_routing(runs, aligned.personas, clusters),
        best=best_rows(runs, aligned, scores, place, seed=seed),
        curves=tuple(curves),
        similarity_model=similarity_model,
        resamples=resamples,
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class _Figures:
    """What the runs reached, best first. means: of bootstrap samples. place: of the reference, None without it."""

    runs: Sequence[RunScores]
    aligned: Aligned
    scores: NDArray[np.float64]
    means: NDArray[np.float64]
    labels: tuple[str, ...] | None
    place: int | None
    rows: tuple[Row, ...]


def _figures(
    runs: Sequence[RunScores], clusters: Mapping[str, str] | None, reference: str, resamples: int, seed: int
) -> _Figures:
    runs, aligned, scores = _best_first(runs)
    names = [run.name for run in runs]
    place = names.index(reference) if reference in names else None
    means = statistics.bootstrap_means(scores.T, resamples=resamples, seed=seed)
    labels = tuple(clusters.get(p, NO_CLUSTER) for p in aligned.personas) if clusters else None
    differences = differences_to(runs, scores, means, place, resamples, seed)
    rows = build_rows(runs, aligned, scores, means, differences, place, labels, resamples, seed)
    return _Figures(runs, aligned, scores, means, labels, place, rows)


@dataclass(frozen=True, eq=False)
class _Judged:
    """What the figures are worth. chosen: place of the row that the verdict speaks of, None where it speaks of none."""

    verdict: Verdict
    criteria: tuple[Criterion, ...]
    chosen: int | None
    needed: DataNeeded | None
    warnings: tuple[str, ...]


def _judged(figures: _Figures, reference: str, resamples: int, seed: int) -> _Judged:
    scores, means, place, rows = figures.scores, figures.means, figures.place, figures.rows
    standings = [Standing(r.name, r.kind, r.recipe, r.validation_similarity, r.tuned is not None) for r in figures.runs]
    names = [run.name for run in figures.runs]
    verdict = judge(standings, scores, means, place)
    chosen = names.index(verdict.row) if verdict.row else None
    verdict, warnings = _with_seeds(verdict, None if chosen is None else rows[chosen], reference)
    criteria = judge_criteria(
        scores, means, chosen, place, row_of(rows, "own"), names=names, reference=reference, level=verdict.level,
        resamples=resamples, seed=seed,
    )  # fmt: skip
    needed = _needed(rows, figures.aligned, chosen, place)
    if needed is not None:
        verdict = verdict.with_data_needed(needed.words)
    return _Judged(verdict, criteria, chosen, needed, warnings)


def _best_first(runs: Sequence[RunScores]) -> tuple[list[RunScores], Aligned, NDArray[np.float64]]:
    """The runs in the order of their mean similarity, aligned, and their similarity x 100 per persona."""
    aligned = align(runs)
    by_persona = 100 * aligned.persona_means("similarity")
    order = sorted(range(len(runs)), key=lambda i: (-by_persona[i].mean(), runs[i].name))
    metrics = {metric: values[order] for metric, values in aligned.metrics.items()}
    return [runs[i] for i in order], dataclasses.replace(aligned, metrics=metrics), by_persona[order]


def _typically_detectable(rows: Sequence[Row]) -> float | None:
    known = [(row.kind, row.difference.smallest_detectable) for row in rows if row.difference]
    typical = [value for kind, value in known if kind == "recipe"] or [value for _, value in known]
    return float(np.median(typical)) if typical else None


def _with_seeds(verdict: Verdict, chosen: Row | None, reference: str) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict with what other training seeds say of its recipe, and the warning that they call for."""
    if chosen is None:
        return verdict, ()
    said, warning = describe_spread(chosen.name, reference, chosen.over_seeds)
    details = verdict.details if said is None else (*verdict.details, said)
    return dataclasses.replace(verdict, details=details), () if warning is None else (warning,)


def _needed(rows: Sequence[Row], aligned: Aligned, chosen: int | None, place: int | None) -> DataNeeded | None:
    difference = None if chosen is None else rows[chosen].difference
    if difference is None:
        return None
    noise = noise_of(aligned, chosen, place)
    return data_needed(difference.mean, difference.smallest_detectable, noise, len(aligned.personas))


def _row_correlation(rows: Sequence[Row]) -> float | None:
    known = [(row.similarity, row.exact) for row in rows if row.exact is not None]
    if not known:
        return None
    similarity, exact = np.array(known, dtype=np.float64).T
    return statistics.correlation(similarity, exact)


def _first_other(place: int | None, rows: int) -> int:
    return 1 if place == 0 and rows > 1 else 0


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in sorted(value)}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return round(value, 6) if np.isfinite(value) else None
    return value
