"""Where everybody is: embeddings gathered, the mean and the clusters fitted once and then frozen, rows routed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymerge import storage
from raymerge.config import Grouping, Project
from raymerge.errors import PersonaError, ProjectError, RoutingError
from raymerge.manifest import read_manifest
from raymerge.pipelines.learned import check_embedding, held_out_of, read_trained, router_of
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.planning import FROM_FILE, embedding_items, embedding_kind, embedding_source
from raymerge.recipes import Recipe
from raymerge.routing.clusters import Clusters, admit, find_centroids, k_means, parse_clusters, read_clusters
from raymerge.routing.embeddings import Embeddings, make_embeddings, read_embeddings
from raymerge.routing.inputs import RoutingInputs
from raymerge.routing.similarity import mean_direction, project
from raymerge.routing.strategies import route
from raymerge.routing.table import RoutingTable
from raymerge.runtime.embedding import VECTORS, is_embedded
from raymerge.runtime.tasks import SketchTask


@dataclass(frozen=True)
class Placing:
    """What a job needs to know of its personas: the experts among them, and whether embeddings and clusters."""

    experts: tuple[str, ...]
    embeddings: bool
    clusters: bool


@dataclass(frozen=True)
class Placed:
    """The inputs of every routing of a job. unread: adapters that could not be embedded, since they cannot be read.

    routed: what was routed before, since a recipe is asked for when it is checked, tuned, carried out and chosen.
    """

    opened: Opened
    inputs: RoutingInputs
    unread: frozenset[str] = frozenset()
    routed: dict[str, tuple[RoutingTable, tuple[str, ...]]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def clusters(self) -> Mapping[str, str] | None:
        """Persona -> label, where there are clusters."""
        return self.inputs.clusters.labels if self.inputs.clusters is not None else None

    def route(self, recipe: Recipe) -> tuple[RoutingTable, tuple[str, ...]]:
        """The routing table of a recipe, and notes on it. Personas whom nothing places get the base; clusters whose
        scale the recipe offsets share no row with others.

        Raises RoutingError, also where nobody has a place.
        """
        apart = sorted((recipe.scale_offsets or {}).get("clusters", ()))
        key = storage.digest_value([recipe.strategy, dict(recipe.strategy_parameters), recipe.embedding, apart])
        if key not in self.routed:
            self.routed[key] = self._route(recipe)
        return self.routed[key]

    def _route(self, recipe: Recipe) -> tuple[RoutingTable, tuple[str, ...]]:
        inputs = self.inputs_of(recipe)
        nowhere = self._nowhere(recipe, inputs)
        there = [name for name in inputs.personas if name not in nowhere]
        if nowhere and not there:
            raise RoutingError(f"recipe {recipe.name}: no persona has an embedding, so nobody can be routed.")
        table, notes = route(recipe.strategy, recipe.strategy_parameters, replace(inputs, personas=there))
        if nowhere:
            notes = (f"{min(nowhere)}: has no embedding and gets the base ({len(nowhere)} such personas)", *notes)
            table = table.with_base(nowhere)
        if apart := (recipe.scale_offsets or {}).get("clusters"):
            table = table.apart({name: label for name, label in (self.clusters or {}).items() if label in apart})
        if len(inputs.personas) < len(self.inputs.personas):
            notes = (f"{min(self.unread)}: cannot be read and is left out ({len(self.unread)} such adapters)", *notes)
        return table, notes

    def routes_together(self, recipe: Recipe) -> bool:
        """Whether a persona's row depends on who else is routed: where a router lets an expert serve only so many."""
        folder = router_of(self.opened.project, recipe)
        return folder is not None and read_trained(folder).shape.max_in_degree is not None

    def explain(self, recipe: Recipe, table: RoutingTable, notes: Sequence[str]) -> dict[str, Any]:
        """`routing_info.json`: the table for people."""
        return table.info(
            strategy=recipe.strategy, parameters=recipe.strategy_parameters, notes=notes, clusters=self.clusters
        )

    def inputs_of(self, recipe: Recipe) -> RoutingInputs:
        """The inputs, without what cannot be read, with the router where the recipe asks it, and with the recipe's own
        embedding where it names a file. Adapters of personas held out from the router are no experts to it."""
        inputs = self.inputs
        if recipe.strategy == "neighbours_trained":  # whoever has examples, with or without an adapter
            inputs = replace(inputs, experts=self.opened.trainable)
        if needs_embeddings(self.opened.project, recipe):
            read = [[n for n in names if n not in self.unread] for names in (inputs.personas, inputs.experts)]
            inputs = replace(inputs, personas=read[0], experts=read[1])
        folder = router_of(self.opened.project, recipe)
        if folder is not None:
            kind = embedding_kind(self.opened) if recipe.embedding is None else FROM_FILE
            check_embedding(folder, kind, f"recipe {recipe.name}")
            unknown = held_out_of(folder)
            able = [name for name in inputs.experts if name not in unknown]
            inputs = replace(inputs, experts=able, router=read_trained(folder))
        if recipe.embedding is None:
            return inputs
        vectors = read_embeddings(self.opened.project.path(recipe.embedding))
        return replace(inputs, embeddings=vectors, mean=None, centroids=None)

    def _nowhere(self, recipe: Recipe, inputs: RoutingInputs) -> set[str]:
        """Personas without an embedding where the recipe needs one, or without a cluster and the texts to find it."""
        found: set[str] = set()
        if "embeddings" in recipe.needs and inputs.embeddings is not None:
            found |= set(inputs.personas) - set(inputs.embeddings.names)
        if "clusters" in recipe.needs and (self.inputs.embeddings is not None or self.opened.personas is not None):
            findable = self.opened.trainable if self.inputs.embeddings is None else ()
            found |= set(inputs.personas) - set(self.clusters or ()) - set(findable)
        return found


