"""The choice among trials: the optimism of the best, the simplest one as good, the front, what parameters matter."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from raymerge.errors import EvaluationError
from raymerge.recipes import parse_recipe
from raymerge.search.choice import complexity, importances, optimism, pareto_front, simplest
from raymerge.search.records import Figures, Trial
from raymerge.search.space import Parameter, Space

PERSONAS = 40
small_scores = arrays.arrays(
    np.int64, st.tuples(st.integers(1, 7), st.integers(2, 9)), elements=st.integers(0, 6)
).map(lambda scores: scores.astype(np.float64))  # fmt: skip


def world(rng: np.random.Generator, truth: np.ndarray, kinds: int = 3) -> np.ndarray:
    """Scores (trials, personas): personas differ in difficulty, and trials of a kind do well on the same ones."""
    shared = rng.normal(scale=8, size=PERSONAS)
    of_kind = rng.normal(scale=6, size=(kinds, PERSONAS))[np.arange(len(truth)) % kinds]
    return 50 + truth[:, None] + shared + of_kind + rng.normal(scale=10, size=(len(truth), PERSONAS))


def real_and_estimated(truth: np.ndarray) -> tuple[float, float]:
    """The expected excess of the winner over its own truth, from many worlds, and the mean of estimates in some."""
    rng = np.random.default_rng(3)
    excess = []
    for _ in range(4000):
        means = world(rng, truth).mean(axis=1)
        excess.append(means.max() - 50 - truth[means.argmax()])
    return float(np.mean(excess)), float(
        np.mean([optimism(world(rng, truth), seed=i, resamples=300) for i in range(150)])
    )


@pytest.mark.parametrize("trials", [3, 30])
def test_optimism_of_equal_trials_is_the_real_excess(trials: int) -> None:
    real, estimated = real_and_estimated(np.zeros(trials))
    assert real > 1
    assert estimated == pytest.approx(real, rel=0.1)


def test_optimism_where_most_trials_are_poor_as_in_a_search() -> None:
    real, estimated = real_and_estimated(np.concatenate([np.zeros(10), -np.linspace(10, 40, 30)]))
    assert estimated == pytest.approx(real, rel=0.1)


def test_optimism_errs_to_the_cautious_side_where_trials_differ() -> None:
    real, estimated = real_and_estimated(np.random.default_rng(0).normal(scale=2, size=30))
    assert 0.95 * real < estimated < 1.5 * real


def test_a_winner_that_is_far_better_flatters_itself_by_nothing() -> None:
    assert optimism(world(np.random.default_rng(0), np.array([40.0, *np.zeros(20)]))) == 0


def test_optimism_of_one_trial_is_zero_and_of_one_persona_unknown() -> None:
    scores = world(np.random.default_rng(0), np.zeros(5))
    assert optimism(scores[:1]) == 0
    assert optimism(np.repeat(scores[:1], 6, axis=0)) == pytest.approx(0, abs=1e-9)
    assert np.isnan(optimism(scores[:, :1]))


@given(st.integers(0, 50), st.permutations(range(6)))
def test_optimism_is_blind_to_order_and_difficulty_and_counts_in_points(seed: int, order: list[int]) -> None:
    rng = np.random.default_rng(seed)
    scores = world(rng, np.zeros(6))
    found = optimism(scores, seed, 200)
    assert optimism(scores, seed, 200) == found
    assert optimism(scores[order], seed, 200) == pytest.approx(found)
    assert optimism(2 * scores + rng.normal(size=PERSONAS), seed, 200) == pytest.approx(2 * found)


def test_drawing_in_portions_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = world(np.random.default_rng(1), np.zeros(8))
    found = optimism(scores)
    monkeypatch.setattr("raymerge.search.choice.CELLS_AT_ONCE", 7 * PERSONAS)
    assert optimism(scores) == pytest.approx(found)


def test_scores_that_are_missing_are_refused() -> None:
    scores = np.full((2, 3), 50.0)
    scores[1, 2] = np.nan
    trials = [trial(0), trial(1)]
    for refused in (lambda: optimism(scores), lambda: simplest(trials, scores, [(0,), (1,)])):
        with pytest.raises(EvaluationError, match="row 1 for persona 2 is nan"):
            refused()
    with pytest.raises(EvaluationError, match="nothing to choose among"):
        optimism(np.zeros((0, 3)))


def trial(number: int, penalty: float = 0.0, score: float = 0.0, values: Mapping[str, Any] | None = None) -> Trial:
    return Trial(number, values or {}, "complete", [Figures(PERSONAS, {"similarity": score}, penalty)])


def slow_simplest(scores: list[list[int]], penalties: list[int], complexities: list[tuple[int]]) -> int:
    """The 1-SE rule over whole numbers, exactly: (excess * n)^2 <= variance * n, all as fractions."""
    people = len(scores[0])
    standing = [Fraction(sum(row), people) - penalty for row, penalty in zip(scores, penalties, strict=True)]
    best = standing.index(max(standing))
    alike = []
    for index, row in enumerate(scores):
        differences = [b - x for b, x in zip(scores[best], row, strict=True)]
        mean = Fraction(sum(differences), people)
        variance = sum((d - mean) ** 2 for d in differences) / (people - 1)
        if (standing[best] - standing[index]) ** 2 * people <= variance:
            alike.append(index)
    least = min(complexities[i] for i in alike)
    simple = [i for i in alike if complexities[i] == least]
    return next(i for i in simple if standing[i] == max(standing[j] for j in simple))


@given(small_scores, st.data())
def test_simplest_as_said_slowly(scores: np.ndarray, data: st.DataObject) -> None:
    size = len(scores)
    penalties = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    complexities = data.draw(st.lists(st.tuples(st.integers(0, 3)), min_size=size, max_size=size))
    trials = [trial(10 + i, float(penalty)) for i, penalty in enumerate(penalties)]
    expected = slow_simplest(scores.astype(int).tolist(), penalties, complexities)
    assert simplest(trials, scores, complexities) == 10 + expected


def test_differences_between_personas_make_no_recipes_alike() -> None:
    hard = np.linspace(0, 90, PERSONAS)
    scores = np.stack([hard, hard - 1 + 0.1 * np.sin(np.arange(PERSONAS))])
    assert simplest([trial(0), trial(1)], scores, [(1,), (0,)]) == 0  # unpaired, one point of ninety would be nothing
    assert simplest([trial(0), trial(1)], scores[:, :1], [(1,), (0,)]) == 0
    assert simplest([trial(0), trial(1)], scores[[0, 0], :1], [(1,), (0,)]) == 1


def test_recipes_from_simple_to_involved() -> None:
    written: list[tuple[dict[str, Any], float]] = [
        ({"strategy": "top_k"}, 3.0),
        ({"strategy": "top_k", "temperature": 0.3}, 3.0),
        ({"strategy": "top_k", "temperature": 0.3, "scale": {"match_norm": 1.4}}, 3.0),
        ({"strategy": "top_k", "scale_offsets": {"clusters": {"a": 0.1, "b": 0.0}}}, 3.0),
        ({"strategy": "named", "weights": {"x": 0.5, "y": 0.3, "z": 0.1}}, 3.0),
        ({"strategy": "named", "weights": {"ann": {"x": 0.5, "y": 0.3, "z": 0.1}, "bob": {"x": 1}}}, 3.0),
        ({"strategy": "top_k"}, 5.0),
        ({"strategy": "top_k", "method": "ties"}, 2.0),
        ({"strategy": "top_k", "method": "ties", "density": 0.4}, 2.0),
        ({"strategy": "top_k", "method": "ties"}, 4.0),
        ({"strategy": "top_k", "method": "dare_ties"}, 2.0),
    ]
    order = [complexity(parse_recipe("r", recipe), experts) for recipe, experts in written]
    assert order == sorted(order)
    assert len(set(order)) == len(order)


@given(
    arrays.arrays(np.int64, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.integers(-3, 3)),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_front_by_brute_force(points: np.ndarray, larger: list[bool]) -> None:
    larger = larger[: points.shape[1]]

    def dominates(a: np.ndarray, b: np.ndarray) -> bool:
        gains = [int(x - y) if more else int(y - x) for x, y, more in zip(a, b, larger, strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    expected = [i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)]
    assert pareto_front(points.astype(np.float64), larger) == expected


def test_the_front_refuses_what_is_not_finite() -> None:
    with pytest.raises(EvaluationError, match=r"point \(1, 0\)"):
        pareto_front(np.array([[1.0, 2.0], [np.inf, 1.0]]), [True, False])


SPACE = Space(
    {"strategy": "top_k"},
    (
        Parameter("temperature", "float", 0.02, 1, log=True),
        Parameter("k", "int", 2, 30, log=True),
        Parameter("rank", "choice", choices=(16, "exact")),
        Parameter("method", "choice", choices=("linear", "ties")),
        Parameter("density", "float", 0.1, 1, when={"method": ("ties",)}),
        Parameter("majority_sign", "choice", choices=("total", "frequency"), when={"method": ("ties",)}),
    ),
)


def sampled(
    score: Callable[[dict[str, Any]], float], count: int, penalty: Callable[[dict[str, Any]], float]
) -> list[Trial]:
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=sampler)
    points = [SPACE.suggest(study.ask()) for _ in range(count)]
    return [trial(i, penalty(values), score(values), values) for i, values in enumerate(points)]


def test_the_parameter_that_decides_is_the_important_one() -> None:
    def score(values: dict[str, Any]) -> float:
        return 50 + 5 * np.log(values["temperature"]) + 0.05 * values["k"] + (values["rank"] == "exact")

    found = importances(sampled(score, 80, lambda values: 0.0), SPACE)
    assert next(iter(found)) == "temperature"
    assert found["temperature"] > 0.9
    assert set(found) == {parameter.name for parameter in SPACE.parameters}
    assert sum(found[p.name] for p in SPACE.parameters if not p.when) == pytest.approx(1)


def test_a_conditional_parameter_is_judged_among_the_trials_that_have_it() -> None:
    def score(values: dict[str, Any]) -> float:
        return 60 + values["k"] / 10 if values["method"] == "linear" else 40 + 10 * values["density"]

    found = importances(sampled(score, 80, lambda values: 0.0), SPACE)
    assert found["method"] > 0.8
    assert found["density"] > 0.8
    assert found["majority_sign"] < 0.1
    assert sum(found[p.name] for p in SPACE.parameters if not p.when) == pytest.approx(1)


def test_what_offsets_cost_counts_for_importances() -> None:
    found = importances(sampled(lambda values: 50.0, 40, lambda values: values["k"]), SPACE)
    assert found["k"] > 0.9


def test_trials_that_were_stopped_early_say_what_matters_too() -> None:
    trials = sampled(lambda values: values["k"], 40, lambda values: 0.0)
    for one in trials[:4]:  # scored on everybody, where all came to the same
        one.rungs.append(Figures(40, {"similarity": 70.0}))
    for one in trials[4:]:
        one.state = "stopped"
    assert importances(trials, SPACE)["k"] > 0.9


def test_importances_need_enough_trials_that_differ() -> None:
    trials = sampled(lambda values: values["k"], 40, lambda values: 0.0)
    for one in trials[9:]:
        one.state, one.rungs = "failed", []
    assert importances(trials, SPACE) == {}
    assert importances(sampled(lambda values: 50.0, 40, lambda values: 0.0), SPACE) == {}
    few = [
        one for one in sampled(lambda values: values["k"], 40, lambda values: 0.0) if one.values["method"] == "linear"
    ]
    assert set(importances(few, SPACE)) == {"temperature", "k", "rank", "method"}
