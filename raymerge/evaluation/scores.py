"""What the comparison is given for each run, and its alignment: the same personas and examples for every row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymerge.errors import EvaluationError

Kind = Literal["recipe", "reference", "baseline", "control", "ceiling", "external"]

REFERENCES = frozenset({"base", "unified", "own", "cluster_trained"})
BASELINES = frozenset({"hybrid", "selective", "neighbours_trained"})  # trained or chosen, where others merge neighbours
CONTROLS = frozenset({"random_k", "random_cluster", "shuffled"})
SEARCHED = "searched"  # the run of what `raymerge search` found
LEARNED = "learned_router"  # the strategy that asks a router, and the run of `raymerge router`
NEIGHBOURS = frozenset({"top_k", "sparse_moe", "soft", "hierarchical", "cluster_average", LEARNED})


@dataclass(frozen=True)
class Costs:
    """What a run took: seconds of training, merging and evaluating; bytes and number of the adapters it serves.

    steps: optimiser steps of all adapters that it is made of. epochs: theirs in words, such as `8` or `4 of 2, 4, 8`.
    None where something of it is not known.
    """

    train_s: float | None = None
    merge_s: float | None = None
    evaluate_s: float | None = None
    bytes: int | None = None
    adapters: int | None = None
    steps: int | None = None
    epochs: str | None = None

    @property
    def seconds(self) -> float | None:
        """All seconds, None where a part of them is not known: the rest would be taken for the whole."""
        if self.train_s is None or self.merge_s is None or self.evaluate_s is None:
            return None
        return self.train_s + self.merge_s + self.evaluate_s


@dataclass(frozen=True)
class RunScores:
    """One run, as read from its folder.

    recipe: as in recipe.json; `strategy` decides the kind of row, `strategy_parameters.of` what a control controls.
    metrics: a row per answer: persona, example (int), similarity (-1 to 1), chrf (0 to 100), nll (nats per token of the
        reference), exact (bool or 0 to 1). The last three may be null or absent.
    generations: persona, example, prompt, reference, generated; None where answers were not kept.
    routing: persona, expert, weight; None where there is no routing table.
    validation_similarity: mean on validation examples, 0 to 100, where the recipe was chosen by it.
    compression_error: overall relative Frobenius error of the merged adapters, None where nothing was compressed.
    tuned: what validation examples chose, {"chosen": {"factor", "own_weight"}, "tried": [{.., "similarity"}]}, with
        similarity from 0 to 100; None where nothing was tuned. by_seed: training seed -> metrics of
        the same row trained with other seeds than this one.
    """

    name: str
    recipe: Mapping[str, Any]
    metrics: pa.Table
    generations: pa.Table | None = None
    routing: pa.Table | None = None
    costs: Costs = Costs()
    validation_similarity: float | None = None
    compression_error: float | None = None
    notes: tuple[str, ...] = ()
    tuned: Mapping[str, Any] | None = None
    by_seed: Mapping[int, pa.Table] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """What kind of row the run is."""
        return kind_of(self.name, self.recipe)


@dataclass(frozen=True)
class Aligned:
    """The scores of all runs over the personas and examples that all of them answered.

    personas: names (P,), sorted. person: index of the persona of each example (E,). example: its number (E,).
    metrics: name -> float64 (runs, E), NaN where unknown. missing: run -> personas it lacks, or has incompletely.
    by_references: names of runs that were scored against the same reference answers, one tuple where all of them were;
    runs whose answers were not kept stand in none. differing: an example where the references differ, if they do.
    """

    personas: tuple[str, ...]
    person: NDArray[np.int64]
    example: NDArray[np.int64]
    metrics: Mapping[str, NDArray[np.float64]]
    missing: Mapping[str, tuple[str, ...]]
    by_references: tuple[tuple[str, ...], ...] = ()
    differing: tuple[str, int] | None = None

    def persona_means(self, metric: str) -> NDArray[np.float64]:
        """Mean over a persona's examples, those with a figure: (runs, P). NaN where a persona has none."""
        values = self.metrics[metric]
        known = np.isfinite(values)
        means = np.full((len(values), len(self.personas)), np.nan)
        for run, (row, there) in enumerate(zip(values, known, strict=True)):
            number = np.bincount(self.person[there], minlength=len(self.personas))
            total = np.bincount(self.person[there], weights=row[there], minlength=len(self.personas))
            np.divide(total, number, out=means[run], where=number > 0)
        return means


