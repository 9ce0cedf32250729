"""An evaluation item on a model worker: answers are generated and scored in one go, and only figures go back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raymerge import storage
from raymerge.adapters import LoraAdapter
from raymerge.errors import AdapterError, EvaluationError, MergeError, StorageError
from raymerge.evaluation.metrics import chrf, exact_match, similarity
from raymerge.manifest import content_digest, is_complete, read_manifest, write_artefact
from raymerge.merging.merge import mixture_weights
from raymerge.models.generation import GenerationSettings, generate, score_references
from raymerge.models.multilora import MultiLora
from raymerge.personas import Example, read_personas, render_prompt
from raymerge.runtime.experts import ExpertCache, adapter_digest, build, find_inputs, first_line
from raymerge.runtime.tasks import AnswerSource, EvaluateTask, GatherTask


@dataclass(frozen=True)
class Resident:
    """Adapters of an evaluation item and each persona's weights over them; no weight is the base."""

    adapters: tuple[LoraAdapter, ...]
    weights: Mapping[str, Mapping[int, float]]


def evaluate_to_folder(task: EvaluateTask, worker: Any) -> dict[str, Any]:
    """Answer and score a part of a run's personas unless the result is there. A persona whose adapter cannot be had is
    named in the result; the others are scored."""
    everybody = read_personas(task.personas)
    examples = {s.persona: everybody.examples(s.persona, task.split) for s in task.sources}
    digests, failed = _source_digests(task.sources, worker.cache)
    key = storage.digest_value(
        {
            "sources": digests,
            "examples": {p: [[e.prompt, e.response] for e in rows] for p, rows in examples.items()},
            "generation": dict(task.generation),
            "similarity_model": task.similarity_model,
            "batch_size": task.batch_size,
            "base": task.base_digest,
        }
    )
    if is_complete(task.folder, key):
        return {"skipped": True, "failed": failed}
    resident, unread = _load(task.sources, worker.cache, failed)
    failed = {**failed, **unread}
    rows = [e for s in task.sources if s.persona in resident.weights for e in examples[s.persona]]
    answers, nll = _answer(task, worker.base, resident, rows)
    tables = _score(task, worker, rows, answers, nll)
    files = {f"{name}.parquet": storage.encode_parquet(table) for name, table in tables.items()}
    write_artefact(task.folder, files, {"failed": dict(sorted(failed.items()))}, key)
    return {"skipped": False, "failed": failed, "answers": len(rows)}


def _source_digests(sources: Sequence[AnswerSource], cache: ExpertCache) -> tuple[dict[str, Any], dict[str, str]]:
    digests: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for source in sources:
        try:
            if source.kind == "adapter":
                assert source.location is not None
                digests[source.persona] = adapter_digest(source.location)
            elif source.merge is not None:
                digests[source.persona] = [source.kind, find_inputs(source.merge, cache).key]
            else:
                digests[source.persona] = "base"
        except (AdapterError, MergeError, StorageError) as error:
            failed[source.persona] = first_line(error)
            digests[source.persona] = None
    return digests, failed


def _load(
    sources: Sequence[AnswerSource], cache: ExpertCache, failed: Mapping[str, str]
) -> tuple[Resident, dict[str, str]]:
    adapters: list[LoraAdapter] = []
    places: dict[str, int] = {}
    weights: dict[str, dict[int, float]] = {}
    unread: dict[str, str] = {}

    def place(identity: str, adapter: LoraAdapter) -> int:
        if identity not in places:
            places[identity] = len(adapters)
            adapters.append(adapter)
        return places[identity]

    for source in sources:
        if source.persona in failed:
            continue
        try:
            if source.kind == "base":
                weights[source.persona] = {}
            elif source.kind == "adapter":
                assert source.location is not None
                adapter = cache.read(source.persona, source.location)
                weights[source.persona] = {place(source.location, adapter): 1.0}
            else:
                assert source.merge is not None
                inputs = find_inputs(source.merge, cache)
                if source.kind == "merge":
                    if inputs.key not in places:
                        place(inputs.key, build(source.merge, inputs, cache))
                    weights[source.persona] = {places[inputs.key]: 1.0}
                else:
                    experts = [(e.name, e.location) for e in source.merge.experts]
                    read = [cache.read(*e) for e in experts]
                    anchor = cache.read("anchor", inputs.anchor) if inputs.anchor else None
                    shares, anchor_share = mixture_weights(
                        read, [e.weight for e in source.merge.experts], source.merge.merges["scale"], anchor
                    )
                    row = {place(where, a): w for (_, where), a, w in zip(experts, read, shares, strict=True)}
                    if anchor is not None and inputs.anchor is not None:
                        at = place(inputs.anchor, anchor)
                        row[at] = row.get(at, 0.0) + anchor_share
                    weights[source.persona] = row
        except (AdapterError, MergeError, StorageError) as error:
            unread[source.persona] = first_line(error)
    return Resident(tuple(adapters), weights), unread


