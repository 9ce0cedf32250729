"""Who lives in the demo's world: traits, what each persona would answer, and which of it the persona ever said.

Traits are a vector over the leanings of language.py. It is the sum of a part that a persona's whole cluster has, a
part that it shares with its circle of a few near neighbours, and a part of its own. On each topic a persona gives the
advice that fits its traits best; each piece of advice pulls along its leaning and in a random direction that the seed
draws, so that no rule is the same in two topics. With probability 1 - relatedness its answer has nothing to do with
its traits: it says what a random other persona would. Its opening follows the traits in the same way.

Every persona is trained on its own random topics and tested on others, so what one does not know its neighbours may.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raymerge.errors import PersonaError
from raymerge.world.language import LEANINGS, OPENINGS, QUESTIONS, answer, question, topics

SPLITS = ("train", "validation", "test")

# Standard deviations of the three parts of a trait, and how much of an advice's pull is its leaning. Chosen by counting
# (figures.py): the majority of all, of the cluster, and of five neighbours must know clearly different amounts.
CLUSTER_PART, CIRCLE_PART, OWN_PART = 1.2, 0.7, 0.35
CIRCLE_SIZE = 8
LEANING_PULL = 0.5


@dataclass(frozen=True)
class WorldSettings:
    """What a world is made from; equal settings make equal bytes.

    cluster_sizes: personas in each cluster. topics: how many of the topics are asked about. train, validation, test:
    examples of a persona, each on another topic. relatedness: probability that an answer follows the traits, 0 to 1.
    """

    cluster_sizes: tuple[int, ...] = (16, 52, 25, 35, 72)
    topics: int = 60
    train: int = 30
    validation: int = 6
    test: int = 10
    relatedness: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.relatedness <= 1:
            raise PersonaError(f"relatedness is {self.relatedness}.\nExpected a number from 0 to 1.")
        if self.train + self.validation + self.test > self.topics or self.topics > len(topics()):
            raise PersonaError(
                f"{self.train} + {self.validation} + {self.test} examples on {self.topics} topics are impossible.\n"
                f"Each example needs a topic of its own, and there are {len(topics())}."
            )
        if not self.cluster_sizes or min(self.cluster_sizes) < 1 or self.seed < 0:
            raise PersonaError(f"cluster sizes {self.cluster_sizes}, seed {self.seed}: sizes are at least 1, seeds 0.")


QUICK = WorldSettings(cluster_sizes=(5, 11, 8), topics=24, train=12, validation=3, test=6)


@dataclass(frozen=True)
class Population:
    """Everything true of a world; only examples() is ever shown to a strategy.

    names: P personas, sorted. clusters: int64 (P,). traits: float64 (P, leanings).
    advice: int64 (P, topics), the option each would give. splits: int64 (P, topics), index into SPLITS or -1 where the
    persona is never asked. openings: int64 (P, topics). forms: int64 (P, topics), form of the question.
    """

    names: tuple[str, ...]
    clusters: NDArray[np.int64]
    traits: NDArray[np.float64]
    advice: NDArray[np.int64]
    openings: NDArray[np.int64]
    splits: NDArray[np.int64]
    forms: NDArray[np.int64]


def populate(settings: WorldSettings) -> Population:
    """Draw a world. Each aspect has a generator of its own, so changing relatedness changes no trait and no split."""
    rng = [np.random.default_rng([settings.seed, aspect]) for aspect in range(6)]
    clusters, traits = _draw_traits(settings, rng[0])
    shape = (len(clusters), settings.topics)
    pulls = _pulls(settings, rng[1])
    fitting = np.argmax(np.einsum("pl,tol->pto", traits, pulls), axis=2)
    manner = np.argmax(traits @ rng[2].normal(size=(len(OPENINGS), len(LEANINGS))).T, axis=1)
    return Population(
        names=tuple(f"persona_{number:03d}" for number in range(len(clusters))),
        clusters=clusters,
        traits=traits,
        advice=_some_of_their_own(fitting, settings.relatedness, rng[3]),
        openings=_some_of_their_own(np.broadcast_to(manner[:, None], shape), settings.relatedness, rng[4]),
        splits=_draw_splits(settings, rng[5]),
        forms=rng[5].integers(len(QUESTIONS), size=shape),
    )


def examples(population: Population) -> list[dict[str, str]]:
    """Rows persona, prompt, response, split: by persona, then training, validation, test, then topic."""
    rows = []
    for person, name in enumerate(population.names):
        for number, split in enumerate(SPLITS):
            for topic in np.flatnonzero(population.splits[person] == number):
                advice, opening = population.advice[person, topic], population.openings[person, topic]
                rows.append({
                    "persona": name,
                    "prompt": question(int(topic), int(population.forms[person, topic])),
                    "response": answer(int(topic), int(advice), int(opening)),
                    "split": split,
                })  # fmt: skip
    return rows


def _draw_traits(settings: WorldSettings, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Cluster (P,) and traits (P, leanings) of each persona, in an order that tells nothing."""
    wide = len(LEANINGS)
    clusters, traits = [], []
    for cluster, size in enumerate(settings.cluster_sizes):
        centre = CLUSTER_PART * rng.normal(size=wide)
        circles = CIRCLE_PART * rng.normal(size=(-(-size // CIRCLE_SIZE), wide))
        own = OWN_PART * rng.normal(size=(size, wide))
        traits.append(centre + circles[np.arange(size) % len(circles)] + own)
        clusters += [cluster] * size
    order = rng.permutation(len(clusters))
    return np.array(clusters)[order], np.concatenate(traits)[order]


def _pulls(settings: WorldSettings, rng: np.random.Generator) -> NDArray[np.float64]:
    """Directions (topics, options, leanings) of unit length in which each piece of advice pulls."""
    random = rng.normal(size=(settings.topics, len(LEANINGS), len(LEANINGS)))
    random /= np.linalg.norm(random, axis=2, keepdims=True)
    pulls = LEANING_PULL * np.eye(len(LEANINGS)) + (1 - LEANING_PULL) * random
    return np.asarray(pulls / np.linalg.norm(pulls, axis=2, keepdims=True))


def _some_of_their_own(shared: NDArray[np.int64], relatedness: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Choices (P, topics) of which a share 1 - relatedness is replaced by what a random other persona has there."""
    strangers = rng.integers(len(shared), size=shared.shape)
    follows = rng.random(shared.shape) < relatedness
    return np.where(follows, shared, np.take_along_axis(shared, strangers, axis=0))


def _draw_splits(settings: WorldSettings, rng: np.random.Generator) -> NDArray[np.int64]:
    """Which topics (P, topics) each persona is trained, validated and tested on: other ones for each persona."""
    counts = (settings.train, settings.validation, settings.test)
    pattern = np.concatenate([
        np.repeat(np.arange(len(SPLITS)), counts), np.full(settings.topics - sum(counts), -1)
    ])  # fmt: skip
    return rng.permuted(np.tile(pattern, (sum(settings.cluster_sizes), 1)), axis=1)
