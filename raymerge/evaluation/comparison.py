"""The comparison: what each run reached, what it differs from unified by, and what that difference is worth."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymerge.evaluation import statistics
from raymerge.evaluation.exhibits import RoutingMap, Sample, choose_samples, map_routing
from raymerge.evaluation.remarks import remarks
from raymerge.evaluation.rows import Row, answer_correlation, build_rows, differences_to
from raymerge.evaluation.scores import RunScores, align
from raymerge.evaluation.verdict import Standing, Verdict, judge

NO_CLUSTER = "no cluster"


@dataclass(frozen=True, eq=False)
class Comparison:
    """All rows over the personas they have in common, best similarity first, and what follows from them.

    scores: similarity x 100 per persona, float64 (rows, personas), rows in the order of `rows`.
    clusters: label of each persona, None where no clusters are known. smallest_detectable: the median over the recipes,
    None without a reference. exact_correlation: similarity with exact accuracy, over single answers of all rows;
    exact_row_correlation: over the rows.
    """

    verdict: Verdict
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
        """Everything but answers and routing, as plain JSON values; figures to six decimals, unknown ones null."""
        kept = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("samples", "routing", "scores", "clusters")
        }
        scores = {
            row.name: dict(zip(self.personas, values, strict=True))
            for row, values in zip(self.rows, self.scores.tolist(), strict=True)
        }
        labels = dict(zip(self.personas, self.clusters, strict=True)) if self.clusters else None
        plain = _plain({**kept, "clusters": labels, "similarity_by_persona": scores})
        assert isinstance(plain, dict)
        return plain


def compare(
    runs: Sequence[RunScores],
    *,
    clusters: Mapping[str, str] | None = None,
    reference: str = "unified",
    similarity_model: str | None = None,
    routing_model: str | None = None,
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare runs over the personas that all of them answered in full.

    clusters: persona -> label. reference: the row that all others are compared with; without it no difference is
    computed, and a note says so. similarity_model, routing_model: names of the encoders; where they are the same the
    report says that a model judges its own choice. Raises EvaluationError as `align` does.
    """
    aligned = align(runs)
    by_persona = 100 * aligned.persona_means("similarity")
    order = sorted(range(len(runs)), key=lambda i: (-by_persona[i].mean(), runs[i].name))
    runs = [runs[i] for i in order]
    scores = by_persona[order]
    aligned = dataclasses.replace(aligned, metrics={m: v[order] for m, v in aligned.metrics.items()})
    names = [run.name for run in runs]
    place = names.index(reference) if reference in names else None
    means = statistics.bootstrap_means(scores.T, resamples=resamples, seed=seed)
    labels = tuple(clusters.get(p, NO_CLUSTER) for p in aligned.personas) if clusters else None
    differences = differences_to(runs, scores, means, place, resamples, seed)
    rows = build_rows(runs, aligned, scores, means, differences, place, labels, resamples, seed)
    standings = [Standing(r.name, r.kind, r.recipe, r.validation_similarity) for r in runs]
    verdict = judge(standings, scores, means, place)
    typical = [d.smallest_detectable for d, r in zip(differences, runs, strict=True) if d and r.kind == "recipe"]
    typical = typical or [d.smallest_detectable for d in differences if d]
    shown = names.index(verdict.row) if verdict.row else _first_other(place, len(runs))
    warnings, notes = remarks(runs, aligned, reference, similarity_model, routing_model)
    return Comparison(
        verdict=verdict,
        smallest_detectable=float(np.median(typical)) if typical else None,
        reference=reference if place is not None else None,
        rows=rows,
        personas=aligned.personas,
        examples=len(aligned.person),
        clusters=labels,
        scores=scores,
        exact_correlation=answer_correlation(aligned, slice(None)),
        exact_row_correlation=_row_correlation(rows),
        missing=aligned.missing,
        warnings=warnings,
        notes=notes,
        samples=choose_samples(runs, aligned, scores, shown, place),
        routing=map_routing(runs, aligned.personas, clusters),
        similarity_model=similarity_model,
        resamples=resamples,
        seed=seed,
    )


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
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return round(value, 6) if np.isfinite(value) else None
    return value
