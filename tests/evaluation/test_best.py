"""The best row of each persona, and how much of it is luck."""

import numpy as np
import pytest

from raymerge.evaluation.best import best_rows
from raymerge.evaluation.comparison import compare
from raymerge.evaluation.scores import RunScores, align

from .conftest import SOFT, recipe, run

PERSONAS, EXAMPLES = 300, 8


def best_of(runs: list[RunScores], place: int | None = 0):
    aligned = align(runs)
    return best_rows(runs, aligned, 100 * aligned.persona_means("similarity"), place)


def noisy(levels: np.ndarray, name: str, strategy: str, seed: int) -> RunScores:
    """levels: true similarity per persona."""
    noise = np.random.default_rng(seed).normal(0, 0.1, size=(len(levels), EXAMPLES))
    parameters = SOFT if strategy == "soft" else {}
    return run(name, recipe(name, strategy, **parameters), np.clip(levels[:, None] + noise, 0, 1))


def equal_rows(rows: int) -> list[RunScores]:
    level = np.full(PERSONAS, 0.5)
    return [noisy(level, "unified", "unified", 0), *(noisy(level, f"soft{i}", "soft", i + 1) for i in range(rows))]


def test_luck_does_not_repeat() -> None:
    """Equal rows: the best one looks several points better than the reference, and is not on other examples."""
    found = best_of(equal_rows(6))
    assert found.halved == PERSONAS
    assert found.optimistic > 3
    assert abs(found.repeated) < 0.8
    assert found.again == pytest.approx(found.by_chance, abs=0.03)
    assert found.by_chance == pytest.approx(1 / 7, abs=0.02)


def test_what_suits_a_persona_repeats() -> None:
    suits = np.arange(PERSONAS) % 2 == 0
    runs = [
        noisy(np.full(PERSONAS, 0.4), "unified", "unified", 0),
        noisy(np.where(suits, 0.8, 0.4), "one", "soft", 1),
        noisy(np.where(suits, 0.4, 0.8), "other", "soft", 2),
    ]
    found = best_of(runs)
    assert found.again > 0.95
    assert found.by_chance == pytest.approx(0.5, abs=0.05)
    assert found.repeated == pytest.approx(found.optimistic, abs=2)
    assert found.repeated > found.single + 15
    assert {count.row: count.personas for count in found.counts} == {"one": 150, "other": 150}
    assert all(count.again > 0.95 and count.gain == pytest.approx(40, abs=3) for count in found.counts)


def test_counts_and_gains_are_those_of_a_plain_computation() -> None:
    runs = equal_rows(3)
    found = best_of(runs)
    scores = 100 * np.stack([np.array(r.metrics["similarity"]).reshape(PERSONAS, EXAMPLES).mean(axis=1) for r in runs])
    assert found.row == tuple(scores.argmax(axis=0))
    assert found.gain == pytest.approx(scores.max(axis=0) - scores[0])
    assert sum(count.personas for count in found.counts) == PERSONAS
    assert sum(count.share for count in found.counts) == pytest.approx(1)
    assert [c.personas for c in found.counts] == sorted((c.personas for c in found.counts), reverse=True)


def test_ceilings_and_controls_do_not_compete() -> None:
    runs = equal_rows(2)
    high = np.full(PERSONAS, 0.9)
    runs += [noisy(high, "oracle", "soft", 8), noisy(high, "random", "random_k", 9)]
    assert set(best_of(runs).row) == {0, 1, 2}


def test_single_examples_cannot_be_halved() -> None:
    level = np.random.default_rng(0).random((5, 1))
    runs = [run("unified", recipe("unified", "unified"), level), run("soft", recipe("soft", "soft", **SOFT), 1 - level)]
    found = best_of(runs)
    assert (found.halved, found.again, found.repeated) == (0, None, None)
    assert all(count.again is None for count in found.counts)
    assert best_of(runs[:1]) is None


def test_without_a_reference_there_is_no_gain() -> None:
    found = best_of(equal_rows(2), place=None)
    assert (found.gain, found.optimistic, found.repeated) == ((), None, None)
    assert found.again is not None


def test_every_choice_is_in_the_json() -> None:
    comparison = compare(equal_rows(2), resamples=50)
    kept = comparison.to_json()["best"]
    assert set(kept["by_persona"]) == set(comparison.personas)
    for place, persona in enumerate(comparison.personas):
        chosen = kept["by_persona"][persona]
        assert chosen["similarity"] == pytest.approx(comparison.scores[:, place].max(), abs=1e-5)
        assert comparison.scores[comparison.row(chosen["row"]), place] == comparison.scores[:, place].max()
        reference = comparison.scores[comparison.row("unified"), place]
        assert chosen["over_reference"] == pytest.approx(chosen["similarity"] - reference, abs=1e-5)
