"""What a search leaves behind: trials.parquet, scores.parquet, search.json, best_recipe.yaml. Written and read here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raymerge import storage
from raymerge.errors import EvaluationError
from raymerge.search.records import Figures, Trial

if TYPE_CHECKING:
    import pyarrow as pa

    from raymerge.search.space import Parameter, Space

TRIALS, SCORES, SUMMARY, RECIPE = "trials.parquet", "scores.parquet", "search.json", "best_recipe.yaml"
OBJECTIVES = ("similarity", "bytes", "experts")
PREFIX = "p."  # of the columns that hold parameters
AS_JSON = {b"raymerge": b"json"}  # marks a column whose choices are of several types, or no plain ones


@dataclass(frozen=True)
class Scores:
    """Validation similarity by trial and persona. values: (trials, personas), percent, NaN where it was not scored."""

    trials: tuple[int, ...]
    personas: tuple[str, ...]
    values: NDArray[np.float64]

    def of(self, trials: Sequence[int]) -> NDArray[np.float64]:
        """Rows (len(trials), personas) by numbers of trials. Raises EvaluationError for one that is not there."""
        missing = sorted(set(trials) - set(self.trials))
        if missing:
            raise EvaluationError(f"trial {missing[0]}: its scores by persona are not there.\nRun the search again.")
        return self.values[[self.trials.index(number) for number in trials]]


@dataclass(frozen=True)
class Summary:
    """What a search found, as `search.json` holds it.

    best: number of the trial of the highest score; winner: of the one that is taken, the simplest within one standard
    error of it. similarity: the winner's on validation examples, percent. optimism: how much of it the selection
    accounts for, in points, None where it cannot be known. importances: share by parameter. front: numbers of trials
    that no other beats in all objectives. ranks: the winner at each rank, {rank, similarity, bytes}. log: parameters
    searched by their logarithm. budget: what was spent, such as trials, seconds, answers. run: name of the winner's run
    on test examples, test: its similarity there in percent, beside: it against other runs, {name, similarity,
    difference, low, high}; what was not scored is left empty. notes: what a reader should know.
    """

    winner: int
    best: int
    similarity: float
    optimism: float | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    objectives: Sequence[str] = ("similarity",)
    importances: Mapping[str, float] = field(default_factory=dict)
    front: Sequence[int] = ()
    ranks: Sequence[Mapping[str, Any]] = ()
    log: Sequence[str] = ()
    budget: Mapping[str, Any] = field(default_factory=dict)
    run: str | None = None
    test: float | None = None
    beside: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


def write_summary(folder: str, summary: Summary) -> None:
    """Write `search.json`; what is not finite becomes null. Raises StorageError."""
    storage.write_json(storage.join(folder, SUMMARY), _finite(asdict(summary)))


def read_summary(folder: str) -> Summary:
    """Read `search.json`. Raises StorageError, and EvaluationError where it is none of ours."""
    location = storage.join(folder, SUMMARY)
    found = storage.read_json(location)
    known = {one.name for one in fields(Summary)}
    if not isinstance(found, dict) or set(found) != known:
        keys = sorted(set(found) ^ known) if isinstance(found, dict) else [type(found).__name__]
        raise EvaluationError(
            f"{location}: is no summary of a search by this version: {', '.join(keys)}.\nRun `raymerge search` again."
        )
    values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in found.items()}
    return Summary(**values)


def write_recipe(folder: str, name: str, written: Mapping[str, Any]) -> str:
    """Write `best_recipe.yaml`: a mapping of names to recipes, as a project file has it and `raymerge merge --recipe`
    takes it. Returns its location. Raises StorageError."""
    import yaml

    location = storage.join(folder, RECIPE)
    text = yaml.safe_dump({name: json.loads(json.dumps(written))}, sort_keys=False, allow_unicode=True)
    storage.write_bytes(location, f"# Written by `raymerge search`.\n{text}".encode())
    return location


def trials_table(trials: Sequence[Trial], space: Space) -> pa.Table:
    """A row per trial, with the figures of the most personas that it was scored on; see `write_trials`."""
    import pyarrow as pa

    last = [trial.last for trial in trials]
    columns: dict[str, Any] = {
        "number": pa.array([trial.number for trial in trials], pa.int64()),
        "state": pa.array([trial.state for trial in trials], pa.string()),
    }
    for name in OBJECTIVES:
        columns[name] = pa.array([one.values.get(name) if one else None for one in last], pa.float64())
    for name, kind in (("penalty", pa.float64()), ("personas", pa.int64())):
        columns[name] = pa.array([getattr(one, name) if one else None for one in last], kind)
    for name, kind in (("answers", pa.int64()), ("seconds", pa.float64())):
        columns[name] = pa.array([sum(getattr(one, name) for one in trial.rungs) for trial in trials], kind)
    columns["error"] = pa.array([trial.error for trial in trials], pa.string())
    schema = [pa.field(name, column.type) for name, column in columns.items()]
    for parameter in space.parameters:
        kind = _column_type(parameter)
        values = [trial.values.get(parameter.name) for trial in trials]
        if kind is None:
            values = [
                json.dumps(value, sort_keys=True) if parameter.name in trial.values else None
                for trial, value in zip(trials, values, strict=True)
            ]
        schema.append(pa.field(PREFIX + parameter.name, kind or pa.string(), metadata=None if kind else AS_JSON))
        columns[PREFIX + parameter.name] = pa.array(values, schema[-1].type)
    return pa.table(list(columns.values()), schema=pa.schema(schema))


def write_trials(folder: str, trials: Sequence[Trial], space: Space) -> None:
    """Write `trials.parquet`: number, state, similarity (percent), bytes, experts, penalty (points), personas, answers
    and seconds (of all its subsets of personas), error, and a column `p.NAME` for each parameter, null where a
    condition leaves it out. A column of choices that are not of one plain type holds them as JSON. Raises StorageError.
    """
    storage.write_bytes(storage.join(folder, TRIALS), storage.encode_parquet(trials_table(trials, space)))


def read_trials(folder: str) -> list[Trial]:
    """The trials of `trials.parquet`, with last figures. Raises StorageError, EvaluationError for another table."""
    location = storage.join(folder, TRIALS)
    table = storage.read_parquet(location)
    _need(table, ("number", "state", *OBJECTIVES, "penalty", "personas", "answers", "seconds", "error"), location)
    coded = {one.name for one in table.schema if (one.metadata or {}).items() >= AS_JSON.items()}
    trials = []
    for row in table.to_pylist():
        values = {
            name.removeprefix(PREFIX): json.loads(value) if name in coded else value
            for name, value in row.items()
            if name.startswith(PREFIX) and value is not None
        }
        rungs = []
        if row["personas"] is not None:
            figures = {name: row[name] for name in OBJECTIVES if row[name] is not None}
            rungs = [Figures(row["personas"], figures, row["penalty"], row["answers"], row["seconds"])]
        trials.append(Trial(row["number"], values, row["state"], rungs, row["error"]))
    return trials


def write_scores(folder: str, scores: Scores) -> None:
    """Write `scores.parquet`: trial, persona, similarity (percent), a row for each known one. Raises StorageError."""
    import pyarrow as pa

    row, column = np.nonzero(~np.isnan(scores.values))
    table = pa.table(
        {
            "trial": pa.array(np.array(scores.trials, dtype=np.int64)[row]),
            "persona": pa.array(scores.personas, pa.string()).take(pa.array(column)),
            "similarity": pa.array(scores.values[row, column]),
        }
    )
    storage.write_bytes(storage.join(folder, SCORES), storage.encode_parquet(table))


def read_scores(folder: str) -> Scores:
    """Read `scores.parquet`, trials and personas in the order in which they first appear there. Raises StorageError,
    and EvaluationError for another table or a trial's persona given twice."""
    location = storage.join(folder, SCORES)
    table = storage.read_parquet(location)
    _need(table, ("trial", "persona", "similarity"), location)
    trials, personas = (table.column(name).combine_chunks().dictionary_encode() for name in ("trial", "persona"))
    row, column = trials.indices.to_numpy(), personas.indices.to_numpy()
    values = np.full((len(trials.dictionary), len(personas.dictionary)), np.nan)
    cells = row.astype(np.int64) * values.shape[1] + column
    if len(np.unique(cells)) < len(cells):
        raise EvaluationError(f"{location}: scores a persona twice for one trial.\nRun `raymerge search` again.")
    values[row, column] = table.column("similarity").to_numpy()
    return Scores(tuple(trials.dictionary.to_pylist()), tuple(personas.dictionary.to_pylist()), values)


def _column_type(parameter: Parameter) -> Any:
    """The type of a parameter's column, None where its choices are only to be told apart as JSON."""
    import pyarrow as pa

    if parameter.kind != "choice":
        return pa.int64() if parameter.kind == "int" else pa.float64()
    plain = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    kinds = {type(choice) for choice in parameter.choices}
    return plain.get(kinds.pop()) if len(kinds) == 1 else None


def _need(table: pa.Table, names: Sequence[str], location: str) -> None:
    for name in names:
        if name not in table.column_names:
            raise EvaluationError(
                f"{location}: has no column {name!r}.\nFound {', '.join(table.column_names)}. "
                "It is not of `raymerge search`, or of another version: run the search again."
            )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
