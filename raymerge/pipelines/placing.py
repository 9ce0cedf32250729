"""Where everybody is: embeddings gathered, the mean and the clusters fitted once and then frozen, rows routed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raymerge import storage
from raymerge.errors import ProjectError
from raymerge.manifest import read_manifest, write_artefact
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.planning import embedding_items, embedding_source
from raymerge.recipes import Recipe
from raymerge.routing.clusters import Clusters, admit, find_centroids, k_means, parse_clusters, read_clusters
from raymerge.routing.embeddings import Embeddings, make_embeddings, read_embeddings
from raymerge.routing.inputs import RoutingInputs
from raymerge.routing.similarity import mean_direction, project
from raymerge.routing.strategies import route
from raymerge.routing.table import RoutingTable


@dataclass(frozen=True)
class Placing:
    """What a job needs to know of its personas: the experts among them, and whether embeddings and clusters."""

    experts: tuple[str, ...]
    embeddings: bool
    clusters: bool


@dataclass(frozen=True)
class Placed:
    """The inputs of every routing of a job."""

    opened: Opened
    inputs: RoutingInputs

    @property
    def clusters(self) -> Mapping[str, str] | None:
        """Persona -> label, where there are clusters."""
        return self.inputs.clusters.labels if self.inputs.clusters is not None else None

    def route(self, recipe: Recipe) -> tuple[RoutingTable, tuple[str, ...]]:
        """The routing table of a recipe, and notes on it. Raises RoutingError."""
        return route(recipe.strategy, recipe.strategy_parameters, self.inputs_of(recipe))

    def explain(self, recipe: Recipe, table: RoutingTable, notes: Sequence[str]) -> dict[str, Any]:
        """`routing_info.json`: the table for people."""
        return table.info(
            strategy=recipe.strategy, parameters=recipe.strategy_parameters, notes=notes, clusters=self.clusters
        )

    def inputs_of(self, recipe: Recipe) -> RoutingInputs:
        """The inputs, with the recipe's own embedding where it names a file of vectors."""
        if recipe.embedding is None:
            return self.inputs
        vectors = read_embeddings(self.opened.project.path(recipe.embedding))
        return replace(self.inputs, embeddings=vectors, mean=None, centroids=None)


def place(opened: Opened, wanted: Placing, *, refit: bool) -> Placed:
    """Gather what the embedding items wrote, and fit or load mean and clusters."""
    names = opened.names
    embeddings = gather_embeddings(opened, wanted.experts) if _embedded(opened, wanted) else None
    clusters: Clusters | None = None
    mean = None
    if embeddings is not None:
        clusters, mean = _frozen(opened, embeddings, wanted.clusters, refit)
    elif wanted.clusters:
        clusters = read_clusters(opened.project.path(opened.project.clusters.file or ""), names)
        _write_labels(opened, clusters)
    inputs = RoutingInputs(
        personas=names,
        experts=wanted.experts,
        embeddings=embeddings,
        clusters=clusters,
        seed=opened.project.evaluation.seed,
        mean=mean,
        centroids=clusters.centroids if clusters is not None and clusters.centroids else None,
    )
    return Placed(opened, inputs)


def _embedded(opened: Opened, wanted: Placing) -> bool:
    return wanted.embeddings or (wanted.clusters and opened.project.clusters.file is None)


def gather_embeddings(opened: Opened, experts: Sequence[str]) -> Embeddings:
    """The vectors that the embedding items wrote. Raises ProjectError if one of them failed."""
    parts = []
    for item in embedding_items(opened, experts, {}):
        if read_manifest(item.payload.folder) is None:
            raise ProjectError(
                f"{item.payload.folder}: the embeddings are not there, so nothing can be routed.\n"
                "What failed is listed above; the same command goes on from here."
            )
        parts.append(read_embeddings(storage.join(item.payload.folder, "vectors.parquet")))
    names = [name for part in parts for name in part.names]
    return make_embeddings(names, np.concatenate([part.vectors for part in parts]))


def _frozen(
    opened: Opened, embeddings: Embeddings, want_clusters: bool, refit: bool
) -> tuple[Clusters | None, np.ndarray[Any, Any]]:
    """Mean and clusters of the first run, newcomers admitted; fitted now if there are none or `refit`."""
    project = opened.project
    folder = storage.join(project.shared_folder(), "clusters")
    settings = {
        "embedding": [embedding_source(opened), project.embedding.model],
        "clusters": project.clusters.model_dump(mode="json") if want_clusters else None,
    }
    saved = None if refit else _read_fit(folder, settings)
    mean = mean_direction(embeddings.vectors) if saved is None else np.array(saved["mean"], dtype=np.float32)
    rows = project_rows(embeddings, mean)
    clusters: Clusters | None = None
    if saved is not None and saved["clusters"] is not None:
        clusters = admit(parse_clusters(saved["clusters"]), embeddings.names, rows)
    elif want_clusters and project.clusters.file is not None:
        given = read_clusters(project.path(project.clusters.file), opened.names)
        clusters = admit(find_centroids(given, embeddings.names, rows), embeddings.names, rows)
    elif want_clusters:
        clusters = k_means(embeddings.names, rows, project.clusters.count, project.clusters.seed)
    value = clusters.as_value() if clusters is not None else None
    if saved is not None and not want_clusters:
        settings = saved["settings"]  # a job that asks for no clusters leaves those there are as they were
    fit = {"settings": settings, "mean": [float(x) for x in mean], "clusters": value}
    files = {"fit.json": storage.encode_json(fit)}
    if clusters is not None:
        files["clusters.json"] = storage.encode_json(dict(clusters.labels))
    _write_if_changed(folder, files)
    return clusters, mean


def project_rows(embeddings: Embeddings, mean: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The embeddings as routing compares them: directions less the mean."""
    return project(embeddings.vectors, mean)


def _read_fit(folder: str, settings: Mapping[str, Any]) -> Any:
    if read_manifest(folder) is None:
        return None
    location = storage.join(folder, "fit.json")
    if not storage.exists(location):
        return None
    saved = storage.read_json(location)
    if saved["settings"]["clusters"] is None and saved["settings"]["embedding"] == settings["embedding"]:
        return {**saved, "clusters": None}
    wanted = {k: v for k, v in settings.items() if v is not None}
    differing = [key for key, value in wanted.items() if saved["settings"][key] != value]
    if differing:
        raise ProjectError(
            f"{folder}: was fitted with other settings of `{differing[0]}`.\n"
            f"Found {saved['settings'][differing[0]]} there, {settings[differing[0]]} in the project file. "
            "--refit fits anew; runs made before keep their adapters until they are removed."
        )
    return saved


def _write_labels(opened: Opened, clusters: Clusters) -> None:
    folder = storage.join(opened.project.shared_folder(), "clusters")
    _write_if_changed(folder, {"clusters.json": storage.encode_json(dict(clusters.labels))})


def _write_if_changed(folder: str, files: Mapping[str, bytes]) -> None:
    key = storage.digest_value({name: storage.digest_bytes(data) for name, data in files.items()})
    manifest = read_manifest(folder)
    if manifest is None or manifest["key"] != key:
        write_artefact(folder, files, {}, key)
