"""The verdict credits neighbours only where their own control is beaten, and errs as rarely as it says."""

import numpy as np
import pytest

from raymerge.evaluation.statistics import bootstrap_means
from raymerge.evaluation.verdict import Standing, controls_of, judge

from .conftest import SOFT, recipe

UNIFIED = Standing("unified", "reference", recipe("unified", "unified"))
NEIGHBOUR = Standing("soft", "recipe", recipe("soft", "soft", **SOFT))
CONTROL = Standing("shuffled", "control", recipe("shuffled", "shuffled", of={"strategy": "soft", **SOFT}))
OTHER = Standing("random_k", "control", recipe("random_k", "random_k", of={"strategy": "top_k", "k": 5}))


def verdict(levels: dict[Standing, float] | list[tuple[Standing, float]], personas: int = 60, seed: int = 0):
    pairs = sorted(levels, key=lambda pair: -pair[1])
    noise = np.random.default_rng(seed).normal(0, 2, size=(len(pairs), personas))
    noise -= noise.mean(axis=1, keepdims=True)
    scores = np.array([level for _, level in pairs])[:, None] + noise
    rows = [standing for standing, _ in pairs]
    place = rows.index(UNIFIED) if UNIFIED in rows else None
    return judge(rows, scores, bootstrap_means(scores.T, resamples=2000), place)


@pytest.mark.parametrize(
    ("soft", "control", "unified", "expected"),
    [
        (75, 60, 65, "Merging neighbours gains 10.0 points over unified."),
        (75, 75, 65, "Merging neighbours gains nothing: soft does no better than its control shuffled."),
        (70, 75, 65, "Merging neighbours gains nothing: soft does worse than its control shuffled."),
        (70, 60, 75, "Neighbours know something, but merging neighbours does not pay: soft does worse than unified."),
        (
            75,
            60,
            75,
            "Neighbours know something, but merging neighbours does not pay: soft does no better than unified.",
        ),
    ],
)
def test_headlines(soft: float, control: float, unified: float, expected: str) -> None:
    assert verdict([(NEIGHBOUR, soft), (CONTROL, control), (UNIFIED, unified)]).headline == expected


def test_without_a_control_neighbours_are_not_credited() -> None:
    found = verdict([(NEIGHBOUR, 75), (UNIFIED, 65)])
    assert "no control says" in found.headline
    assert any("No control was run" in detail for detail in found.details)


def test_a_control_of_another_recipe_is_called_that() -> None:
    found = verdict([(NEIGHBOUR, 75), (UNIFIED, 65), (OTHER, 60)])
    assert "only a control of another recipe" in found.headline
    assert any("a control of another recipe, random_k" in detail for detail in found.details)


def test_a_control_of_another_recipe_is_no_credit_where_merging_does_not_pay() -> None:
    found = verdict([(NEIGHBOUR, 70), (UNIFIED, 75), (OTHER, 60)])
    assert found.headline == (
        "Merging neighbours does not pay: soft does worse than unified, "
        "but only a control of another recipe says that neighbours know more than others."
    )
    assert not found.matched
    assert verdict([(NEIGHBOUR, 70), (UNIFIED, 75), (CONTROL, 60)]).matched


@pytest.mark.parametrize(
    ("gain", "noise", "undecided"), [(2.0, 12.0, True), (0.0, 2.0, False), (5.0, 2.0, False), (-8.0, 12.0, False)]
)
def test_what_this_data_cannot_tell_is_not_called_worthless(gain: float, noise: float, undecided: bool) -> None:
    """Undecided is an interval that holds 0 as well as the three points that were asked for."""
    rows = [NEIGHBOUR, UNIFIED, CONTROL]
    drawn = np.random.default_rng(0).normal(0, noise, size=(3, 40))
    scores = np.array([[65 + gain], [65], [20]]) + drawn - drawn.mean(axis=1, keepdims=True)
    order = np.argsort(-scores.mean(axis=1), kind="stable")
    rows, scores = [rows[i] for i in order], scores[order]
    found = judge(rows, scores, bootstrap_means(scores.T, resamples=2000), rows.index(UNIFIED))
    assert found.undecided == undecided == (found.reference.low <= 0 and found.reference.high >= 3)
    assert ("cannot be told with this data" in found.headline) == undecided
    more = found.with_data_needed("90 personas instead of 40")
    if undecided:
        assert found.headline.startswith("Neighbours know something, but whether merging neighbours pays cannot be")
        assert more.headline.endswith("over unified): that takes about 90 personas instead of 40.")
    else:
        assert more == found


def test_an_unbeaten_control_is_nothing_gained_whatever_the_reference_says() -> None:
    rows = [NEIGHBOUR, CONTROL, UNIFIED]
    scores = np.array([[66.0], [66], [65]]) + np.random.default_rng(0).normal(0, 12, size=(3, 40))
    found = judge(rows, scores, bootstrap_means(scores.T, resamples=2000), 2)
    assert found.reference.cannot_be_told
    assert found.headline.startswith("Merging neighbours gains nothing")
    assert not found.undecided


def test_the_strongest_of_its_own_controls_counts() -> None:
    strong = Standing("random_k_soft", "control", recipe("random_k_soft", "random_k", of={"strategy": "soft", **SOFT}))
    found = verdict([(NEIGHBOUR, 75), (UNIFIED, 65), (CONTROL, 60), (strong, 75), (OTHER, 80)])
    assert found.control.over == "random_k_soft"
    assert "gains nothing" in found.headline


