"""Controls: what a strategy gains over chance. Each takes another strategy's rows and spoils one thing in them.

Draws are keyed by the seed and the name they are for: who else is there changes the pool, but not the dice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from raymerge.errors import RoutingError
from raymerge.routing.inputs import RoutingInputs, labels_of, need_clusters
from raymerge.routing.lines import Row, Rows
from raymerge.routing.neighbours import make_row

Indices = NDArray[np.int64]
T = TypeVar("T")


def generator(seed: Sequence[int], *key: str) -> np.random.Generator:
    """Random numbers for one name: the same on every machine."""
    digest = hashlib.sha256("\0".join(key).encode()).digest()
    return np.random.default_rng([*seed, int.from_bytes(digest[:8], "little")])


def random_k(of: Rows, inputs: RoutingInputs, seed: Sequence[int]) -> tuple[Rows, list[str]]:
    """The same weights with experts drawn from all; one draw for a row that was made for a whole group.

    A persona's own share stays its own, so that its neighbours alone are at chance.
    """
    position = {name: i for i, name in enumerate(inputs.experts)}
    before = {name: i for i, name in enumerate(of.experts)}
    pool = np.arange(len(inputs.experts))
    rows: list[Row] = []
    row_of: list[int] = []
    for_group: dict[int, int] = {}
    for name, number in zip(inputs.personas, of.row_of.tolist(), strict=True):
        row = of.rows[number]
        if number in for_group:
            row_of.append(for_group[number])
            continue
        row_of.append(len(rows))
        if row.adapter:
            for_group[number] = len(rows)
            rows.append(_redraw(row, -1, -1, pool, generator(seed, "random_k", row.adapter)))
        else:
            own = position.get(name, -1)
            dice = generator(seed, "random_k", name)
            rows.append(_redraw(row, before.get(name, -1) if own >= 0 else -1, own, pool, dice))
    fewer = sum(len(rows[i].experts) < len(of.rows[j].experts) for i, j in zip(row_of, of.row_of, strict=True))
    notes = [f"{fewer} personas: there are not enough experts to draw from; all contribute"] if fewer else []
    return Rows(tuple(inputs.experts), tuple(rows), np.array(row_of, dtype=np.int32)), notes


def _redraw(row: Row, own_before: int, own: int, pool: Indices, dice: np.random.Generator) -> Row:
    """A row's weights on other experts of the pool (ascending numbers), heaviest weights first where the pool is small.

    own_before, own: the persona's number in the row and in the pool; -1 for none. Its share stays, unless there is
    nothing else in the row.
    """
    kept = (row.experts == own_before) if len(row.experts) > 1 else np.zeros(len(row.experts), dtype=np.bool_)
    weights = -np.sort(-row.weights[~kept])
    place = int(np.searchsorted(pool, own))
    hide = own >= 0 and place < len(pool) and pool[place] == own
    count = min(len(weights), len(pool) - int(hide))
    drawn = dice.choice(len(pool) - int(hide), count, replace=False) if count else np.zeros(0, dtype=np.int64)
    if hide:
        drawn = drawn + (drawn >= place)
    rescaled = weights[:count] * (weights.sum() / weights[:count].sum()) if count else weights[:0]
    own_share = [(own, float(row.weights[kept].sum()))] if kept.any() else []
    experts = np.array([*pool[drawn], *(expert for expert, _ in own_share)], dtype=np.int64)
    return make_row(experts, np.array([*rescaled, *(w for _, w in own_share)], dtype=np.float64), adapter=row.adapter)


def random_cluster(of: Rows, inputs: RoutingInputs, seed: Sequence[int]) -> tuple[Rows, list[str]]:
    """The same weights with experts of another cluster.

    Rows made for a cluster change places as a whole; any other row draws its experts from one other cluster, and keeps
    the persona's own share. Raises RoutingError if fewer than two clusters have experts.
    """
    swapped = _swap_clusters(of, inputs, seed)
    if swapped is not None:
        return swapped, []
    clusters = need_clusters(inputs)
    pools: dict[str, Indices] = {}
    position = {name: i for i, name in enumerate(inputs.experts)}
    for label in clusters.names:
        members = [position[name] for name in clusters.members(label) if name in position]
        if members:
            pools[label] = np.array(sorted(members), dtype=np.int64)
    rows: list[Row] = []
    fewer = 0
    before = {name: i for i, name in enumerate(of.experts)}
    for name, number, label in zip(inputs.personas, of.row_of, labels_of(inputs, inputs.personas), strict=True):
        dice = generator(seed, "random_cluster", name)
        others = [other for other in pools if other != label]
        if not others:
            raise _too_few_clusters()
        row = replace(of.rows[number], adapter=None)
        pool = pools[others[int(dice.integers(len(others)))]]
        own = position.get(name, -1)
        keeps = own >= 0 and of.rows[number].adapter is None
        rows.append(_redraw(row, before.get(name, -1) if keeps else -1, own, pool, dice))
        fewer += len(rows[-1].experts) < len(row.experts)
    notes = [f"{fewer} personas: the other cluster has too few experts; all of it contributes"] if fewer else []
    return Rows(tuple(inputs.experts), tuple(rows), np.arange(len(rows), dtype=np.int32)), notes


def _swap_clusters(of: Rows, inputs: RoutingInputs, seed: Sequence[int]) -> Rows | None:
    """Rows of whole clusters, each given to another cluster; None if the rows are not of clusters."""
    labels = labels_of(inputs, inputs.personas)
    made = {row.adapter: i for i, row in enumerate(of.rows) if row.adapter}
    if set(labels) != set(made):
        return None
    filled = sorted(label for label in made if label and len(of.rows[made[label]].experts))
    if len(filled) < 2:
        raise _too_few_clusters()
    other = dict(zip(filled, derange(filled, generator(seed, "clusters")), strict=True))
    return replace(of, row_of=np.array([made[other.get(label, filled[0])] for label in labels], dtype=np.int32))


def _too_few_clusters() -> RoutingError:
    return RoutingError("strategy random_cluster: there is no other cluster.\nExpected two or more that have adapters.")


def shuffled(of: Rows, inputs: RoutingInputs, seed: Sequence[int]) -> tuple[Rows, list[str]]:
    """Every persona gets another persona's row. Raises RoutingError if there is only one persona."""
    count = len(inputs.personas)
    if count < 2:
        raise RoutingError("strategy shuffled: there is one persona, and nobody to change rows with.\nExpected two.")
    partner = derange(range(count), generator(seed, "shuffled"))
    rows = tuple(replace(row, similarities=None) for row in of.rows)  # they were the other persona's
    same = len({row.experts.tobytes() + row.weights.tobytes() for row in of.rows}) == 1
    notes = ["all personas have the same row: shuffling changes nothing"] if same else []
    return Rows(of.experts, rows, of.row_of[partner]), notes


def derange(values: Sequence[T], dice: np.random.Generator) -> list[T]:
    """The values in an order in which none keeps its place: a random single cycle (Sattolo 1986)."""
    mixed = list(values)
    for i in range(len(mixed) - 1, 0, -1):
        j = int(dice.integers(i))
        mixed[i], mixed[j] = mixed[j], mixed[i]
    return mixed
