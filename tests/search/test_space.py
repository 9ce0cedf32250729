"""Laws of a search space, under the samplers that are used; and what is refused before anything starts."""

import itertools
import math

import numpy as np
import optuna
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from raymerge.config import Search
from raymerge.errors import ProjectError, RecipeError
from raymerge.recipes import parse_recipe
from raymerge.search.samplers import Given
from raymerge.search.space import parse_space
from raymerge.search.weights import LEAST_SUM, lattice, on_simplex, with_sum

PEOPLE = {f"p{i}": 60 for i in range(40)}
LOG_SCALE = {"min": 0.5, "max": 3, "log": True}
SPACES = {
    "default": {},
    "numbers": {"k": {"min": 2, "max": 30, "log": True}, "temperature": {"min": 0.02, "max": 1}, "scale": LOG_SCALE},
    "steps": {"k": {"min": 1, "max": 10, "step": 4}, "self_weight": {"min": 0, "max": 1, "step": 0.3}},
    "routing": {
        "strategy": ["top_k", "soft", "sparse_moe", "simple_average"],
        "k": {"min": 2, "max": 30, "when": {"strategy": ["top_k"]}},
        "temperature": {"min": 0.02, "max": 1, "log": True},
        "centred": [True, False],
    },
    "methods": {
        "method": ["linear", "ties", "breadcrumbs", "karcher"],
        "density": {"min": 0.1, "max": 1},
        "gamma": {"min": 0, "max": 0.05},
        "majority_sign": ["total", "frequency"],
        "rank": [16, {"energy": 0.9, "max": 32}, "exact"],
        "scale": ["match_norm", 0.5, 2.0],
    },
    "chain": {
        "density": {"min": 0.1, "max": 1, "when": {"rank": ["exact"]}},
        "method": {"choices": ["ties", "dare_ties"], "when": {"strategy": "soft"}},
        "strategy": ["top_k", "soft"],
        "rank": {"choices": [8, "exact"], "when": {"strategy": ["soft"]}},
    },
    "simplex": {"strategy": ["named", "top_k"], "weights": {"experts": ["a.b", "c", "d"], "simplex": True}},
    "free": {"weights": {"experts": ["a", "b", "c"], "min": -1, "max": 1}},
    "personal": {"weights": {"experts": ["a", "b"], "min": -1, "max": 2, "per": "persona"}},
    "hybrid": {"own_weight": {"min": 0, "max": 1}, "scale": LOG_SCALE},
    "layers": {"scale_by_layers": {"groups": 3, "max": 0.5}, "weights": {"experts": ["a", "b"]}},
}
NAMED = {"strategy": "named"}
RECIPES = {"free": NAMED, "personal": NAMED, "layers": NAMED, "hybrid": {"strategy": "hybrid"}}
NUMBERS = ["default", "numbers", "steps", *RECIPES]  # what CMA-ES can search
OFFSETS = {
    "scale": LOG_SCALE,
    "strategy": ["top_k", "simple_average"],
    "method": ["ties", "karcher"],
    "scale_by_cluster": {"max": 0.5, "penalty": 2.0},
    "scale_by_layers": {"groups": 3, "max": 0.4, "penalty": 1.0},
}


def make(space, sampler="random", recipe=None, validation=PEOPLE, **search):
    given = {"recipe": recipe, "space": space, "sampler": sampler, "free": 100, **search}
    return parse_space(
        Search(**{key: value for key, value in given.items() if value is not None}),
        {"near": {"strategy": "top_k", "k": 7, "temperature": 0.3}},
        "raymerge.yaml",
        clusters=("c0", "c1", "c2"),
        validation=validation,
        centred=True,
    )


def suggested(space, sampler, count=25):
    study = optuna.create_study(sampler=sampler)
    for i in range(count):
        trial = study.ask()
        values = space.suggest(trial)
        assert values == trial.params
        study.tell(trial, math.sin(i))
        yield values


SAMPLERS = {
    "random": lambda: optuna.samplers.RandomSampler(seed=0),
    "tpe": lambda: optuna.samplers.TPESampler(seed=0, n_startup_trials=5),
    "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=0, n_startup_trials=2, warn_independent_sampling=False),
}


