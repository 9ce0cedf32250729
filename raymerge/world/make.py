"""Write a world down: what raymerge may read, and beside it what only the oracle and the report may.

personas.jsonl   persona, prompt, response, split: all that a strategy ever sees
clusters.json    persona -> cluster_00..: the true clusters
traits.parquet   persona, vector: the true traits, for the oracle row
world.json       settings, digests and figures; written last
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import transformers

from raymerge import storage
from raymerge.errors import PersonaError
from raymerge.personas import read_personas
from raymerge.routing.embeddings import load_encoder, persona_embeddings
from raymerge.world.figures import knowledge
from raymerge.world.language import topics
from raymerge.world.population import QUICK, Population, WorldSettings, examples, populate

WORLD = "world.json"

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def make_world(
    folder: str,
    *,
    relatedness: float | None = None,
    seed: int = 0,
    quick: bool = False,
    cluster_sizes: Sequence[int] | None = None,
    embedding_model: str | None = ENCODER,
) -> dict[str, Any]:
    """Make a world in a folder, unless it is there, and return its figures.

    relatedness: how much neighbours share, 0 (nothing) to 1; None is the default. quick: 24 personas in 3 clusters.
    cluster_sizes: personas in each cluster; None is the default. embedding_model: with what the figures look for
    neighbours by texts; None leaves these figures out.
    Figures: `personas`, `clusters`, `examples` counted, and figures.knowledge.
    Raises PersonaError if the settings are impossible or the folder holds a world of other settings.
    """
    settings = QUICK if quick else WorldSettings()
    changes: dict[str, Any] = {"seed": seed}
    if relatedness is not None:
        changes["relatedness"] = float(relatedness)
    if cluster_sizes is not None:
        changes["cluster_sizes"] = tuple(int(size) for size in cluster_sizes)
    settings = replace(settings, **changes)
    found = _figures_found(folder, settings)
    if found is not None:
        return found
    population = populate(settings)
    rows = examples(population)
    files = {
        "personas.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "clusters.json": storage.encode_json(labels(population)),
        "traits.parquet": storage.encode_parquet(traits_table(population)),
    }
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    embeddings = None
    if embedding_model is not None:
        personas = read_personas(storage.join(folder, "personas.jsonl"))
        transformers.utils.logging.disable_progress_bar()
        _, embeddings = persona_embeddings(personas, load_encoder(embedding_model))
    counted = {"personas": len(population.names), "clusters": len(settings.cluster_sizes), "examples": len(rows)}
    figures = {**counted, **{name: round(value, 4) for name, value in knowledge(population, embeddings).items()}}
    digests = {name: storage.digest_bytes(data) for name, data in files.items()}
    storage.write_json(
        storage.join(folder, WORLD),
        {"settings": _as_json(settings), "topics": _subjects(settings), "files": digests, "figures": figures},
    )
    return figures


def labels(population: Population) -> dict[str, str]:
    """Persona -> `cluster_00`..: the clusters that the traits were drawn from."""
    return {name: f"cluster_{cluster:02d}" for name, cluster in zip(population.names, population.clusters, strict=True)}


def traits_table(population: Population) -> pa.Table:
    """Columns persona (string) and vector (list of float32): the true traits."""
    vectors = population.traits.astype(np.float32)
    return pa.table({
        "persona": pa.array(population.names, pa.string()),
        "vector": pa.array(list(vectors), pa.list_(pa.float32())),
    })  # fmt: skip


def _figures_found(folder: str, settings: WorldSettings) -> dict[str, Any] | None:
    """The figures of a world that is there as a whole; None where there is none."""
    location = storage.join(folder, WORLD)
    if not storage.exists(location):
        return None
    world = storage.read_json(location)
    if world["settings"] != _as_json(settings):
        differences = "\n".join(
            f"  {name}: {world['settings'].get(name)!r} there, {value!r} asked for"
            for name, value in _as_json(settings).items()
            if world["settings"].get(name) != value
        )
        raise PersonaError(
            f"{folder}: holds a world of other settings.\n{differences}\nGive another folder, or remove this one."
        )
    for name, digest in world["files"].items():
        part = storage.join(folder, name)
        if not storage.exists(part) or storage.digest(part) != digest:
            return None
    return dict(world["figures"])


def _as_json(settings: WorldSettings) -> dict[str, Any]:
    return {**asdict(settings), "cluster_sizes": list(settings.cluster_sizes)}


def _subjects(settings: WorldSettings) -> list[str]:
    return [topic.subject for topic in topics()[: settings.topics]]
