"""What there is to gain in a world, by counting alone: no model is trained.

A guess about a persona's test topic is taken from the training examples of others. How often the guess is right says
what somebody who knew exactly those examples could reach.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raymerge.world.language import LEANINGS
from raymerge.world.population import SPLITS, Population

NEIGHBOURS = 5


def knowledge(population: Population, embeddings: NDArray[np.float32] | None = None) -> dict[str, float]:
    """Share of test answers that are known from others' training examples, 0 to 1.

    embeddings: (P, d), one row for each persona, centred here; None leaves the figures out that need them.
    majority: the advice most given by all; cluster: by the persona's cluster; five_by_traits and five_by_embedding: by
    the five most similar that were trained on the topic; chance: one in so many options. trait_correlation: Pearson's,
    over pairs of personas, of similarity by embedding with similarity by traits.
    """
    known = population.splits == SPLITS.index("train")
    people = len(population.names)
    same = population.clusters[:, None] == population.clusters[None, :]
    by_traits = centred_cosines(population.traits)
    figures = {
        "chance": 1 / len(LEANINGS),
        "majority": _share_right(population, known, np.ones((people, people))),
        "cluster": _share_right(population, known, same.astype(float)),
        "five_by_traits": _share_right(population, known, by_traits, NEIGHBOURS),
    }
    if embeddings is not None:
        by_embedding = centred_cosines(embeddings.astype(np.float64))
        pairs = np.triu_indices(people, 1)
        figures["five_by_embedding"] = _share_right(population, known, by_embedding, NEIGHBOURS)
        figures["trait_correlation"] = float(np.corrcoef(by_traits[pairs], by_embedding[pairs])[0, 1])
    return figures


def centred_cosines(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines (P, P) of rows (P, d) after their mean is removed."""
    centred = rows - rows.mean(axis=0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    return np.asarray(unit @ unit.T)


def _share_right(
    population: Population, known: NDArray[np.bool_], trust: NDArray[np.float64], most: int | None = None
) -> float:
    """How often the vote of those who know a test topic is right.

    known: (P, topics), who was trained on what. trust: (P, P), who is asked: above 0 and, where `most` is given, among
    the `most` highest of those who know. Ties go to the first option; without a voter the guess is wrong.
    """
    right = total = 0
    for person, topic in np.argwhere(population.splits == SPLITS.index("test")):
        voters = np.flatnonzero(known[:, topic])
        if most is not None:
            voters = voters[np.argsort(-trust[person, voters], kind="stable")[:most]]
        else:
            voters = voters[trust[person, voters] > 0]
        votes = np.bincount(population.advice[voters, topic], minlength=len(LEANINGS))
        right += int(votes.any() and votes.argmax() == population.advice[person, topic])
        total += 1
    return right / total