@pytest.mark.parametrize(
    ("name", "sampler"),
    [*itertools.product([*SPACES, "offsets"], ["random", "tpe"]), *itertools.product(NUMBERS, ["cmaes"])],
)
def test_whatever_a_sampler_proposes_is_a_recipe_that_yaml_keeps(name, sampler):
    people = dict(itertools.islice(PEOPLE.items(), 2)) if name == "personal" else PEOPLE
    space = make({**SPACES, "offsets": OFFSETS}[name], recipe=RECIPES.get(name), validation=people)
    assert (name in NUMBERS) == (space.continuous and not space.conditional)
    for values in suggested(space, SAMPLERS[sampler]()):
        recipe = space.recipe(values)
        read = yaml.safe_load(yaml.safe_dump(space.written(values)))
        assert parse_recipe("search", read) == recipe
        for one in space.parameters:
            if one.name in values and len(one.path) == 1 and one.kind != "choice":
                found = {**recipe.strategy_parameters, **recipe.method_parameters, "scale": recipe.scale}[one.name]
                assert (found if one.name != "scale" else found["match_norm"]) == values[one.name]
                assert one.low <= values[one.name] <= one.high


@pytest.mark.parametrize("name", ["routing", "methods", "chain", "simplex"])
def test_a_parameter_is_there_if_and_only_if_its_conditions_hold(name):
    space = make(SPACES[name])
    assert space.conditional
    seen = set()
    for values in suggested(space, SAMPLERS["random"](), 60):
        for one in space.parameters:
            holds = all(values.get(other, "absent") in allowed for other, allowed in one.when.items())
            assert (one.name in values) == holds
            seen.add((one.name, holds))
    assert {(one.name, True) for one in space.parameters} <= seen
    assert {(one.name, False) for one in space.parameters if one.when} <= seen


def test_conditions_follow_from_the_registries():
    when = {one.name: one.when for one in make(SPACES["routing"]).parameters}
    assert when["k"] == {"strategy": ("top_k",)}  # sparse_moe has k too, and is left out by `when`
    assert when["temperature"] == {"strategy": ("top_k", "soft", "sparse_moe")}
    when = {one.name: one.when for one in make(SPACES["methods"]).parameters}
    assert when["density"] == {"method": ("ties", "breadcrumbs")}
    assert when["gamma"] == {"method": ("breadcrumbs",)}
    assert when["rank"] == {}
    assert make({"density": {"min": 0.1, "max": 1}}, recipe={"strategy": "soft", "method": "ties"}).conditional is False


def test_a_condition_may_name_a_choice_that_is_a_mapping():
    ranks = [{"energy": 0.9, "max": 32}, 8]
    space = make({"k": {"min": 2, "max": 9, "when": {"rank": ranks[0]}}, "rank": ranks})
    assert {(space.recipe(values).rank == 8, "k" in values) for values in suggested(space, SAMPLERS["random"]())} == {
        (True, False),
        (False, True),
    }


def test_a_parameter_of_the_recipe_is_left_out_where_it_has_no_meaning():
    space = make({"strategy": ["soft", "top_k"]}, recipe="near")
    assert space.written({"strategy": "soft"}) == {"strategy": "soft", "temperature": 0.3}
    assert space.written({"strategy": "top_k"}) == {"strategy": "top_k", "k": 7, "temperature": 0.3}


GRIDS = st.fixed_dictionaries(
    {"strategy": st.lists(st.sampled_from(["top_k", "soft", "sparse_moe", "own"]), min_size=1, unique=True)},
    optional={
        "method": st.lists(st.sampled_from(["linear", "ties", "della"]), min_size=1, unique=True),
        "rank": st.lists(st.sampled_from([4, 16, "keep"]), min_size=1, unique=True),
        "scale": st.builds(lambda n: {"min": 0.5, "max": round(0.5 + 0.3 * n, 6), "step": 0.3}, st.integers(1, 4)),
    },
)


