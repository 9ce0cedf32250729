"""Similarity routing: the one function that most strategies are presets of.

Each persona's contributors are the most similar experts of a scope (all, or its cluster), weighted by a softmax of
similarity / temperature. A persona without an adapter is routed like any other; only its own share is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raymerge.routing.inputs import RoutingInputs, Space, labels_of
from raymerge.routing.lines import Row, Rows
from raymerge.routing.similarity import nearest, softmax

SelfWeight = float | Literal["similarity"]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """Part of a persona's row: experts int64 (n,), similarities float64 (n,), weights float64 (n,)."""

    experts: Indices
    similarities: NDArray[np.float64]
    weights: NDArray[np.float64]


def similar(
    space: Space,
    *,
    scope: Literal["all", "cluster"],
    k: int,
    temperature: float,
    self_weight: SelfWeight,
    mass: float = 1.0,
) -> tuple[Rows, list[str]]:
    """Rows of the k most similar experts of a scope, and notes.

    self_weight: a number is the persona's own share, beside k others; `similarity` lets its own adapter be one of the
    k. mass: no more experts than make up this share of the softmax over the whole scope. An own share is left to the
    others where there is no own adapter; a persona without others gets its own adapter, or the base.
    """
    shares: dict[int, Share] = {}
    short: dict[str, int] = {}
    for label, queries, keys in scopes(space, scope):
        found = _nearest_shares(space, queries, keys, k, temperature, self_weight, mass)
        shares |= found
        fewest = min((len(share.experts) for share in found.values()), default=k)
        if fewest < k and mass == 1.0:
            short[label] = fewest
    notes = note_short(short, k)
    rows, alone = complete(space, shares, self_weight)
    return rows, notes + alone


def scopes(space: Space, scope: str) -> list[tuple[str, Indices, Indices]]:
    """Parts that are routed by themselves: label, numbers of personas, numbers of their possible experts."""
    if scope == "all":
        return [("all", np.arange(len(space.personas)), np.arange(len(space.experts)))]
    labels = np.array(space.persona_labels, dtype=object)
    nobody = np.zeros(0, dtype=np.int64)
    return [
        (label, np.flatnonzero(labels == label), space.by_label.get(label, nobody)) for label in sorted(set(labels))
    ]


def _nearest_shares(
    space: Space, queries: Indices, keys: Indices, k: int, temperature: float, self_weight: SelfWeight, mass: float
) -> dict[int, Share]:
    place = np.full(len(space.experts) + 1, -1, dtype=np.int64)  # the last entry is for personas without an adapter
    place[keys] = np.arange(len(keys))
    hidden = np.full(len(queries), -1) if self_weight == "similarity" else place[space.own[queries]]
    near = nearest(
        space.queries[queries], space.keys[keys], k, exclude=hidden, temperature=temperature, mass=mass
    )  # fmt: skip
    return {
        int(persona): Share(keys[n.indices], n.similarities, softmax(n.similarities, temperature))
        for persona, n in zip(queries, near, strict=True)
    }


def note_short(short: Mapping[str, int], k: int) -> list[str]:
    """A note where fewer than k experts can be asked. short: their number by the label of each such scope."""
    if not short:
        return []
    where = ", ".join(f"{label}: {count}" for label, count in short.items())
    return [f"k = {k} is more than there are to choose from ({where}); all of them contribute"]


