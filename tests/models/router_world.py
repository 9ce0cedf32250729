"""Personas of two groups whose experts know the answers of their group alone, and what a router's training is told."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from raymerge.adapters.adapter import LoraAdapter
from raymerge.models.base import BaseModel
from raymerge.models.router_passes import Experts
from raymerge.models.router_training import Learner, RouterProgress, RouterSettings, TrainedRouter, train_router
from raymerge.models.training import TrainingGroup, TrainingSettings, train
from raymerge.routing.router import Candidates, RouterShape, choose, scores
from raymerge.routing.similarity import nearest, unit

SIZE = 12
SHAPE = RouterShape(size=SIZE, rank=4, temperature=0.5, candidates=16, k=4, weighting="softmax")
SETTINGS = RouterSettings(epochs=4, learning_rate=0.05, personas_per_step=3, rows_per_persona=2, seed=3)
ANSWERS = ("w1 w2 w3", "w11 w12 w13")
PER_GROUP = 4


def learner(number: int, rows: int = 5, validation: int = 2, answers: Sequence[str] = ANSWERS) -> Learner:
    """A persona that answers as its group does, whatever it is asked; its prompts are its own."""
    answer = answers[number % 2]
    texts = []
    for i in range(rows + validation):
        words = [f"w{20 + (number * 11 + i * 5 + j * 3) % 36}" for j in range(1 + (i + number) % 4)]
        texts.append((" ".join(words), answer))
    return Learner(f"p{number}", tuple(texts[:rows]), tuple(texts[rows:]))


@dataclass(frozen=True, eq=False)
class World:
    """Personas, each with an expert of its number; persona i is of group i % 2. loads: what experts were asked for."""

    base: BaseModel
    learners: tuple[Learner, ...]
    experts: tuple[LoraAdapter, ...]
    vectors: NDArray[np.float32]
    loads: list[tuple[int, ...]] = field(default_factory=list)

    def candidates(self, vectors: NDArray[np.float32] | None = None, most: int | None = None) -> Candidates:
        """All others, the most similar first."""
        queries = self.vectors if vectors is None else vectors
        count = len(self.experts)
        found = nearest(queries, self.vectors, most or count - 1, exclude=np.arange(count))
        experts = np.array([near.indices for near in found], dtype=np.int64)
        cosines = np.array([near.similarities for near in found], dtype=np.float32)
        return Candidates(experts, cosines, experts % 2 == np.arange(count)[:, None] % 2)

    def load(self, numbers: Sequence[int]) -> list[LoraAdapter]:
        self.loads.append(tuple(numbers))
        return [self.experts[number] for number in numbers]

    def train(
        self,
        settings: RouterSettings = SETTINGS,
        shape: RouterShape = SHAPE,
        watch: "Watch | None" = None,
        state: bytes | None = None,
        *,
        candidates: Candidates | None = None,
        experts_bytes: int | None = None,
    ) -> TrainedRouter:
        return train_router(
            self.base, self.learners, self.vectors, self.vectors, candidates or self.candidates(), self.by_number(),
            shape, settings, watch or Watch(), state, experts_bytes=experts_bytes,
        )  # fmt: skip

    def by_number(self) -> Experts:
        return Experts(self.load, lambda number: self.experts[number].headers)

    def weights(self, trained: TrainedRouter, shape: RouterShape = SHAPE) -> NDArray[np.float32]:
        """What each persona has of each expert: (personas, experts)."""
        known = self.candidates()
        experts, near, same = (torch.from_numpy(part) for part in (known.experts, known.near, known.same))
        vectors = torch.from_numpy(self.vectors)
        with torch.no_grad():
            found = scores(trained.network, vectors, vectors, experts, near, same)
            places, weights = choose(found, shape.k, shape.weighting)
        table = torch.zeros(len(vectors), len(self.experts))
        return np.asarray(table.scatter_(1, experts.gather(1, places), weights).numpy())


def make_world(base: BaseModel) -> World:
    """Experts trained on their persona's answers, and embeddings that say nothing of the group."""
    learners = tuple(learner(number) for number in range(2 * PER_GROUP))
    groups = [TrainingGroup(one.name, one.rows) for one in learners]
    settings = TrainingSettings(
        rank=2, epochs=30, learning_rate=2e-2, batch_size=5, target_modules=("down_proj", "lm_head")
    )
    experts = tuple(trained.adapter for trained in train(base, groups, settings))
    vectors = unit(np.random.default_rng(5).normal(size=(len(learners), SIZE)))
    return World(base, learners, experts, vectors)


def with_random_experts(world: World, experts: Sequence[LoraAdapter]) -> World:
    """The same personas with other experts."""
    return replace(world, experts=tuple(experts), loads=[])


@dataclass
class Watch:
    """Writes down what it is told, and wants a checkpoint after some steps. stop: whether the training then dies."""

    wanted: frozenset[int] = frozenset()
    stop: bool = False
    steps: list[RouterProgress] = field(default_factory=list)
    tokens: int = 0
    texts: list[str] = field(default_factory=list)
    states: list[bytes] = field(default_factory=list)

    def stepped(self, progress: RouterProgress, tokens: int) -> None:
        self.steps.append(progress)
        self.tokens += tokens

    def said(self, text: str) -> None:
        self.texts.append(text)

    def due(self) -> bool:
        return self.steps[-1].step in self.wanted

    def save(self, state: bytes) -> None:
        self.states.append(state)
        if self.stop:
            raise InterruptedTrainingError


class InterruptedTrainingError(Exception):
    """A training that was ended from outside."""