def test_a_control_with_another_scale_is_not_its_own() -> None:
    scaled = Standing("scaled", "control", {**CONTROL.recipe, "scale": 2.0})
    assert controls_of([NEIGHBOUR, scaled, CONTROL], 0) == [2]
    assert controls_of([NEIGHBOUR, scaled], 0) == [1]


def test_without_reference_or_without_recipe_it_says_so() -> None:
    assert "no reference is here" in verdict([(NEIGHBOUR, 75), (CONTROL, 60)]).headline
    assert "No recipe was compared" in verdict([(UNIFIED, 75)]).headline


PROMPTED = {"retrieval": {"examples": 3, "format": "{prompt} {response}"}}


def test_examples_in_the_prompt_are_not_merging() -> None:
    rag = Standing("rag_soft", "recipe", {**NEIGHBOUR.recipe, **PROMPTED})
    rag_unified = Standing("rag_unified", "baseline", {**UNIFIED.recipe, **PROMPTED})
    found = verdict([(rag, 80), (rag_unified, 78), (NEIGHBOUR, 75), (CONTROL, 60), (UNIFIED, 65)])
    assert found.row == "soft"
    assert "soft is the only recipe of its kind." in found.details
    assert any("Above it without being a recipe: rag_unified 78.0" in detail for detail in found.details)
    assert any("Above it with training examples in the prompt too: rag_soft 80.0" in detail for detail in found.details)
    alone = verdict([(rag, 80), (UNIFIED, 65)])
    assert alone.row is None
    assert "No recipe with plain prompts was compared" in alone.headline


def test_a_control_with_examples_in_its_prompt_is_none_of_a_plain_recipe() -> None:
    prompted = Standing("prompted", "control", {**CONTROL.recipe, **PROMPTED})
    assert controls_of([NEIGHBOUR, prompted, CONTROL], 0) == [2]
    assert controls_of([NEIGHBOUR, prompted], 0) == []


def test_controls_at_their_own_best_scale_are_controls() -> None:
    """What both chose for themselves may differ; a scale that one of them was given may not."""
    tuned = Standing("soft", "recipe", {**NEIGHBOUR.recipe, "scale": {"match_norm": 1.4}}, tuned=True)
    control = Standing("shuffled", "control", {**CONTROL.recipe, "scale": {"match_norm": 2.0}}, tuned=True)
    assert controls_of([tuned, control, OTHER], 0) == [1]
    given = Standing("shuffled", "control", control.recipe)
    other = Standing("other", "control", {**CONTROL.recipe, "scale": 3.0})
    assert controls_of([tuned, given, other], 0) == [1, 2]  # of its strategy, none of them its own


def test_one_persona_is_not_judged() -> None:
    rows = [NEIGHBOUR, CONTROL, UNIFIED]
    scores = np.array([[75.0], [60.0], [65.0]])
    found = judge(rows, scores, bootstrap_means(scores.T, resamples=10), 2)
    assert "cannot be judged" in found.headline
    assert found.reference.outcome == "unknown"


def test_what_stands_above_the_recipe_is_named() -> None:
    trained = Standing("cluster_trained", "reference", recipe("cluster_trained", "cluster_trained"))
    found = verdict([(NEIGHBOUR, 75), (CONTROL, 60), (UNIFIED, 65), (trained, 78)])
    assert any("cluster_trained 78.0" in detail for detail in found.details)


def test_a_recipe_chosen_on_validation_is_not_the_best_on_test_and_keeps_its_level() -> None:
    first = Standing("soft", "recipe", NEIGHBOUR.recipe, validation_similarity=70.0)
    second = Standing("moe", "recipe", recipe("moe", "sparse_moe", k=5), validation_similarity=72.0)
    found = verdict([(first, 75), (second, 74), (CONTROL, 60), (UNIFIED, 65)])
    assert found.row == "moe"
    assert found.reference.level == 0.95
    blind = verdict([(NEIGHBOUR, 75), (Standing("moe", "recipe", second.recipe), 74), (CONTROL, 60), (UNIFIED, 65)])
    assert blind.row == "soft"
    assert blind.reference.level == pytest.approx(0.975)


def test_the_best_of_many_useless_recipes_is_rarely_credited() -> None:
    """Six recipes and a control, all the same in truth: a gain over the control at most about one time in forty."""
    generator = np.random.default_rng(11)
    recipes = [Standing(f"soft{i}", "recipe", NEIGHBOUR.recipe) for i in range(6)]
    rows, credited, naive, studies = [*recipes, CONTROL], 0, 0, 250
    for _ in range(studies):
        scores = generator.normal(60, 4, size=(7, 40))
        order = np.argsort(-scores.mean(axis=1))
        means = bootstrap_means(scores[order].T, resamples=1500)
        found = judge([rows[i] for i in order], scores[order], means, None)
        credited += found.control.outcome == "gains"
        best = max(range(6), key=lambda i: scores[i].mean())
        difference = scores[best] - scores[6]
        naive += difference.mean() / (difference.std(ddof=1) / np.sqrt(40)) > 2.02
    assert credited / studies <= 0.05
    assert naive / studies > 0.06  # what the widening is there for
