"""What routing starts from: who there is, and where everybody lies among the embeddings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raymerge.errors import RoutingError
from raymerge.routing.clusters import Clusters, find_centroids
from raymerge.routing.embeddings import Embeddings
from raymerge.routing.selective import Candidate
from raymerge.routing.similarity import mean_direction, project, unit
from raymerge.routing.table import unique_names

if TYPE_CHECKING:
    from raymerge.routing.router import Router  # imports torch


@dataclass(frozen=True)
class RoutingInputs:
    """Inputs of a strategy; those that it does not need may be left out.

    personas: who is to be routed. experts: whose own adapter is there or will be; a persona among `personas` but not
    here is routed all the same. embeddings: of all personas, and of experts; an expert without one contributes to
    nobody where it matters. clusters: labels of personas and experts.
    mean: float32 (d,), what centring takes away, from an earlier run; of `embeddings` by default.
    centroids: label -> float32 (d,), from an earlier run with centring; of the clusters' members by default.
    seed: for the controls. candidates: what `selective` chooses among, by name. trainable: personas with training
    examples, None where it does not matter who has any. router: what `learned_router` asks; its mean is what centring
    takes away there.
    """

    personas: Sequence[str]
    experts: Sequence[str]
    embeddings: Embeddings | None = None
    clusters: Clusters | None = None
    seed: int = 0
    mean: NDArray[np.float32] | None = None
    centroids: Mapping[str, NDArray[np.float32]] | None = None
    candidates: Mapping[str, Candidate] = field(default_factory=dict)
    trainable: Collection[str] | None = None
    router: Router | None = None


@dataclass(frozen=True, eq=False)
class Space:
    """Personas and experts as rows whose inner products are their similarities.

    personas, experts: names, sorted; experts without an embedding are left out. queries: float32 (personas, d);
    keys: float32 (experts, d). own: int64 (personas,), each persona's number among the experts, or -1.
    """

    personas: tuple[str, ...]
    experts: tuple[str, ...]
    queries: NDArray[np.float32]
    keys: NDArray[np.float32]
    inputs: RoutingInputs
    centred: bool

    @cached_property
    def own(self) -> NDArray[np.int64]:
        """Each persona's number among the experts, or -1."""
        position = {name: i for i, name in enumerate(self.experts)}
        return np.array([position.get(name, -1) for name in self.personas], dtype=np.int64)

    @cached_property
    def persona_labels(self) -> tuple[str, ...]:
        """The cluster of each persona."""
        return labels_of(self.inputs, self.personas)

    @cached_property
    def by_label(self) -> dict[str, NDArray[np.int64]]:
        """Numbers of the experts of each cluster that has any."""
        clusters = need_clusters(self.inputs)
        found: dict[str, list[int]] = {}
        for i, name in enumerate(self.experts):
            if name in clusters.labels:
                found.setdefault(clusters.labels[name], []).append(i)
        return {label: np.array(found[label], dtype=np.int64) for label in sorted(found)}

    def centroids(self, labels: Sequence[str]) -> NDArray[np.float32]:
        """Directions of the centroids of some clusters: float32 (labels, d)."""
        known = self.inputs.centroids if self.centred else None
        if known is None or any(label not in known for label in labels):
            clusters = need_clusters(self.inputs)
            strangers = [i for i, name in enumerate(self.experts) if self.own_index[i] < 0 and name in clusters.labels]
            names = [*self.personas, *(self.experts[i] for i in strangers)]
            known = find_centroids(clusters, names, np.concatenate([self.queries, self.keys[strangers]])).centroids
        return unit(np.stack([known[label] for label in labels]))

    @cached_property
    def own_index(self) -> NDArray[np.int64]:
        """Each expert's number among the personas, or -1."""
        position = {name: i for i, name in enumerate(self.personas)}
        return np.array([position.get(name, -1) for name in self.experts], dtype=np.int64)


def make_space(inputs: RoutingInputs, centred: bool) -> tuple[Space, list[str]]:
    """The space of some inputs, and notes. Raises RoutingError if a persona has no embedding."""
    if inputs.embeddings is None:
        raise RoutingError("routing: this strategy needs embeddings.\nGive personas with training texts, or adapters.")
    there = set(inputs.embeddings.names)
    experts = tuple(name for name in inputs.experts if name in there)
    without = [name for name in inputs.experts if name not in there]
    mean = None
    vectors = inputs.embeddings.take(inputs.personas)
    if centred:
        mean = inputs.mean if inputs.mean is not None else mean_direction(vectors)
    queries, keys = project(vectors, mean), project(inputs.embeddings.take(experts), mean)
    notes = (
        [f"{without[0]}: has no embedding and contributes to nobody ({len(without)} such experts)"] if without else []
    )
    return Space(tuple(inputs.personas), experts, queries, keys, inputs, centred), notes


def check_inputs(inputs: RoutingInputs) -> RoutingInputs:
    """The same with names sorted. Raises RoutingError for a name twice, or one that a strategy's adapters have."""
    personas, experts = unique_names(inputs.personas, "persona"), unique_names(inputs.experts, "expert")
    labels = set(inputs.clusters.names) if inputs.clusters else set()
    taken = ({"all", "base", "unified"} | labels) & {*personas, *experts}
    if taken:
        raise RoutingError(f"{min(taken)}: is the name of a persona and of an adapter for many.\nRename the persona.")
    return replace(inputs, personas=personas, experts=experts)


def need_clusters(inputs: RoutingInputs) -> Clusters:
    """The clusters. Raises RoutingError if there are none."""
    if inputs.clusters is None:
        raise RoutingError("routing: this strategy needs clusters.\nGive `clusters` a count or a file.")
    return inputs.clusters


def labels_of(inputs: RoutingInputs, names: Sequence[str]) -> tuple[str, ...]:
    """The cluster of each persona. Raises RoutingError naming those without one."""
    clusters = need_clusters(inputs)
    missing = [name for name in names if name not in clusters.labels]
    if missing:
        raise RoutingError(f"clusters: {missing[0]} is in none ({len(missing)} such personas).\nAdd it to a cluster.")
    return tuple(clusters.labels[name] for name in names)