@settings(max_examples=40, deadline=None)
@given(GRIDS, st.integers(1, 3), st.integers(0, 3))
def test_a_grid_is_the_conditional_product_without_repeats(spec, low, more):
    if {"top_k", "sparse_moe"} & set(spec["strategy"]):
        spec = {**spec, "k": {"min": low, "max": low + 1 + more}}
    if {"ties", "della"} & set(spec.get("method", ())):
        spec = {**spec, "density": [0.2, 0.5]}
    space = make(spec, "grid")
    points = space.grid()
    count = 0
    for strategy, method in itertools.product(spec["strategy"], spec.get("method", ["linear"])):
        ks = more + 2 if strategy in ("top_k", "sparse_moe") else 1
        densities = 2 if method != "linear" else 1
        steps = round((spec["scale"]["max"] - 0.5) / 0.3) + 1 if "scale" in spec else 1
        count += ks * densities * steps * len(spec.get("rank", [1]))
    assert len(points) == count
    assert len({tuple(sorted(point.items(), key=str)) for point in points}) == count
    assert len({str(space.recipe(point).as_dict()) for point in points}) == count
    for point in points:  # optuna takes each as it is: within its bounds and on its steps
        study = optuna.create_study(sampler=Given(point))
        assert space.suggest(study.ask()) == point


def test_a_grid_over_weights_is_the_lattice_of_the_simplex_and_leaves_out_sums_below_the_least():
    weights = {"experts": ["a", "b", "c"], "simplex": True, "step": 0.25}
    space = make({"weights": weights}, "grid", {"strategy": "named"})
    found = [tuple(space.written(point)["weights"].values()) for point in space.grid()]
    quarters = {p for p in itertools.product(range(5), repeat=3) if sum(p) == 4}
    assert {tuple(round(4 * w) for w in point) for point in found} == quarters
    assert len(found) == len(quarters)
    np.testing.assert_allclose(np.array(found) * 4, np.round(np.array(found) * 4), atol=1e-12)

    free = {"experts": ["a", "b"], "min": -1, "max": 1, "step": 1}
    space = make({"weights": free}, "grid", {"strategy": "named"})
    assert [tuple(space.written(p)["weights"].values()) for p in space.grid()] == [(0, 1), (1, 0), (1, 1)]


@given(st.lists(st.floats(1e-6, 1), min_size=2, max_size=8))
def test_weights_on_the_simplex_are_never_negative_and_sum_to_one(numbers):
    weights = on_simplex(numbers)
    assert min(weights) >= 0
    assert math.isclose(sum(weights), 1)


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ({"experts": ["a", "b", "scale"]}, ["scale", "a", "b", "weights.scale"]),
        ({"experts": ["a", "b"], "min": -1, "max": 1}, ["scale", "a", "b"]),
        ({"experts": ["a", "b"], "per": "persona"}, ["scale", "ann.a", "ann.b", "bob.a", "bob.b"]),
    ],
)
def test_a_point_is_told_with_the_weights_that_are_merged(weights, names):
    section = {"scale": {"min": 0.5, "max": 2.0}, "weights": weights}
    search = Search(recipe={"strategy": "named", "rank": "exact"}, space=section)
    space = parse_space(search, {}, "x", validation={"ann": 60, "bob": 60}, centred=True)
    values = {one.name: 0.1 * (number + 3) for number, one in enumerate(space.parameters)}
    told = space.told(values)
    assert list(told) == names
    assert told["scale"] == values["scale"]
    merged = space.written(values)["weights"]
    rows = merged if "per" in weights else {"": merged}
    expected = [weight for row in rows.values() for weight in row.values()]
    assert list(told.values())[1:] == expected


