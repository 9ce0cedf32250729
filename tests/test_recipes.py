import json

import pytest
import torch

from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.errors import RecipeError
from raymerge.merging.merge import merge
from raymerge.recipes import DTYPES, Recipe, parse_recipe, parse_recipes
from raymerge.routing.strategies import STRATEGIES


@pytest.mark.parametrize(
    "strategy", sorted(set(STRATEGIES) - {"random_k", "random_cluster", "shuffled", "neighbours_trained", "selective"})
)
def test_every_strategy_has_a_complete_canonical_form(strategy):
    written = {"weights": {"ann": 2, "bob": -1}} if strategy == "named" else {}
    recipe = parse_recipe("x", {"strategy": strategy, **written})
    assert json.loads(json.dumps(recipe.as_dict())) == recipe.as_dict()
    assert set(recipe.strategy_parameters) == set(STRATEGIES[strategy].parameters)


def test_merged_recipes_match_norms_and_keep_energy_and_references_stay_as_they_are():
    assert parse_recipe("x", {"strategy": "soft"}).merges["scale"] == "match_norm"
    assert parse_recipe("x", {"strategy": "soft"}).merges["rank"] == {"energy": 0.95, "max": 64}
    assert parse_recipe("x", {"strategy": "own"}).merges["scale"] == 1.0
    assert parse_recipe("x", {"strategy": "own"}).merges["rank"] == "keep"


def test_a_control_takes_what_it_controls_by_name():
    written = {
        "moe": {"strategy": "sparse_moe", "k": 3, "scale": 2, "rank": "exact"},
        "random": {"strategy": "random_k", "of": "moe"},
    }
    random = parse_recipes(written)["random"]
    assert random.strategy_parameters["of"]["strategy"] == "sparse_moe"
    assert random.strategy_parameters["of"]["k"] == 3
    assert (random.scale, random.rank) == (2.0, "exact")
    assert random.needs == {"own", "embeddings", "clusters"}