def needs_embeddings(project: Project, recipe: Recipe) -> bool:
    """Whether a recipe needs the project's embeddings, for its routing or for its clusters."""
    own = "embeddings" in recipe.needs and recipe.embedding is None
    return own or ("clusters" in recipe.needs and project.clusters.file is None)


def job_needs_embeddings(project: Project, recipes: Iterable[Recipe], groupings: Collection[Grouping]) -> bool:
    """Whether a job needs the project's embeddings: for a recipe, or to train some groupings, which finds clusters or
    tries epochs by merges of neighbours."""
    finds_clusters = "cluster" in groupings and project.clusters.file is None
    tries = "persona" in groupings and project.training.of("persona").tries_neighbours
    return finds_clusters or tries or any(needs_embeddings(project, recipe) for recipe in recipes)


def check_placing(opened: Opened, wanted: Placing, *, refit: bool) -> None:
    """Raise now what would end the job once the embeddings are there: no texts, other settings, unknown names."""
    location = opened.project.clusters.file
    if wanted.clusters and location is not None:
        given = read_clusters(opened.project.path(location), opened.names)
        for label in given.names:
            if len(given.members(label)) == 1:
                raise ProjectError(
                    f"{location}: cluster {label} has {given.members(label)[0]} as its only member.\n"
                    "A cluster needs two: put the persona into another one."
                )
    if not wanted.embeddings:
        return
    source = embedding_source(opened)
    if source == "texts" and opened.need_personas("embedding") and not opened.trainable:
        where = opened.need_personas("embedding").location
        raise PersonaError(f"{where}: nobody has training examples, so nobody has an embedding.")
    if source not in ("texts", "deltas"):
        read_embeddings(source)
    if not refit:
        _read_fit(opened.project, fit_settings(opened, wanted.clusters))


def place(opened: Opened, wanted: Placing, *, refit: bool, write: bool = True) -> Placed:
    """Gather what the embedding items wrote, and fit or load mean and clusters. write: keep what was fitted."""
    names = opened.names
    embeddings = gather_embeddings(opened, wanted.experts) if wanted.embeddings else None
    unread: frozenset[str] = frozenset()
    clusters: Clusters | None = None
    mean = None
    files: dict[str, Any] = {}
    if embeddings is not None:
        if embedding_source(opened) == "deltas":
            unread = frozenset(wanted.experts) - frozenset(embeddings.names)
        clusters, mean = _frozen(opened, embeddings, wanted.clusters, refit, files)
    elif wanted.clusters:
        clusters = read_clusters(opened.project.path(opened.project.clusters.file or ""), names)
    if clusters is not None:
        files["clusters.json"] = dict(clusters.labels)
    for name, value in files.items() if write else ():
        write_if_new(storage.join(_folder(opened.project), name), storage.encode_json(value))
    inputs = RoutingInputs(
        personas=names,
        experts=wanted.experts,
        embeddings=embeddings,
        clusters=clusters,
        seed=opened.project.evaluation.seed,
        mean=mean,
        centroids=clusters.centroids if clusters is not None and clusters.centroids else None,
        trainable=opened.trainable if opened.personas is not None else None,
    )
    return Placed(opened, inputs, unread)