def test_weights_on_the_simplex_are_uniform_on_it():
    weights = np.array([on_simplex(u) for u in np.random.default_rng(0).uniform(1e-6, 1, (4000, 3))])
    for column in weights.T:  # of a uniform point of the simplex of three, each weight is Beta(1, 2)
        assert stats.kstest(column, stats.beta(1, 2).cdf).pvalue > 1e-3


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_free_weights_with_too_small_a_sum_go_to_the_nearest_that_are_a_merge(numbers, random):
    weights = np.array(with_sum(numbers, -1.0, 1.0))
    assert weights.sum() >= LEAST_SUM - 1e-9
    assert np.abs(weights).max() <= 1
    if sum(numbers) >= LEAST_SUM:
        assert list(weights) == numbers
    for _ in range(20):  # no other point of the box with such a sum is nearer
        other = np.array([random.uniform(-1, 1) for _ in numbers])
        if other.sum() >= LEAST_SUM:
            assert np.linalg.norm(weights - numbers) <= np.linalg.norm(other - numbers) + 1e-9


@given(st.integers(2, 4), st.integers(1, 6))
def test_a_lattice_has_each_composition_once(count, parts):
    points = list(lattice(count, parts))
    assert len(set(points)) == len(points) == math.comb(parts + count - 1, count - 1)
    assert all(math.isclose(sum(point), 1) for point in points)


def test_names_of_experts_and_personas_may_hold_dots():
    written = make(SPACES["simplex"]).written(
        {"strategy": "named", "weights.a.b": 0.5, "weights.c": 0.5, "weights.d": 1}
    )
    assert written["weights"] == {"a.b": 0.5, "c": 0.5, "d": 0.0}
    people = {"p.1": 50, "p.2": 50}
    space = make(
        {"weights": {"experts": ["a.b", "c"], "per": "persona"}}, recipe={"strategy": "named"}, validation=people
    )
    values = next(suggested(space, SAMPLERS["random"]()))
    assert {persona: set(row) for persona, row in space.written(values)["weights"].items()} == {
        "p.1": {"a.b", "c"},
        "p.2": {"a.b", "c"},
    }
    assert space.free == 2


@pytest.mark.parametrize(
    ("name", "free", "continuous", "conditional"),
    [
        ("default", 3, True, False), ("routing", 2, False, True), ("simplex", 2, False, True),
        ("free", 3, True, False), ("methods", 2, False, True),
    ],
)  # fmt: skip
def test_free_numbers_choices_and_conditions_are_counted(name, free, continuous, conditional):
    space = make(SPACES[name], recipe=RECIPES.get(name))
    assert (space.free, space.continuous, space.conditional) == (free, continuous, conditional)


def test_the_default_space_fits_the_recipe_and_the_personas():
    assert {one.name: one.bounds for one in make({}).parameters} == {
        "k": (2, 30), "temperature": (0.02, 1), "scale": (0.5, 3)
    }  # fmt: skip
    assert [one.name for one in make({}, recipe={"strategy": "own"}).parameters] == ["scale"]
    assert next(one.bounds for one in make({}, validation={"a": 1, "b": 1, "c": 1, "d": 1}).parameters) == (2, 3)
    assert [one.name for one in make({}, validation={"a": 1, "b": 1}).parameters] == ["temperature", "scale"]


def test_offsets_are_penalised_by_their_mean_square_and_count_where_they_act():
    space = make(OFFSETS)
    assert space.free == 1 + 3 + 3
    values = {
        "strategy": "top_k", "method": "ties", "scale": 1.4, "scale_offsets.clusters.c0": 0.3,
        "scale_offsets.clusters.c1": -0.3, "scale_offsets.clusters.c2": 0.0, "scale_offsets.layers.0": 0.1,
        "scale_offsets.layers.1": 0.2, "scale_offsets.layers.2": -0.4,
    }  # fmt: skip
    assert math.isclose(space.penalty(values), 2.0 * (0.18 / 3) + 1.0 * (0.21 / 3))
    assert space.written(values)["scale_offsets"] == {
        "clusters": {"c0": 0.3, "c1": -0.3, "c2": 0.0}, "layers": [0.1, 0.2, -0.4]
    }  # fmt: skip
    nothing = {"strategy": "simple_average", "method": "karcher", "scale": 1.4}
    assert space.penalty(nothing) == 0
    assert "scale_offsets" not in space.written(nothing)