def kind_of(name: str, recipe: Mapping[str, Any]) -> Kind:
    """The kind of row a run makes.

    A recipe without a strategy is an external adapter, and so is a prefix. Adapters as trained are references, and
    baselines where examples stand in their prompts. A name that begins with `oracle` is a ceiling: a recipe told
    something that no real project knows, such as the true traits of a made-up world.
    """
    strategy = recipe.get("strategy")
    if strategy is None or strategy == "prefix":
        return "external"
    if strategy in REFERENCES:
        return "baseline" if examples_in_prompt(recipe) else "reference"
    if strategy in BASELINES:
        return "baseline"
    if strategy in CONTROLS:
        return "control"
    return "ceiling" if name.startswith("oracle") else "recipe"


def examples_in_prompt(recipe: Mapping[str, Any]) -> int:
    """How many training examples a recipe puts into each prompt: 0 for plain prompts."""
    retrieval = recipe.get("retrieval")
    return int(retrieval.get("examples", 0)) if isinstance(retrieval, Mapping) else 0


def same_but(recipe: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    """Whether two recipes are the same but for their names and one key."""
    keys = sorted({*recipe, *other} - {"name", key})
    return all(recipe.get(k) == other.get(k) for k in keys)


def align(runs: Sequence[RunScores]) -> Aligned:
    """The personas that every run answered in full, with all figures side by side.

    A persona counts as answered in full if the run has each example that any run has for it.
    Raises EvaluationError for no runs, double names, missing columns, double examples, a similarity that is no number,
    or no persona in common.
    """
    if not runs:
        raise EvaluationError("There is no run to compare.\nEvaluate one: raymerge evaluate PROJECT --run NAME")
    _refuse_double_names(runs)
    columns = [_read(run) for run in runs]
    names = sorted(set().union(*(column.names for column in columns)))
    place = {name: index for index, name in enumerate(names)}
    width = 1 + max(int(column.example.max(initial=0)) for column in columns)
    keys = [np.array([place[n] for n in c.names], dtype=np.int64)[c.codes] * width + c.example for c in columns]
    for run, run_keys in zip(runs, keys, strict=True):
        _refuse_double_examples(run, run_keys, names, width)
    union = np.unique(np.concatenate(keys))
    expected = np.bincount(union // width, minlength=len(names))
    complete = np.stack([np.bincount(k // width, minlength=len(names)) == expected for k in keys])
    missing = {
        run.name: tuple(names[i] for i in np.flatnonzero(~there))
        for run, there in zip(runs, complete, strict=True)
        if not there.all()
    }
    common = np.flatnonzero(complete.all(axis=0))
    if not len(common):
        raise EvaluationError(_nothing_in_common(runs, columns))
    kept = union[np.isin(union // width, common)]
    metrics = {
        metric: np.stack([_pick(c.values[metric], k, kept) for c, k in zip(columns, keys, strict=True)])
        for metric in ("similarity", "chrf", "nll", "exact")
    }
    person = np.searchsorted(common, kept // width)
    by_references, odd = _same_references(runs, place, width, kept)
    differing = None if odd is None else (names[kept[odd] // width], int(kept[odd] % width))
    personas = tuple(names[i] for i in common)
    return Aligned(personas, person, kept % width, metrics, missing, by_references, differing)


@dataclass(frozen=True)
class _Columns:
    names: tuple[str, ...]
    codes: NDArray[np.int64]
    example: NDArray[np.int64]
    values: Mapping[str, NDArray[np.float64]]


def _read(run: RunScores) -> _Columns:
    table = run.metrics
    for needed in ("persona", "example", "similarity"):
        if needed not in table.column_names:
            raise EvaluationError(
                f"{run.name}: metrics have no column {needed!r}.\n"
                f"Found: {', '.join(table.column_names)}. Evaluate the run again."
            )
    persona = table["persona"].combine_chunks().cast(pa.string()).dictionary_encode()
    example = table["example"].to_numpy().astype(np.int64)
    if len(example) and example.min() < 0:
        raise EvaluationError(f"{run.name}: metrics hold the example number {example.min()}; they count from 0.")
    values = {metric: _figures(table, metric) for metric in ("similarity", "chrf", "nll", "exact")}
    names = tuple(persona.dictionary.to_pylist())
    codes = persona.indices.to_numpy().astype(np.int64)
    unscored = np.flatnonzero(~np.isfinite(values["similarity"]))
    if len(unscored):
        where = f"{names[codes[unscored[0]]]}, example {example[unscored[0]]}"
        raise EvaluationError(
            f"{run.name}: the similarity of {len(unscored)} answers is no number, first {where}.\n"
            "Evaluate the run again."
        )
    return _Columns(names, codes, example, values)


def _figures(table: pa.Table, metric: str) -> NDArray[np.float64]:
    if metric not in table.column_names:
        return np.full(table.num_rows, np.nan)
    return np.asarray(table[metric].cast(pa.float64()).to_numpy(), dtype=np.float64)


def _pick(values: NDArray[np.float64], keys: NDArray[np.int64], kept: NDArray[np.int64]) -> NDArray[np.float64]:
    order = np.argsort(keys, kind="stable")
    return values[order[np.searchsorted(keys[order], kept)]]


def _same_references(
    runs: Sequence[RunScores], place: Mapping[str, int], width: int, kept: NDArray[np.int64]
) -> tuple[tuple[tuple[str, ...], ...], int | None]:
    """Runs grouped by their reference answers to the examples kept, and the first example where two groups differ."""
    groups: list[tuple[pa.ChunkedArray, list[str]]] = []
    for run in runs:
        if run.generations is None or "reference" not in run.generations.column_names:
            continue
        table = run.generations
        persona = np.array([place.get(name, -1) for name in table["persona"].to_pylist()], dtype=np.int64)
        keys = persona * width + table["example"].to_numpy()
        order = np.argsort(keys, kind="stable")
        at = np.minimum(np.searchsorted(keys[order], kept), max(0, len(keys) - 1))
        if not len(keys) or (keys[order][at] != kept).any():
            continue  # answers to some of the examples alone
        references = table["reference"].take(pa.array(order[at]))
        for those, names in groups:
            if references.equals(those):
                names.append(run.name)
                break
        else:
            groups.append((references, [run.name]))
    found = tuple(tuple(names) for _, names in groups)
    if len(groups) < 2:
        return found, None
    pairs = zip(groups[0][0].to_pylist(), groups[1][0].to_pylist(), strict=True)
    return found, next(i for i, (one, other) in enumerate(pairs) if one != other)


def _refuse_double_names(runs: Sequence[RunScores]) -> None:
    seen: set[str] = set()
    for run in runs:
        if run.name in seen:
            raise EvaluationError(f"{run.name}: two runs of this name cannot stand in one table.\nRename one of them.")
        seen.add(run.name)


def _refuse_double_examples(run: RunScores, keys: NDArray[np.int64], names: Sequence[str], width: int) -> None:
    once, times = np.unique(keys, return_counts=True)
    if len(once) < len(keys):
        double = int(once[times > 1][0])
        raise EvaluationError(
            f"{run.name}: metrics hold {names[double // width]}, example {double % width} twice.\n"
            "One answer per example is expected. Evaluate the run again."
        )


def _nothing_in_common(runs: Sequence[RunScores], columns: Sequence[_Columns]) -> str:
    found = "; ".join(f"{run.name}: {len(c.names)} personas" for run, c in zip(runs, columns, strict=True))
    return (
        "The runs have no persona in common with the same examples, so nothing can be compared.\n"
        f"Found: {found}.\nEvaluate them on the same personas and the same test examples."
    )