def embeddings_are_there(opened: Opened, experts: Sequence[str]) -> bool:
    """Whether everybody was embedded, from the texts or adapters that there are now."""
    return all(is_embedded(item.payload, opened.personas) for item in embedding_items(opened, experts, {}))


def gather_embeddings(opened: Opened, experts: Sequence[str]) -> Embeddings:
    """The vectors that the embedding items wrote, or those of the project's file.

    Raises ProjectError if an item failed, or nothing could be embedded.
    """
    source = embedding_source(opened)
    if source not in ("texts", "deltas"):
        return read_embeddings(source)
    parts = []
    for item in embedding_items(opened, experts, {}):
        known = read_manifest(item.payload.folder)
        if known is None:
            raise ProjectError(
                f"{item.payload.folder}: the embeddings are not there, so nothing can be routed.\n"
                "What failed is listed above; the same command goes on from here."
            )
        embedded = item.payload.adapters if isinstance(item.payload, SketchTask) else item.payload.names
        if len(known.get("failed", {})) < len(embedded):
            parts.append(read_embeddings(storage.join(item.payload.folder, VECTORS)))
    if not parts:
        raise ProjectError(f"{opened.project.location}: no adapter can be read, so nothing can be routed.")
    names = [name for part in parts for name in part.names]
    return make_embeddings(names, np.concatenate([part.vectors for part in parts]))


def _folder(project: Project) -> str:
    return storage.join(project.shared_folder(), "clusters")


def fit_settings(opened: Opened, want_clusters: bool) -> dict[str, Any]:
    """What decides a fit: where embeddings come from; how clusters are found, and what their file says."""
    clusters = opened.project.clusters
    digest = storage.digest(opened.project.path(clusters.file)) if want_clusters and clusters.file else None
    return {
        "embedding": [embedding_source(opened), opened.project.embedding.model],
        "clusters": {**clusters.model_dump(mode="json"), "digest": digest} if want_clusters else None,
    }


def _frozen(
    opened: Opened, embeddings: Embeddings, want_clusters: bool, refit: bool, files: dict[str, Any]
) -> tuple[Clusters | None, NDArray[np.float32]]:
    """Mean and clusters of the first run, newcomers admitted; fitted now if there are none or `refit`.

    files: gets `fit.json`, which holds both in one, so that a job that is killed leaves the old fit or the new one.
    """
    settings = fit_settings(opened, want_clusters)
    saved = None if refit else _read_fit(opened.project, settings)
    mean = mean_direction(embeddings.vectors) if saved is None else np.array(saved["mean"], dtype=np.float32)
    rows = project(embeddings.vectors, mean)
    given = opened.project.clusters
    clusters: Clusters | None = None
    if saved is not None and saved["clusters"] is not None:
        clusters = admit(parse_clusters(saved["clusters"]), embeddings.names, rows)
    elif want_clusters and given.file is not None:
        labelled = read_clusters(opened.project.path(given.file), opened.names)
        clusters = admit(find_centroids(labelled, embeddings.names, rows), embeddings.names, rows)
    elif want_clusters:
        clusters = k_means(embeddings.names, rows, given.count, given.seed)
    if saved is not None and not want_clusters:
        settings = saved["settings"]  # a job that asks for no clusters leaves those there are as they were
    value = clusters.as_value() if clusters is not None else None
    files["fit.json"] = {"settings": settings, "mean": [float(x) for x in mean], "clusters": value}
    return clusters, mean


def _read_fit(project: Project, settings: Mapping[str, Any]) -> Any:
    location = storage.join(_folder(project), "fit.json")
    if not storage.exists(location):
        return None
    saved = storage.read_json(location)
    wanted = {k: v for k, v in settings.items() if v is not None and saved["settings"][k] is not None}
    differing = [key for key, value in wanted.items() if saved["settings"][key] != value]
    if differing:
        raise ProjectError(
            f"{_folder(project)}: was fitted with other settings of `{differing[0]}`.\n"
            f"Found {saved['settings'][differing[0]]} there, {settings[differing[0]]} in the project file. "
            "--refit fits anew; runs made before keep their adapters until they are made again."
        )
    return saved


def write_if_new(location: str, data: bytes) -> None:
    """Write a file unless it holds these bytes."""
    if not storage.exists(location) or storage.read_bytes(location) != data:
        storage.write_bytes(location, data)