def test_values_that_are_no_point_are_refused():
    space = make(SPACES["routing"])
    with pytest.raises(RecipeError, match="centred, k: missing, or given where"):
        space.recipe({"strategy": "soft", "temperature": 0.1, "k": 3})


PAIR = {"experts": ["a", "b"]}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"temprature": {"min": 0, "max": 1}}, r"unknown parameter 'temprature'. Did you mean temperature"),
        ({"k": {"min": 9, "max": 3}}, r"search.space.k: the range from 9 to 3 is empty"),
        ({"k": {"min": 3, "max": 3}}, "holds one value"),
        ({"k": {"min": 3}}, "k: max is missing"),
        ({"k": {"min": 2.5, "max": 9}}, "k: found 2.5.\nExpected whole"),
        ({"k": {"min": 2, "max": 9, "stp": 2}}, r"unknown key 'stp'. Did you mean step"),
        ({"k": {"min": 2, "max": 9, "step": 8}}, "step is 8"),
        ({"k": {"min": 2, "max": 9, "step": 2, "log": True}}, "both log and step"),
        ({"scale": {"min": 0, "max": 9, "log": True}}, "log scale from 0"),
        ({"scale": {"min": 1, "max": float("inf")}}, "max is inf"),
        ({"scale": {"min": 1, "max": float("nan")}}, "max is nan"),
        ({"scale": {"min": True, "max": 2}}, "min is True"),
        ({"scale": {"min": 1, "max": 2, "log": "yes"}}, "log is 'yes'"),
        ({"k": 5}, "found 5.\nExpected a list of choices, or a range"),
        ({"k": []}, "has no choices"),
        ({"k": [5, 5]}, "choice 5 twice"),
        ({"strategy": {"min": 0, "max": 1}}, "is not a number"),
        ({"strategy": ["top_k", "sofd"]}, r"unknown strategy 'sofd'. Did you mean soft"),
        ({"strategy": ["top_k", "prefix"]}, "strategy prefix merges nothing"),
        ({"method": ["tie"]}, r"unknown method 'tie'. Did you mean ties"),
        ({"density": {"min": 0.1, "max": 1}}, r"density: counts for nothing that is tried \(top_k, linear\)"),
        ({"own_weight": {"min": 0, "max": 1}}, "It is a parameter of hybrid"),
        ({"strategy": ["top_k", "soft"], "k": {"min": 2, "max": 5, "when": {"strategy": ["soft"]}}}, "k: never counts"),
        ({"k": {"min": 2, "max": 5, "when": {"temperature": [1]}}}, "unknown parameter with choices 'temperature'"),
        ({"k": {"min": 2, "max": 5, "when": {"rank": [7]}}, "rank": [8]}, "unknown choice of rank '7'"),
        ({"k": {"min": 2, "max": 5, "when": "always"}}, "when is 'always'"),
        (
            {
                "rank": {"choices": [8, 16], "when": {"centred": [True]}},
                "centred": {"choices": [True, False], "when": {"rank": [8]}},
            },
            "rank: counts only beside itself",
        ),
        ({"weights": PAIR}, r"weights: counts for nothing that is tried \(top_k"),
        ({"strategy": ["named"], "weights": {"experts": ["a"]}}, "two names or more"),
        ({"strategy": ["named"], "weights": {"experts": ["a", "a"]}}, "two names or more, each once"),
        ({"strategy": ["named"], "weights": {**PAIR, "simplex": True, "min": 0}}, "on the simplex have no min"),
        ({"strategy": ["named"], "weights": {**PAIR, "step": 0.5}}, "steps in a grid alone"),
        ({"strategy": ["named"], "weights": {**PAIR, "min": -2, "max": -1}}, "Expected max above 0"),
        ({"strategy": ["named"], "weights": {**PAIR, "per": "cluster"}}, "per is 'cluster'"),
        ({"scale_by_cluster": True}, "scale_by_cluster: found True.\nExpected {max"),
        ({"scale_by_cluster": {"max": 0}}, "Expected max above 0"),
        ({"scale_by_cluster": {"penalty": -1}}, "penalty 0 or more"),
        ({"scale_by_layers": {"groups": 1}}, "groups is 1"),
        ({"scale_by_layers": {"max": 1}, "method": ["karcher"]}, "counts for nothing that is tried"),
        ({"scale_by_cluster": {"max": 1}, "strategy": ["simple_average"]}, "counts for nothing that is tried"),
        # no valid recipe
        ({"k": {"min": -9, "max": 0}}, r"holds no valid recipe.\n.*k: -9}: strategy top_k: k is -9"),
        ({"temperature": {"min": 0, "max": 1}}, r"{temperature: 0.0} is no valid recipe: .*temperature is 0.0"),
        ({"method": ["linear", "ties"], "density": {"min": 0.1, "max": 1.5}}, "ties, density: 1.5} is no valid"),
        ({"method": ["linear", "slerp"]}, "{method: slerp} is no valid recipe: method slerp takes 2 adapters, not 5"),
        ({"rank": [8, 0]}, "{rank: 0} is no valid recipe: rank 0 is no rank"),
        ({"strategy": ["top_k", "hybrid"]}, "{strategy: hybrid} is no valid recipe: own_weight is tuned"),
        ({"scale": ["tuned", 1]}, "{scale: tuned} is no valid recipe: factor is tuned"),
        (
            {"strategy": ["named"], "method": ["linear", "karcher"], "weights": {**PAIR, "min": -1, "max": 1}},
            "method: karcher, .* is no valid recipe: weights may be negative, which method karcher cannot",
        ),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_is_refused_by_name(space, message):
    with pytest.raises(ProjectError, match=message) as error:
        make(space)
    assert str(error.value).startswith("raymerge.yaml: search.")
    assert "\n" in str(error.value)


