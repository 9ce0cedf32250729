"""The tables that a search leaves behind say again what was written into them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raymerge import storage
from raymerge.errors import EvaluationError, StorageError
from raymerge.recipes import parse_recipes
from raymerge.search import results
from raymerge.search.records import Figures, Trial
from raymerge.search.results import Scores, Summary
from raymerge.search.space import Parameter, Space

SPACE = Space(
    {"strategy": "top_k"},
    (
        Parameter("k", "int", 2, 30),
        Parameter("weights.math", "float", 0, 1),
        Parameter("method", "choice", choices=("linear", "ties")),
        Parameter("centred", "choice", choices=(True, False)),
        Parameter("rank", "choice", choices=(16, 32, "exact", None)),
        Parameter("density", "choice", choices=(0.5, 1), when={"method": ("ties",)}),
    ),
)
numbers = st.floats(allow_nan=False, allow_infinity=False, width=64)


@st.composite
def trials(draw: st.DrawFn, number: int) -> Trial:
    values: dict[str, Any] = {}
    for one in SPACE.parameters:
        drawn = {"int": st.integers(2, 30), "float": st.floats(0, 1), "choice": st.sampled_from(one.choices or (0,))}
        if one.counts(values):
            values[one.name] = draw(drawn[one.kind])
    state = draw(st.sampled_from(["running", "complete", "stopped", "failed"]))
    scored = draw(st.booleans()) or state in ("complete", "stopped")
    names = draw(st.sampled_from([("similarity",), ("similarity", "bytes", "experts")]))
    figures = Figures(
        draw(st.integers(1, 900)), {name: draw(numbers) for name in names}, draw(numbers), draw(st.integers(0, 99)),
        draw(st.floats(0, 1e6)),
    )  # fmt: skip
    return Trial(number, values, state, [figures] if scored else [], "it broke" if state == "failed" else None)


@given(st.integers(0, 4).flatmap(lambda count: st.tuples(*(trials(number) for number in range(count)))))
def test_trials_come_back(tmp_path_factory: pytest.TempPathFactory, given_trials: tuple[Trial, ...]) -> None:
    folder = str(tmp_path_factory.mktemp("search"))
    results.write_trials(folder, given_trials, SPACE)
    found = results.read_trials(folder)
    assert found == list(given_trials)
    for one, same in zip(given_trials, found, strict=True):
        assert {k: type(v) for k, v in same.values.items()} == {k: type(v) for k, v in one.values.items()}


def test_the_columns_of_trials_and_what_they_count(tmp_path: Path) -> None:
    rungs = [Figures(n, {"similarity": 50.0 + n}, answers=10, seconds=1.5) for n in (20, 60)]
    values = {"k": 3, "weights.math": 0.5, "method": "ties", "centred": True, "rank": "exact", "density": 0.5}
    results.write_trials(str(tmp_path), [Trial(0, values, "complete", rungs)], SPACE)
    table = storage.read_parquet(str(tmp_path / "trials.parquet"))
    assert table.column_names == [
        "number", "state", "similarity", "bytes", "experts", "penalty", "personas", "answers", "seconds", "error",
        "p.k", "p.weights.math", "p.method", "p.centred", "p.rank", "p.density",
    ]  # fmt: skip
    [row] = table.to_pylist()
    assert (row["similarity"], row["personas"], row["answers"], row["seconds"]) == (110.0, 60, 20, 3.0)
    assert (row["bytes"], row["p.k"], row["p.method"], row["p.centred"]) == (None, 3, "ties", True)
    [found] = results.read_trials(str(tmp_path))
    assert found.last == Figures(60, {"similarity": 110.0}, answers=20, seconds=3.0)


@given(st.data())
def test_scores_come_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = str(tmp_path_factory.mktemp("search"))
    count, people = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    subset = [data.draw(st.integers(1, people)) for _ in range(count - 1)]  # nested subsets; the first one is whole
    values = np.full((count, people), np.nan)
    for row, size in enumerate([people, *subset]):
        values[row, :size] = data.draw(st.lists(numbers, min_size=size, max_size=size))
    written = Scores(tuple(range(3, 3 + count)), tuple(f"persona {i}" for i in range(people)), values)
    results.write_scores(folder, written)
    found = results.read_scores(folder)
    assert (found.trials, found.personas) == (written.trials, written.personas)
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_array_equal(found.of([found.trials[-1], 3]), values[[-1, 0]])
    with pytest.raises(EvaluationError, match="trial 2"):
        found.of([2])


def test_the_summary_comes_back(tmp_path: Path) -> None:
    summary = Summary(
        winner=4, best=7, similarity=71.25, optimism=1.5, recipe={"strategy": "top_k", "k": 7},
        importances={"k": 0.75, "scale": 0.25}, front=(4, 7), log=("k",), budget={"trials": 60, "minutes": None},
        ranks=({"rank": "exact", "similarity": 71.5, "bytes": 2048.0},), notes=("it was short",), run="searched",
        beside=({"name": "unified", "difference": 1.5},),
    )  # fmt: skip
    results.write_summary(str(tmp_path), summary)
    assert results.read_summary(str(tmp_path)) == summary
    results.write_summary(str(tmp_path), Summary(0, 0, 50.0, math.nan))
    assert results.read_summary(str(tmp_path)).optimism is None


def test_the_recipe_is_one_of_a_project_file(tmp_path: Path) -> None:
    recipe = {"strategy": "top_k", "k": 7, "temperature": 1e-05, "method": "ties", "density": 0.30000000000000004,
              "scale": {"match_norm": 1.4}, "rank": "exact"}  # fmt: skip
    location = results.write_recipe(str(tmp_path), "searched", recipe)
    found = yaml.safe_load(Path(location).read_text())
    assert found == {"searched": recipe}
    assert parse_recipes(found) == parse_recipes({"searched": recipe})


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    folder = str(tmp_path)
    with pytest.raises(StorageError):
        results.read_trials(folder)
    other = storage.encode_parquet(pa.table({"trial": [1, 1], "persona": ["a", "a"], "similarity": [1.0, 2.0]}))
    for name in (results.TRIALS, results.SCORES):
        storage.write_bytes(storage.join(folder, name), other)
    with pytest.raises(EvaluationError, match="no column 'number'"):
        results.read_trials(folder)
    with pytest.raises(EvaluationError, match="a persona twice"):
        results.read_scores(folder)
    for found in ({"winner": 3}, [1]):
        storage.write_json(storage.join(folder, results.SUMMARY), found)
        with pytest.raises(EvaluationError, match=r"search\.json: is no summary"):
            results.read_summary(folder)
