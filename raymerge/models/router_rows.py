"""Which experts are resident at once while a router learns, and which rows of which personas meet in a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raymerge.errors import ModelError
from raymerge.models.training.rows import epoch_order

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Shard:
    """Personas that learn while the same experts are resident: personas int64 (p,), experts int64 (n,), both sorted."""

    personas: Ints
    experts: Ints


@dataclass(frozen=True, eq=False)
class Step:
    """Rows of one optimiser step. shard: its number. taken: personas with the ranks of their rows by length."""

    shard: int
    taken: tuple[tuple[int, Ints], ...]


def cut_shards(experts: Ints, personas: Ints, room: int | None) -> list[Shard]:
    """Deal personas into shards whose candidates' union is at most `room` experts.

    experts: int64 (P, C), candidates of everyone, -1 where there are fewer. personas: who is dealt, int64 (p,), sorted.
    room: None is all. A shard grows by the persona that brings in the fewest experts, so that those who share their
    candidates meet. Raises ModelError if the candidates of one persona do not fit.
    """
    union = np.unique(experts[personas])
    union = union[union >= 0]
    if room is None or len(union) <= room:
        return [Shard(personas, union)]
    own = {int(p): np.unique(experts[p][experts[p] >= 0]) for p in personas}
    most = max(map(len, own.values()))
    if most > room:
        raise ModelError(
            f"the {most} candidates of one persona do not fit into memory together: there is room for {room} experts "
            "in router.experts_memory.\nLower router.candidates, or raise router.experts_memory."
        )
    asking: dict[int, list[int]] = {int(expert): [] for expert in union}  # places of those who have it as candidate
    for place, persona in enumerate(personas):
        for expert in own[int(persona)]:
            asking[int(expert)].append(place)
    counts = np.array([len(own[int(p)]) for p in personas])
    missing, waiting = counts.copy(), np.ones(len(personas), dtype=bool)
    shards, held, dealt = [], set[int](), list[int]()
    while waiting.any():
        place = int(np.argmin(np.where(waiting, missing, np.iinfo(np.int64).max)))
        if not held:
            place = int(np.argmax(waiting))
        elif len(held) + missing[place] > room:
            shards.append(Shard(np.sort(personas[dealt]), np.array(sorted(held))))
            held, dealt, missing = set(), [], counts.copy()
            continue
        waiting[place] = False
        dealt.append(place)
        for expert in own[int(personas[place])].tolist():
            if expert not in held:
                held.add(expert)
                missing[asking[expert]] -= 1
    return [*shards, Shard(np.sort(personas[dealt]), np.array(sorted(held)))]


def steps_of_epoch(
    shards: Sequence[Shard], rows: Sequence[int], together: int, height: int, seed: int, epoch: int
) -> list[Step]:
    """The steps of one epoch: every row of every persona once, shard after shard in a drawn order.

    rows: how many each persona has. together, height: personas of a step and rows of each, at most. In a round each
    persona of the shard that has rows left takes its next ones; who meets whom is drawn anew for each round. All of it
    depends on (seed, epoch) and the shards alone, and each epoch has equally many steps.
    """
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(shards))
    steps = []
    for shard in order.tolist():
        personas = [int(p) for p in shards[shard].personas if rows[p]]
        drawing = np.random.Generator(np.random.PCG64([seed, epoch, shard]))
        for number in range(max((math.ceil(rows[p] / height) for p in personas), default=0)):
            taking = [p for p in personas if rows[p] > number * height]
            for part in np.array_split(drawing.permutation(taking), math.ceil(len(taking) / together)):
                taken = ((p, epoch_order(rows[p], epoch, height, seed)[number]) for p in sorted(part.tolist()))
                steps.append(Step(shard, tuple(taken)))
    return steps