def _answer(
    task: EvaluateTask, base: Any, resident: Resident, rows: Sequence[Example]
) -> tuple[list[str], np.ndarray[Any, Any]]:
    settings = GenerationSettings(max_new_tokens=task.generation["max_new_tokens"], stop=tuple(task.generation["stop"]))
    prompts = [render_prompt(e.prompt, task.generation["prompt_format"], base.tokenizer) for e in rows]
    references = [e.response for e in rows]
    lora = MultiLora(base.model) if resident.adapters else None
    try:
        if lora is not None:
            lora.load(resident.adapters)
        single = all(len(w) == 0 or list(w.values()) == [1.0] for w in resident.weights.values())
        if lora is None:
            chosen: Any = None
        elif single:
            chosen = torch.tensor([next(iter(resident.weights[e.persona]), -1) for e in rows])
        else:
            chosen = torch.zeros(len(rows), len(resident.adapters))
            for i, e in enumerate(rows):
                for j, weight in resident.weights[e.persona].items():
                    chosen[i, j] = weight
        answers = generate(base, lora, prompts, chosen, settings, batch_size=task.batch_size)
        nll = score_references(base, lora, prompts, references, chosen, batch_size=task.batch_size)
    finally:
        if lora is not None:
            lora.detach()
    return answers, np.asarray(nll, dtype=np.float64)


def _score(
    task: EvaluateTask, worker: Any, rows: Sequence[Example], answers: Sequence[str], nll: np.ndarray[Any, Any]
) -> dict[str, Any]:
    references = [e.response for e in rows]
    counted: dict[str, int] = {}
    numbers = []
    for e in rows:
        numbers.append(counted.get(e.persona, 0))
        counted[e.persona] = numbers[-1] + 1
    where = {"persona": [e.persona for e in rows], "example": pa.array(numbers, pa.int32())}
    metrics = {
        "similarity": pa.array(similarity(worker.encoder(task.similarity_model), answers, references), pa.float32()),
        "chrf": pa.array(chrf(answers, references), pa.float32()),
        "nll": pa.array(nll, pa.float32()),
        "exact": pa.array(exact_match(answers, references), pa.bool_()),
    }
    texts = {"prompt": [e.prompt for e in rows], "reference": references, "generated": list(answers)}
    return {"metrics": pa.table({**where, **metrics}), "generations": pa.table({**where, **texts})}


def gather(task: GatherTask) -> dict[str, Any]:
    """Join the parts of an evaluation; personas that no part could answer are named in `summary.json`."""
    key = storage.digest_value([[content_digest(part) for part in task.parts], dict(task.missing)])
    if is_complete(task.folder, key):
        return {"skipped": True}
    failed = dict(task.missing)
    tables: dict[str, list[Any]] = {"metrics": [], "generations": []}
    for part in task.parts:
        manifest = read_manifest(part)
        if manifest is None:
            raise EvaluationError(f"{part}: is not there, so the run cannot be summed up.\nIts own failure says why.")
        failed |= manifest["failed"]
        for name, found in tables.items():
            found.append(storage.read_parquet(storage.join(part, f"{name}.parquet")))
    joined = {name: pa.concat_tables(found).combine_chunks() for name, found in tables.items()}
    files = {f"{name}.parquet": storage.encode_parquet(table) for name, table in joined.items()}
    files["summary.json"] = storage.encode_json(_summary(joined["metrics"], failed))
    write_artefact(task.folder, files, {}, key)
    return {"skipped": False, "personas_failed": len(failed)}


def _summary(metrics: Any, failed: Mapping[str, str]) -> dict[str, Any]:
    by_persona = metrics.group_by("persona").aggregate([(m, "mean") for m in ("similarity", "chrf", "nll", "exact")])
    means = {
        m: float(np.mean(by_persona[f"{m}_mean"].to_numpy())) if by_persona.num_rows else None
        for m in ("similarity", "chrf", "nll", "exact")
    }
    return {
        "personas": by_persona.num_rows,
        "examples": metrics.num_rows,
        "mean": means,
        "failed": dict(sorted(failed.items())),
    }