def test_a_search_that_cannot_be_is_refused():
    with pytest.raises(ProjectError, match=r"raymerge.yaml: search.recipe: unknown recipe 'nearr'. Did you mean near"):
        make({}, recipe="nearr")
    with pytest.raises(ProjectError, match=r"raymerge.yaml: search.recipe: strategy base merges nothing"):
        make({}, recipe={"strategy": "base"})
    with pytest.raises(ProjectError, match=r"raymerge.yaml: search.recipe: unknown strategy 'topk'"):
        make({}, recipe={"strategy": "topk"})
    with pytest.raises(ProjectError, match=r"unknown parameter 'desity'"):
        make({}, recipe={"strategy": "top_k", "desity": 0.1})
    with pytest.raises(ProjectError, match="no validation examples"):
        make({}, validation={"a": 0})
    with pytest.raises(ProjectError, match="no validation examples"):
        make({}, validation={})


def test_more_free_numbers_than_a_few_examples_carry_are_refused():
    nine = {"weights": {"experts": [f"e{i}" for i in range(9)], "simplex": True}}
    assert make(nine, recipe=NAMED, free=8).free == 8
    with pytest.raises(ProjectError, match="9 numbers are searched at once, and at most 8"):
        make({**nine, "scale": LOG_SCALE}, recipe=NAMED, free=8)


def test_weights_of_each_persona_need_fifty_validation_examples():
    space = {"weights": {**PAIR, "per": "persona"}}
    assert make(space, recipe=NAMED, validation={"a": 50, "b": 90}).free == 2
    with pytest.raises(ProjectError, match=r"of whom 1 have fewer than 50 validation examples \(b: 49\)"):
        make(space, recipe=NAMED, validation={"a": 50, "b": 49})


def test_a_grid_needs_steps_and_an_end():
    with pytest.raises(ProjectError, match=r"raymerge.yaml: search.space.scale: a range without a step has no grid"):
        make({"scale": LOG_SCALE}, "grid")
    endless = {"min": 0, "max": 1, "step": 0.001}
    with pytest.raises(ProjectError, match="more than 100,000 points"):
        make({"self_weight": endless, "temperature": {**endless, "min": 0.001}}, "grid")


def test_numbers_may_be_written_as_yaml_reads_them():
    space = make(yaml.safe_load("temperature: {min: 1e-3, max: 1, log: true}"))
    assert space.parameters[0].bounds == (0.001, 1.0)
