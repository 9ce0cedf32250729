"""The choice among a few adapters: what a few examples may and may not decide."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.errors import RoutingError
from raymerge.routing.inputs import RoutingInputs
from raymerge.routing.selective import Candidate, choose, pooled_variance, posterior
from raymerge.routing.strategies import route

AMONG = {"among": {"base": "base", "own": "own", "unified": "unified"}}


def candidates(means, personas, noise=0.3, examples=6, seed=0, spread=0.0):
    """Scores of each candidate around its mean; `spread` is how much personas really differ."""
    dice = np.random.default_rng(seed)
    made = {}
    for name, mean in means.items():
        true = {p: mean + spread * dice.normal() for p in personas}
        scores = {p: true[p] + noise * dice.normal(size=examples) for p in personas}
        experts = {p: None if name == "base" else (p if name == "own" else name, 1.0) for p in personas}
        made[name] = Candidate(experts, scores)
    return made


def names(count):
    return [f"persona_{i:03d}" for i in range(count)]


def test_pure_noise_moves_hardly_anybody():
    personas = names(200)
    choice = choose(personas, candidates({"base": 0.3, "own": 0.4, "unified": 0.5}, personas), sure=0.8)
    assert choice.best == "unified"
    assert len(choice.moved) <= 2
    luckiest = candidates({"base": 0.3, "own": 0.4, "unified": 0.5}, personas)
    naive = sum(max(luckiest, key=lambda n: luckiest[n].scores[p].mean()) != "unified" for p in personas)
    assert naive > 30  # what the best of six examples would do


def test_personas_who_really_differ_are_moved_and_gain_by_it():
    personas = names(200)
    truth = candidates({"own": 0.5, "unified": 0.5}, personas, noise=0.0, spread=0.4, seed=3)
    dice = np.random.default_rng(4)
    seen = {
        name: Candidate(c.experts, {p: s + 0.2 * dice.normal(size=6) for p, s in c.scores.items()})
        for name, c in truth.items()
    }
    choice = choose(personas, seen, sure=0.8)
    got = np.mean([truth[choice.chosen[p]].scores[p].mean() for p in personas])
    best_for_all = np.mean([truth[choice.best].scores[p].mean() for p in personas])
    assert len(choice.moved) > 40
    assert got > best_for_all + 0.1


@given(st.integers(0, 1000), st.floats(0.5, 0.99))
def test_more_certainty_moves_fewer(seed, sure):
    personas = names(20)
    made = candidates({"own": 0.45, "unified": 0.5}, personas, spread=0.2, seed=seed)
    assert set(choose(personas, made, sure).moved) <= set(choose(personas, made, 0.5).moved)


@given(st.integers(0, 1000), st.integers(1, 30))
def test_posterior_lies_between_the_prior_and_what_was_measured(seed, count):
    dice = np.random.default_rng(seed)
    means, noise = dice.normal(size=count), dice.uniform(0.01, 2, size=count)
    probability = posterior(means, noise)
    assert ((probability >= 0) & (probability <= 1)).all()
    order = np.argsort(means, kind="stable")
    equal = np.full(count, noise[0])
    assert (np.diff(posterior(means, equal)[order]) >= -1e-12).all()


def test_posterior_without_noise_is_what_was_measured():
    assert posterior(np.array([1.0, -1.0, 0.5]), np.zeros(3)).tolist() == [1.0, 0.0, 1.0]


def test_pooled_variance_is_that_within_groups():
    groups = [np.array([1.0, 3.0]), np.array([10.0, 10.0, 13.0])]
    assert pooled_variance(groups) == pytest.approx((2 + 6) / 3)
    assert pooled_variance([np.array([1.0])]) == 0.0


def test_a_persona_without_scores_or_without_own_adapter_gets_the_best_that_it_can_have():
    personas = names(10)
    made = candidates({"own": 0.9, "unified": 0.5}, personas, noise=0.01)
    own = made["own"]
    del own.scores[personas[0]]
    del own.experts[personas[1]]
    choice = choose(personas, made, 0.8)
    assert choice.best == "own"
    assert choice.chosen[personas[0]] == "own"
    assert choice.chosen[personas[1]] == "unified"


def test_nobody_with_scores_is_refused():
    with pytest.raises(RoutingError, match="no persona has validation scores"):
        choose(["a"], {"own": Candidate({"a": ("a", 1.0)}, {}), "base": Candidate({"a": None}, {})}, 0.8)


def test_the_routing_table_names_what_was_chosen():
    personas = names(30)
    made = candidates({"base": 0.1, "own": 0.5, "unified": 0.5}, personas, noise=0.1, spread=0.3, seed=1)
    inputs = RoutingInputs(personas, personas, candidates=made)
    table, notes = route("selective", AMONG, inputs)
    choice = choose(personas, made, 0.8)
    for persona in personas:
        expert = made[choice.chosen[persona]].experts[persona]
        assert table.row(persona) == ({} if expert is None else {expert[0]: 1.0})
    assert f"{choice.best} is best for the population" in notes[0]
    unified = [group for group in table.groups() if group.adapter == "unified"]
    assert len(unified) == 1


def test_one_example_of_everybody_moves_nobody():
    personas = names(24)
    choice = choose(personas, candidates({"own": 0.5, "unified": 0.5}, personas, examples=1, spread=0.3), 0.8)
    assert choice.moved == ()
