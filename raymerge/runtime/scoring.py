"""An evaluation item on a model worker: answers are generated and scored in one go, and only figures go back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raymerge import storage
from raymerge.errors import EvaluationError
from raymerge.evaluation.metrics import chrf, exact_match, similarity
from raymerge.manifest import content_digest, invalidate, is_complete, read_manifest, write_artefact
from raymerge.models.generation import GenerationSettings, generate, score_references
from raymerge.models.multilora import MultiLora
from raymerge.personas import Example, read_personas, render_prompt
from raymerge.runtime.sources import Resident, load_sources, source_digests
from raymerge.runtime.tasks import EvaluateTask, GatherTask


def evaluate_to_folder(task: EvaluateTask, worker: Any) -> dict[str, Any]:
    """Answer and score a part of a run's personas unless the result is there. A persona whose adapter cannot be had is
    named in the result; the others are scored."""
    everybody = read_personas(task.personas)
    examples = {s.persona: everybody.examples(s.persona, task.split) for s in task.sources}
    digests, failed = source_digests(task.sources)
    key = storage.digest_value(
        {
            "sources": digests,
            "examples": {p: [e.content for e in rows] for p, rows in examples.items()},
            "generation": dict(task.generation),
            "similarity_model": task.similarity_model,
            "batch_size": task.batch_size,
            "base": task.base_digest,
            "dtype": worker.dtype_name,
        }
    )
    known = read_manifest(task.folder)
    if known is not None and is_complete(task.folder, key) and known["failed"] == failed:  # a read may succeed now
        return {"skipped": True, "failed": failed}
    invalidate(task.folder)
    usable = [s for s in task.sources if s.persona not in failed]
    resident, unread = load_sources(usable, worker.cache, worker.base.model)
    failed = {**failed, **unread}
    rows = [e for s in task.sources if s.persona in resident.weights for e in examples[s.persona]]
    answers, nll = _answer(task, worker.base, resident, rows)
    tables = _score(task, worker, rows, answers, nll)
    files = {f"{name}.parquet": storage.encode_parquet(table) for name, table in tables.items()}
    write_artefact(task.folder, files, {"failed": dict(sorted(failed.items()))}, key)
    return {"skipped": False, "failed": failed, "answers": len(rows)}


def _answer(
    task: EvaluateTask, base: Any, resident: Resident, rows: Sequence[Example]
) -> tuple[list[str], np.ndarray[Any, Any]]:
    settings = GenerationSettings(max_new_tokens=task.generation["max_new_tokens"], stop=tuple(task.generation["stop"]))
    prompts = [render_prompt(e.asked, task.generation["prompt_format"], base.tokenizer) for e in rows]
    references = [e.response for e in rows]
    chosen = resident.choose([e.persona for e in rows])
    lora = MultiLora(base.model) if resident.adapters else None
    try:
        if lora is not None:
            lora.load(resident.adapters)
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
    where = {"persona": pa.array([e.persona for e in rows], pa.string()), "example": pa.array(numbers, pa.int32())}
    metrics = {
        "similarity": pa.array(similarity(worker.encoder(task.similarity_model), answers, references), pa.float32()),
        "chrf": pa.array(chrf(answers, references), pa.float32()),
        "nll": pa.array(nll, pa.float32()),
        "exact": pa.array(exact_match(answers, references), pa.bool_()),
    }
    texts = {"prompt": [e.prompt for e in rows], "reference": references, "generated": list(answers)}
    columns = {name: pa.array(values, pa.string()) for name, values in texts.items()}
    return {"metrics": pa.table({**where, **metrics}), "generations": pa.table({**where, **columns})}


def gather(task: GatherTask) -> dict[str, Any]:
    """Join the parts of an evaluation; personas that no part could answer are named in `summary.json`."""
    key = storage.digest_value([content_digest(part) for part in task.parts])
    if is_complete(task.folder, key):
        return {"skipped": True}
    invalidate(task.folder)
    failed: dict[str, str] = {}
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
