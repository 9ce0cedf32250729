"""An evaluation item on a model worker: answers are generated and scored in one go, and only figures go back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raymerge import storage
from raymerge.errors import EvaluationError
from raymerge.evaluation.metrics import chrf, exact_match, similarity
from raymerge.manifest import content_digest, invalidate, is_complete, read_manifest, write_artefact
from raymerge.personas import Example
from raymerge.runtime.answering import Prompter, answer, gather_questions, numbered
from raymerge.runtime.sources import load_sources, source_digests
from raymerge.runtime.tasks import EvaluateTask, GatherTask


def evaluate_to_folder(task: EvaluateTask, worker: Any) -> dict[str, Any]:
    """Answer and score a part of a run's personas unless the result is there. A persona whose adapter cannot be had is
    named in the result; the others are scored."""
    questions = gather_questions(task, [s.persona for s in task.sources], worker.dtype_name)
    digests, failed = source_digests(task.sources)
    key = storage.digest_value({"sources": digests, **questions.key})
    known = read_manifest(task.folder)
    if known is not None and is_complete(task.folder, key) and known["failed"] == failed:  # a read may succeed now
        return {"skipped": True, "failed": failed}
    invalidate(task.folder)
    usable = [s for s in task.sources if s.persona not in failed]
    new_tokens = task.generation["max_new_tokens"]
    resident, unread = load_sources(usable, worker.cache, worker.base.model, new_tokens)
    failed = {**failed, **unread}
    rows = [e for s in task.sources if s.persona in resident.answerers for e in questions.examples[s.persona]]
    prompts = Prompter(questions, rows, worker).prompts(range(len(rows)), resident.taken)
    answerers = [resident.answerers[e.persona] for e in rows]
    answers, nll = answer(task, worker.base, resident, answerers, prompts.texts, [e.response for e in rows])
    tables = _score(task, worker, rows, answers, nll)
    files = {f"{name}.parquet": storage.encode_parquet(table) for name, table in tables.items()}
    manifest: dict[str, Any] = {"failed": dict(sorted(failed.items()))}
    if task.retrieval is not None:
        manifest["retrieval"] = {"examples": prompts.examples, "dropped": prompts.dropped}
    write_artefact(task.folder, files, manifest, key)
    return {"skipped": False, "failed": failed, "answers": len(rows), "dropped": prompts.dropped}


def _score(
    task: EvaluateTask, worker: Any, rows: Sequence[Example], answers: Sequence[str], nll: np.ndarray[Any, Any]
) -> dict[str, Any]:
    references = [e.response for e in rows]
    numbers = pa.array(numbered(rows), pa.int32())
    where = {"persona": pa.array([e.persona for e in rows], pa.string()), "example": numbers}
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
    retrieved: Counter[str] = Counter()
    tables: dict[str, list[Any]] = {"metrics": [], "generations": []}
    for part in task.parts:
        manifest = read_manifest(part)
        if manifest is None:
            raise EvaluationError(f"{part}: is not there, so the run cannot be summed up.\nIts own failure says why.")
        failed |= manifest["failed"]
        retrieved.update(manifest.get("retrieval", {}))
        for name, found in tables.items():
            found.append(storage.read_parquet(storage.join(part, f"{name}.parquet")))
    joined = {name: pa.concat_tables(found).combine_chunks() for name, found in tables.items()}
    files = {f"{name}.parquet": storage.encode_parquet(table) for name, table in joined.items()}
    files["summary.json"] = storage.encode_json(_summary(joined["metrics"], failed, retrieved))
    write_artefact(task.folder, files, {}, key)
    return {"skipped": False, "personas_failed": len(failed)}


def _summary(metrics: Any, failed: Mapping[str, str], retrieved: Mapping[str, int]) -> dict[str, Any]:
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
        **({"retrieval": dict(retrieved)} if retrieved else {}),
    }
