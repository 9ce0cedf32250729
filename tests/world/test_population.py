"""Laws of the demo's world: who is asked what, what neighbours share, and what relatedness does."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.errors import PersonaError
from raymerge.world.figures import knowledge
from raymerge.world.language import LEANINGS
from raymerge.world.population import QUICK, SPLITS, WorldSettings, examples, populate


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple),
    relatedness=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_everybody_has_the_examples_asked_for_each_on_a_topic_of_its_own(
    sizes: tuple[int, ...], relatedness: float, seed: int
) -> None:
    settings = WorldSettings(
        cluster_sizes=sizes, topics=20, train=8, validation=3, test=5, relatedness=relatedness, seed=seed
    )
    population = populate(settings)
    assert len(population.names) == sum(sizes) == len(set(population.names))
    assert np.bincount(population.clusters, minlength=len(sizes)).tolist() == list(sizes)
    for number, wanted in enumerate((8, 3, 5)):
        assert ((population.splits == number).sum(axis=1) == wanted).all()
    assert (population.advice >= 0).all()
    assert (population.advice < len(LEANINGS)).all()
    rows = examples(population)
    assert len(rows) == sum(sizes) * 16
    prompts = {(row["persona"], row["prompt"]) for row in rows}
    assert len(prompts) == len(rows)
    assert [row["persona"] for row in rows] == sorted(row["persona"] for row in rows)


def test_personas_are_trained_on_different_topics() -> None:
    population = populate(WorldSettings())
    trained = population.splits == SPLITS.index("train")
    assert len(np.unique(trained, axis=0)) == 200
    assert trained.sum(axis=0).min() > 70


def test_a_seed_is_a_world_and_another_seed_another() -> None:
    assert examples(populate(QUICK)) == examples(populate(QUICK))
    assert examples(populate(QUICK)) != examples(populate(replace(QUICK, seed=1)))


def test_relatedness_changes_answers_alone() -> None:
    related, unrelated = populate(WorldSettings()), populate(WorldSettings(relatedness=0.0))
    np.testing.assert_array_equal(related.traits, unrelated.traits)
    np.testing.assert_array_equal(related.splits, unrelated.splits)
    assert (related.advice != unrelated.advice).mean() > 0.4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_by_default_neighbours_know_more_than_the_cluster_and_it_more_than_all(seed: int) -> None:
    figures = knowledge(populate(WorldSettings(seed=seed)))
    assert figures["majority"] > figures["chance"] + 0.1
    assert figures["cluster"] > figures["majority"] + 0.1
    assert figures["five_by_traits"] > figures["cluster"] + 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_unrelated_neighbours_know_no_more_than_the_majority(seed: int) -> None:
    figures = knowledge(populate(WorldSettings(relatedness=0.0, seed=seed)))
    assert figures["cluster"] < figures["majority"] + 0.02
    assert figures["five_by_traits"] < figures["majority"] + 0.02


def test_embeddings_that_are_the_traits_know_what_the_traits_know() -> None:
    population = populate(WorldSettings())
    figures = knowledge(population, population.traits.astype(np.float32))
    assert figures["five_by_embedding"] == pytest.approx(figures["five_by_traits"], abs=0.005)
    assert figures["trait_correlation"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relatedness": 1.5}, "relatedness is 1.5"),
        ({"relatedness": float("nan")}, "relatedness is nan"),
        ({"topics": 40}, "impossible"),
        ({"topics": 1000}, "impossible"),
        ({"cluster_sizes": (3, 0)}, "cluster sizes"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PersonaError, match=message):
        replace(WorldSettings(), **changes)  # type: ignore[arg-type]
