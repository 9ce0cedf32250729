"""Embedding items: personas by their texts on a model worker, adapters by their deltas on a merge worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymerge import storage
from raymerge.errors import AdapterError, ModelError, StorageError
from raymerge.manifest import invalidate, is_complete, read_manifest, write_artefact
from raymerge.merging.sketch import sketch
from raymerge.personas import Personas, read_personas
from raymerge.routing.embeddings import encode_embeddings, make_embeddings, persona_embeddings, read_embeddings
from raymerge.runtime.bases import digest_with_base
from raymerge.runtime.experts import ExpertCache, first_line
from raymerge.runtime.tasks import EmbedTask, SketchTask

VECTORS = "vectors.parquet"


def is_embedded(task: EmbedTask | SketchTask, personas: Personas | None) -> bool:
    """Whether a task's vectors are there and are of these texts, or these adapters. An adapter at a URI is taken to be
    the one that was read: all of them would have to be fetched. personas: as of the task."""
    if isinstance(task, EmbedTask):
        return personas is not None and is_complete(task.folder, _key_of_texts(task, personas))
    if not any(storage.is_uri(where) for _, where in task.adapters):
        key, _ = _key_of_deltas(task)
        return is_complete(task.folder, key)
    known = read_manifest(task.folder)
    if known is None:
        return False
    there = {*known["failed"], *read_embeddings(storage.join(task.folder, VECTORS)).names}
    return {name for name, _ in task.adapters} <= there


def embed_to_folder(task: EmbedTask, worker: Any) -> dict[str, Any]:
    """Write the embeddings of a part of the personas unless they are there."""
    personas = read_personas(task.personas)
    key = _key_of_texts(task, personas)
    if is_complete(task.folder, key):
        return {"skipped": True}
    invalidate(task.folder)
    names, vectors = persona_embeddings(personas, worker.encoder(task.model), names=task.names)
    _write(task.folder, names, vectors, {}, key)
    return {"skipped": False}


def sketch_to_folder(task: SketchTask, cache: ExpertCache) -> dict[str, Any]:
    """Write coordinates of adapters unless they are there. One that cannot be read is named and left out."""
    key, failed = _key_of_deltas(task)
    known = read_manifest(task.folder)
    if known is not None and is_complete(task.folder, key) and known["failed"] == failed:
        return {"skipped": True, "failed": failed}
    invalidate(task.folder)
    rows: dict[str, NDArray[np.float32]] = {}
    for name, where in task.adapters:
        try:
            rows[name] = sketch(cache.read(name, where, base=task.base), task.dimensions, task.seed)
        except (AdapterError, ModelError, StorageError) as error:
            failed[name] = first_line(error)
    vectors = np.stack(list(rows.values())) if rows else np.zeros((0, task.dimensions), dtype=np.float32)
    _write(task.folder, list(rows), vectors, failed, key)
    return {"skipped": False, "failed": failed}


def _key_of_texts(task: EmbedTask, personas: Personas) -> str:
    rows = {name: [e.response for e in personas.examples(name, "train")] for name in task.names}
    return storage.digest_value([task.model, rows])


def _key_of_deltas(task: SketchTask) -> tuple[str, dict[str, str]]:
    """The key, and why adapters cannot be read, by name."""
    digests: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, where in task.adapters:
        try:
            digests[name] = digest_with_base(where, name, task.base)
        except (AdapterError, ModelError, StorageError) as error:
            digests[name], failed[name] = None, first_line(error)
    return storage.digest_value([task.dimensions, task.seed, digests]), failed


def _write(folder: str, names: Sequence[str], vectors: NDArray[Any], failed: dict[str, str], key: str) -> None:
    data = encode_embeddings(make_embeddings(names, vectors))
    write_artefact(folder, {VECTORS: data}, {"failed": dict(sorted(failed.items()))}, key)
