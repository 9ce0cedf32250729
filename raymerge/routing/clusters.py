"""Clusters of personas: given by a file, or found by k-means; then frozen, with newcomers joining the nearest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymerge import storage
from raymerge.errors import RoutingError, did_you_mean


@dataclass(frozen=True, eq=False)
class Clusters:
    """labels: persona -> label, such as `cluster_00`. centroids: label -> float32 (d,), among projected embeddings
    (see `similarity.project`); empty where there are no embeddings.
    """

    labels: Mapping[str, str]
    centroids: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The labels that any persona has, sorted."""
        return tuple(sorted(set(self.labels.values())))

    def members(self, label: str) -> tuple[str, ...]:
        """Personas of a cluster, sorted."""
        return tuple(sorted(name for name, own in self.labels.items() if own == label))

    def as_value(self) -> dict[str, Any]:
        """JSON-able: {label: {personas, centroid}}, which `parse_clusters` reads."""
        value: dict[str, Any] = {label: {"personas": list(self.members(label))} for label in self.names}
        for label in self.names:
            if label in self.centroids:
                value[label]["centroid"] = [float(x) for x in self.centroids[label]]
        return value


def read_clusters(location: str, personas: Collection[str] | None = None) -> Clusters:
    """Clusters of a JSON file; see `parse_clusters`. Raises RoutingError, StorageError."""
    if not storage.exists(location):
        raise RoutingError(f"{location}: there is no such file of clusters.")
    return parse_clusters(storage.read_json(location), personas, location)


def parse_clusters(value: Any, personas: Collection[str] | None = None, where: str = "clusters") -> Clusters:
    """Clusters as {persona: label}, {label: [personas]} or {label: {..., "personas": [...], "centroid": [...]}}.

    A label 7 is called cluster_07, a label ops cluster_ops, and so is the cluster's adapter. personas: all that there
    are, or None to take any name.
    Raises RoutingError for another form, a persona in two clusters, a persona that is none of `personas`.
    """
    if not isinstance(value, Mapping) or not value:
        raise RoutingError(f"{where}: holds no clusters.\nExpected {{persona: label}} or {{label: [personas]}}.")
    labels: dict[str, str] = {}
    centroids: dict[str, NDArray[np.float32]] = {}
    for key, entry in value.items():
        if isinstance(entry, str | int) and not isinstance(entry, bool):
            _add(labels, key, _label(entry, where), where)
            continue
        members = entry.get("personas") if isinstance(entry, Mapping) else entry
        if not isinstance(members, Sequence) or isinstance(members, str):
            raise RoutingError(
                f"{where}: {key!r} holds {entry!r}.\nExpected a label, or the personas: a list, or a mapping with it."
            )
        label = _label(key, where)
        for name in members:
            _add(labels, name, label, where)
        if isinstance(entry, Mapping) and entry.get("centroid") is not None:
            centroids[label] = np.array(entry["centroid"], dtype=np.float32)
    strangers = sorted(set(labels) - set(personas)) if personas is not None else []
    if strangers:
        hint = did_you_mean(strangers[0], personas or ())
        others = f" Neither are {len(strangers) - 1} more." if len(strangers) > 1 else ""
        raise RoutingError(f"{where}: {strangers[0]!r} is no persona.{hint}{others}")
    return Clusters(dict(sorted(labels.items())), centroids)


def _label(given: Any, where: str) -> str:
    text = str(given)
    if text.isdigit():
        return f"cluster_{int(text):02d}"
    if not text or any(c in text for c in "/\\\0\n") or text.startswith("."):
        raise RoutingError(f"{where}: the label {given!r} cannot be the name of a folder.")
    return text if text.startswith("cluster_") else f"cluster_{text}"


def _add(labels: dict[str, str], name: Any, label: str, where: str) -> None:
    if not isinstance(name, str):
        raise RoutingError(f"{where}: {label} lists {name!r}.\nExpected names of personas.")
    if name in labels and labels[name] != label:
        raise RoutingError(f"{where}: {name} is in {labels[name]} and in {label}.\nExpected one cluster for a persona.")
    labels[name] = label


def k_means(names: Sequence[str], vectors: NDArray[np.float32], count: int, seed: int = 0) -> Clusters:
    """Clusters by k-means, the largest called cluster_00; of two of one size the one with the first name.

    vectors: projected embeddings, float32 (names, d). Raises RoutingError if count is below 1 or above the number of
    different vectors.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    order = np.argsort(np.array(names, dtype=object), kind="stable")
    points = vectors[order].astype(np.float64)
    different = len(np.unique(points, axis=0))
    if not 1 <= count <= different:
        raise RoutingError(f"clusters: count is {count}.\nExpected 1 to {different}, the number of different personas.")
    with threadpool_limits(1):  # the sums, and so a tie, would depend on the number of threads
        fitted = KMeans(count, n_init=10, random_state=seed).fit(points)
    found, first, sizes = np.unique(fitted.labels_, return_index=True, return_counts=True)
    ranked = found[np.lexsort((first, -sizes))]
    label = {int(number): f"cluster_{rank:02d}" for rank, number in enumerate(ranked)}
    labels = {names[i]: label[int(number)] for i, number in zip(order, fitted.labels_, strict=True)}
    centroids = {label[int(n)]: fitted.cluster_centers_[n].astype(np.float32) for n in ranked}
    return Clusters(labels, centroids)


def find_centroids(clusters: Clusters, names: Sequence[str], vectors: NDArray[np.float32]) -> Clusters:
    """The same clusters with the mean of their members' projected embeddings (names, d) as centroids.

    A cluster of which no member is in `names` has none.
    """
    found: dict[str, NDArray[np.float32]] = {}
    own = [clusters.labels.get(name) for name in names]
    for label in clusters.names:
        members = sorted((name, i) for i, name in enumerate(names) if own[i] == label)
        if members:
            found[label] = vectors[[i for _, i in members]].mean(axis=0, dtype=np.float64).astype(np.float32)
    return Clusters(clusters.labels, found)


def admit(clusters: Clusters, names: Sequence[str], vectors: NDArray[np.float32]) -> Clusters:
    """The same clusters and centroids with newcomers in the nearest cluster; nobody else moves.

    names: any; those with a label already keep it. vectors: their projected embeddings, float32 (names, d). Raises
    RoutingError if there are newcomers and no centroids.
    """
    new = [i for i, name in enumerate(names) if name not in clusters.labels]
    if not new:
        return clusters
    labels = [label for label in clusters.names if label in clusters.centroids]
    if not labels:
        raise RoutingError(
            f"clusters: {names[new[0]]} is in none ({len(new)} such personas), and there are no centroids.\n"
            "Add it to the file of clusters, or give the personas embeddings."
        )
    centroids = np.stack([clusters.centroids[label] for label in labels]).astype(np.float64)
    joined = dict(clusters.labels)
    for i in new:
        joined[names[i]] = labels[int(((centroids - vectors[i]) ** 2).sum(axis=1).argmin())]
    return Clusters(dict(sorted(joined.items())), clusters.centroids)