def test_the_project_says_whether_embeddings_are_centred_unless_the_recipe_does():
    assert parse_recipe("x", {"strategy": "soft"}, centred=False).strategy_parameters["centred"] is False
    asked = {"strategy": "soft", "centred": True}
    assert parse_recipe("x", asked, centred=False).strategy_parameters["centred"] is True
    inner = parse_recipe("x", {"strategy": "shuffled", "of": {"strategy": "soft"}}, centred=False)
    assert inner.strategy_parameters["of"]["centred"] is False


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"strategy": "sparse_mo"}, r"x: unknown strategy 'sparse_mo'. Did you mean sparse_moe\?\nAllowed: base"),
        ({"strategy": "top_k", "methd": "linear"}, r"unknown parameter 'methd'. Did you mean method\?"),
        ({"strategy": "top_k", "method": "tiess"}, r"unknown method 'tiess'. Did you mean ties"),
        ({"strategy": "top_k", "k": 0}, "k is 0"),
        ({"strategy": "top_k", "rank": 0}, "rank 0 is no rank"),
        ({"strategy": "top_k", "dtype": "flaot"}, r"unknown dtype 'flaot'. Did you mean float"),
        ({"strategy": "top_k", "scale": "big"}, "scale is a number, match_norm"),
        ({"strategy": "top_k", "scale": float("nan")}, "scale is a number, match_norm"),
        ({"strategy": "random_k"}, "`of`|of is None"),
        ({"strategy": "random_k", "of": {"strategy": "top_k", "kk": 1}}, "unknown parameter 'kk'"),
        ({"strategy": "random_k", "of": {"strategy": "shuffled", "of": {"strategy": "soft"}}}, "itself a control"),
        ({"strategy": "named"}, "weights is None.\nExpected the experts' weights, such as"),
        ({"strategy": "named", "weights": {"a": 1, "b": -1}}, "weights sum to 0.\nExpected a sum above 0"),
        (
            {"strategy": "named", "weights": {"a": 1, "b": -0.5}, "method": "slerp"},
            "of b is negative, which method slerp",
        ),
        ({"strategy": "base", "scale_offsets": {"layers": [0.1]}}, "base has nothing to scale"),
        ({"strategy": "soft", "scale_offsets": {"layer": [0.1]}}, r"'layer'. Did you mean layers\?"),
        ({"strategy": "soft", "scale_offsets": {"layers": []}}, r"scale_offsets.layers: is \[\].\nExpected {clusters"),
        ({"strategy": "soft", "scale_offsets": {"clusters": [0.1]}}, "scale_offsets.clusters: is"),
        ({"strategy": "soft", "scale_offsets": {"layers": [0.1, 99]}}, "99 cannot be an offset.\nExpected a logarithm"),
        ({"strategy": "soft", "scale_offsets": {"clusters": {"a": float("nan")}}}, "nan cannot be an offset"),
        ({"strategy": "soft", "scale_offsets": 0.3}, "x: scale_offsets are 0.3"),
        ({}, "unknown strategy ''"),
        ("own", "is not a mapping"),
    ],
)
def test_what_is_wrong_is_named(written, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe("x", written)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_a_recipe_is_one_of_a_merge(dtype):
    module = LoraModule(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    merged = merge(
        [LoraAdapter("a", {"x": module})], [1.0], dtype=parse_recipe("x", {"strategy": "soft", "dtype": dtype}).dtype
    )
    assert merged.dtype == getattr(torch, dtype)


def test_a_control_of_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"recipe random: unknown recipe in `of` 'mo'. Did you mean moe\?"):
        parse_recipes({"moe": {"strategy": "soft"}, "random": {"strategy": "random_k", "of": "mo"}})


def test_what_is_tuned_is_known_and_can_be_filled_in():
    recipe = parse_recipe("x", {"strategy": "hybrid", "scale": "tuned"})
    assert recipe.tuned == ("factor", "own_weight")
    chosen = recipe.resolved({"factor": 1.4, "own_weight": 0.25})
    assert chosen.tuned == ()
    assert chosen.merges["scale"] == {"match_norm": 1.4}
    assert chosen.strategy_parameters["own_weight"] == 0.25
    assert parse_recipe("x", {"strategy": "top_k", "scale": {"match_norm": 1}}).scale == "match_norm"
    assert parse_recipe("x", {"strategy": "hybrid", "own_weight": 0.5}).tuned == ()


def test_selective_chooses_among_the_references_there_are():
    written = {
        "base": {"strategy": "base"},
        "everybody": {"strategy": "unified"},
        "mine": {"strategy": "own"},
        "rag": {"strategy": "base", "retrieval": 3},
        "moe": {"strategy": "sparse_moe"},
        "best": {"strategy": "selective"},
        "two": {"strategy": "selective", "among": ["mine", "base"], "sure": 0.9},
    }
    recipes = parse_recipes(written)
    assert recipes["best"].strategy_parameters["among"] == {"base": "base", "everybody": "unified", "mine": "own"}
    assert recipes["best"].needs == {"own", "unified"}
    assert recipes["two"].strategy_parameters == {"among": {"mine": "own", "base": "base"}, "sure": 0.9}
    assert recipes["two"].anchor == "none"
    with pytest.raises(RecipeError, match="unknown recipe of a strategy base, own"):
        parse_recipes({**written, "bad": {"strategy": "selective", "among": ["moe", "base"]}})
    twice = {
        **written,
        "again": {"strategy": "own", "scale": 2},
        "bad": {"strategy": "selective", "among": ["mine", "again"]},
    }
    with pytest.raises(RecipeError, match="has mine and again, both own"):
        parse_recipes(twice)
    with pytest.raises(RecipeError, match="takes adapters as they are"):
        parse_recipes({**written, "bad": {"strategy": "selective", "scale": 2}})
    with pytest.raises(RecipeError, match="nothing to choose among"):
        parse_recipes({"base": {"strategy": "base"}, "best": {"strategy": "selective"}})


def test_training_on_neighbours_takes_whom_they_are_and_not_how_they_are_merged():
    written = {
        "moe": {
            "strategy": "sparse_moe",
            "k": 3,
            "scale": 2,
            "rank": "exact",
            "method": "ties",
            "embedding": "e.parquet",
        },
        "trained": {"strategy": "neighbours_trained", "of": "moe"},
    }
    trained = parse_recipes(written)["trained"]
    assert trained.strategy_parameters["of"]["k"] == 3
    assert (trained.scale, trained.rank, trained.method, trained.embedding) == (1.0, "keep", "linear", "e.parquet")


def test_retrieval_has_a_form():
    assert parse_recipe("x", {"strategy": "base", "retrieval": 2}).retrieval == {
        "examples": 2,
        "format": "{prompt}\n{response}\n\n",
    }
    for bad, message in [
        (0, "1 or more"),
        ({"examples": 1, "format": "x"}, "lacks"),
        ({"k": 1}, "unknown key of retrieval"),
    ]:
        with pytest.raises(RecipeError, match=message):
            parse_recipe("x", {"strategy": "base", "retrieval": bad})


@pytest.mark.parametrize("strategy", ["base", "selective", "prefix"])
def test_what_has_no_delta_has_no_scale_to_tune(strategy):
    with pytest.raises(RecipeError, match="nothing to scale"):
        parse_recipe(
            "x",
            {
                "strategy": strategy,
                "scale": "tuned",
                **({"among": {"a": "base", "b": "own"}} if strategy == "selective" else {}),
            },
        )


def test_offsets_are_part_of_a_recipe_only_where_there_are_any():
    plain = parse_recipe("x", {"strategy": "top_k", "k": 3})
    assert "scale_offsets" not in plain.as_dict()
    offsets = {"clusters": {"cluster_00": 1}, "layers": [0, 0.2]}
    recipe = parse_recipe("x", {"strategy": "top_k", "k": 3, "scale_offsets": offsets})
    assert recipe.as_dict() == {
        **plain.as_dict(),
        "scale_offsets": {"clusters": {"cluster_00": 1.0}, "layers": [0.0, 0.2]},
    }
    assert Recipe(**recipe.as_dict()) == recipe
    assert recipe.needs == plain.needs | {"clusters"}
    assert parse_recipe("x", {"strategy": "top_k", "scale_offsets": {"layers": [0.1]}}).needs == plain.needs
