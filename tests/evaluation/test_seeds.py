"""The spread over training seeds stands beside the interval over personas, and warns where the gain is no larger."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from raymerge.evaluation.comparison import Comparison, compare

from .conftest import at_seed, make_world


def with_seeds(soft: dict[int, float], unified: dict[int, float]) -> Comparison:
    runs, clusters = make_world()
    by_name = {"soft": soft, "unified": unified}
    runs = [
        dataclasses.replace(run, by_seed={seed: at_seed(level) for seed, level in by_name.get(run.name, {}).items()})
        for run in runs
    ]
    return compare(runs, clusters=clusters, resamples=200)


def test_differences_are_between_rows_of_the_same_seed() -> None:
    comparison = with_seeds({1: 70.0, 2: 74.0, 3: 71.0}, {1: 60.0, 2: 63.0})
    rows = {row.name: row for row in comparison.rows}
    own = rows["soft"].similarity, rows["unified"].similarity
    spread = rows["soft"].over_seeds
    assert spread.seeds == 4
    assert spread.compared == 3
    assert spread.similarity_sd == pytest.approx(np.std([own[0], 70, 74, 71], ddof=1))
    assert spread.differences == pytest.approx([own[0] - own[1], 10, 11])
    assert spread.difference_sd == pytest.approx(np.std(spread.differences, ddof=1))
    reference = rows["unified"].over_seeds
    assert reference.difference_sd is None
    assert reference.similarity_sd == pytest.approx(np.std([own[1], 60, 63], ddof=1))
    assert rows["own"].over_seeds is None


def test_the_verdict_names_the_spread() -> None:
    comparison = with_seeds({1: 70.0, 2: 74.0}, {1: 60.0, 2: 63.0})
    assert any("Over 3 training seeds soft is at +" in detail for detail in comparison.verdict.details)
    assert not any("as large as its gain" in warning for warning in comparison.warnings)
    assert not any("training seeds" in detail for detail in with_seeds({}, {}).verdict.details)


def test_a_gain_that_another_seed_turns_round_is_warned_of() -> None:
    comparison = with_seeds({1: 50.0, 2: 60.0}, {1: 60.0, 2: 63.0})
    assert any("soft: the spread over training seeds" in warning for warning in comparison.warnings)


def test_seeds_without_the_reference_spread_the_similarity_alone() -> None:
    spread = {row.name: row for row in with_seeds({1: 70.0}, {2: 60.0}).rows}["soft"].over_seeds
    assert (spread.seeds, spread.compared, spread.difference_sd) == (2, 0, None)


def test_seeds_are_read_over_the_personas_of_the_table() -> None:
    """Seed 1 answered for a persona more, which does not count; seed 2 lacks some, and is left out with a note."""
    runs, clusters = make_world()
    more = pa.concat_tables(
        [at_seed(60), pa.table({**at_seed(0, 1).to_pydict(), "persona": ["a_stranger"] * 3, "similarity": [0.0] * 3})]
    )
    by_seed = {1: more, 2: at_seed(70, 20)}
    runs = [dataclasses.replace(run, by_seed=by_seed if run.name == "soft" else {}) for run in runs]
    comparison = compare(runs, clusters=clusters, resamples=100)
    row = comparison.rows[comparison.row("soft")]
    assert row.over_seeds.seeds == 2
    assert row.over_seeds.similarity_sd == pytest.approx(np.std([row.similarity, 60], ddof=1))
    assert any("soft: seed 2 is left out, since it lacks answers of 4 personas" in note for note in comparison.notes)