def complete(space: Space, shares: Mapping[int, Share], self_weight: SelfWeight) -> tuple[Rows, list[str]]:
    """Rows from the others' shares, the persona's own added; and a note on personas without others."""
    rows, alone = [], []
    nothing = Share(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    for i, name in enumerate(space.personas):
        share = shares.get(i, nothing)
        own = int(space.own[i])
        part = 0.0 if self_weight == "similarity" or own < 0 else float(self_weight)
        if not len(share.experts):
            alone.append(name)
            part = 1.0 if own >= 0 else 0.0
        experts, weights, near = share.experts, share.weights * (1.0 - part), share.similarities
        if part > 0.0:
            experts, weights = np.append(experts, own), np.append(weights, part)
            near = np.append(near, np.dot(space.queries[i].astype(np.float64), space.keys[own]))
        kept = weights > 0.0
        rows.append(make_row(experts[kept], weights[kept], near[kept]))
    notes = [f"{alone[0]}: has nobody to ask and keeps its own adapter ({len(alone)} such personas)"] if alone else []
    return Rows(space.experts, tuple(rows), np.arange(len(rows), dtype=np.int32)), notes


def make_row(
    experts: NDArray[np.int64],
    weights: NDArray[np.float64],
    near: NDArray[np.float64] | None = None,
    adapter: str | None = None,
) -> Row:
    """A row of contributors in any order."""
    order = np.argsort(experts, kind="stable")
    known = None if near is None else near[order].astype(np.float32)
    return Row(experts[order].astype(np.int32), weights[order].astype(np.float64), known, adapter)


def hierarchical(
    space: Space, *, top_clusters: int, k: int, temperature: float, self_weight: SelfWeight
) -> tuple[Rows, list[str]]:
    """Rows of the k most similar experts in each of the most similar clusters, and notes.

    The weight is the product of two softmaxes: of similarity to the chosen clusters' centroids, and within a cluster. A
    cluster that holds nobody but the persona itself is not chosen, unless its own adapter competes.
    """
    labels = list(space.by_label)
    if not labels:
        return complete(space, {}, self_weight)
    nearness = np.einsum("pd,cd->pc", space.queries, space.centroids(labels), dtype=np.float64)
    offered = np.tile(np.array([len(space.by_label[label]) for label in labels]), (len(space.personas), 1))
    if self_weight != "similarity":
        for column, label in enumerate(labels):
            offered[np.isin(space.own, space.by_label[label]), column] -= 1
    nearness[offered == 0] = -np.inf
    order = np.argsort(-nearness, axis=1, kind="stable")[:, :top_clusters]
    chosen = np.zeros_like(nearness, dtype=np.bool_)
    np.put_along_axis(chosen, order, True, axis=1)
    chosen &= np.isfinite(nearness)
    parts: dict[int, list[Share]] = {}
    short: dict[str, int] = {}
    for column, label in enumerate(labels):
        queries = np.flatnonzero(chosen[:, column])
        found = _nearest_shares(space, queries, space.by_label[label], k, temperature, self_weight, 1.0)
        for persona, share in found.items():
            weight = softmax(nearness[persona, chosen[persona]], temperature)[chosen[persona, :column].sum()]
            parts.setdefault(persona, []).append(Share(share.experts, share.similarities, share.weights * weight))
        fewest = min((len(share.experts) for share in found.values()), default=k)
        if fewest < k:
            short[label] = fewest
    rows, alone = complete(space, {persona: _join(several) for persona, several in parts.items()}, self_weight)
    notes = note_short(short, k)
    if top_clusters > len(labels):
        notes.append(f"top_clusters = {top_clusters} is more than the {len(labels)} clusters; all of them are asked")
    return rows, notes + alone


def _join(shares: Sequence[Share]) -> Share:
    return Share(
        np.concatenate([s.experts for s in shares]),
        np.concatenate([s.similarities for s in shares]),
        np.concatenate([s.weights for s in shares]),
    )


def equal(inputs: RoutingInputs, *, scope: Literal["all", "cluster"]) -> tuple[Rows, list[str]]:
    """One row for everybody of a scope: all its experts, equally. The limit of a high temperature, without a limit on
    the experts, since the row is kept once.
    """
    experts = tuple(inputs.experts)
    if scope == "all":
        weights = np.full(len(experts), 1.0 / max(len(experts), 1))
        row = make_row(np.arange(len(experts)), weights, adapter="all")
        return Rows(experts, (row,), np.zeros(len(inputs.personas), dtype=np.int32)), []
    own = labels_of(inputs, inputs.personas)
    labels = sorted(set(own))
    clusters = inputs.clusters.labels if inputs.clusters else {}
    rows, empty = [], []
    for label in labels:
        members = np.array([i for i, name in enumerate(experts) if clusters.get(name) == label], dtype=np.int64)
        if not len(members):
            empty.append(label)
        rows.append(make_row(members, np.full(len(members), 1.0 / max(len(members), 1)), adapter=label))
    notes = [f"{', '.join(empty)}: no member has an adapter; its personas get the base"] if empty else []
    return Rows(experts, tuple(rows), np.array([labels.index(label) for label in own], dtype=np.int32)), notes
