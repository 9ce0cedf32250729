"""A tuning item on a model worker: candidates answer the same validation examples, and only similarities go back.

No adapter is written. What candidates have in common is merged once: a factor f is the weight of a mixture, and what
has an anchor is answered as anchor + f (own - anchor), of adapters that are used as they are too: at any factor but 1
these are published as such a merge. Nothing is compressed for f: at rank `keep` the merge loses a part of it, since
adapter and anchor together have more rank than the adapter; at rank `exact`, or without an anchor, it loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pyarrow as pa

from raymerge import storage
from raymerge.errors import EvaluationError
from raymerge.evaluation.metrics import similarity
from raymerge.manifest import invalidate, is_complete, read_manifest, write_artefact
from raymerge.personas import Example
from raymerge.runtime.answering import Prompter, answer, gather_questions, numbered
from raymerge.runtime.sources import Answerer, Resident, load_sources, source_digests
from raymerge.runtime.tasks import AnswerSource, Candidate, TuneTask

TABLE = "similarity.parquet"


@dataclass(frozen=True)
class Shared:
    """Candidates with equal sources, whatever their factors. digests, failed: as of `source_digests`."""

    sources: tuple[AnswerSource, ...]
    digests: Mapping[str, Any]
    failed: Mapping[str, str]
    candidates: list[Candidate]


def tune_to_folder(task: TuneTask, worker: Any) -> dict[str, Any]:
    """Write `similarity.parquet` (candidate, persona, example, similarity) unless it is there, and in the manifest, for
    each candidate by its label, means over personas: `bytes` of what would be published at factor 1, `experts` that
    contribute.

    A persona for whom a candidate cannot be had is named and left out of all, so that all are compared on the same
    examples. Raises EvaluationError if two candidates have one label, or speak of different personas.
    """
    _check(task.candidates)
    names = [source.persona for source in task.candidates[0].sources]
    questions = gather_questions(task, names, worker.dtype_name)
    groups = share(task.candidates)
    failed = {name: why for group in reversed(groups) for name, why in group.failed.items()}
    digests = {c.label: [c.factor, group.digests] for group in groups for c in group.candidates}
    key = storage.digest_value({"candidates": digests, **questions.key})
    known = read_manifest(task.folder)
    if known is not None and is_complete(task.folder, key) and known["failed"] == failed:
        return {"skipped": True, "failed": failed}
    invalidate(task.folder)
    rows = [e for name in names if name not in failed for e in questions.examples[name]]
    prompter = Prompter(questions, rows, worker)
    found: dict[str, list[float]] = {}
    answerers: dict[str, Mapping[str, Answerer]] = {}
    dropped = 0
    for group in groups:
        usable = [source for source in group.sources if source.persona not in failed]
        new_tokens = task.generation["max_new_tokens"]
        resident, unread = load_sources(usable, worker.cache, worker.base.model, new_tokens, anchors=True)
        failed |= unread
        scored, left_out = _try(task, worker, group.candidates, resident, rows, prompter)
        found |= scored
        answerers |= {candidate.label: resident.answerers for candidate in group.candidates}
        dropped = max(dropped, left_out)
    table = _table(task.candidates, rows, found, failed)
    manifest: dict[str, Any] = {"failed": dict(sorted(failed.items()))}
    kept = [name for name in names if name not in failed]
    for figure, of in (("bytes", "nbytes"), ("experts", "experts")):
        manifest[figure] = {
            c.label: fmean(getattr(answerers[c.label][name], of) for name in kept) for c in task.candidates if kept
        }
    if task.retrieval is not None:
        manifest["retrieval"] = {"dropped": dropped}
    write_artefact(task.folder, {TABLE: storage.encode_parquet(table)}, manifest, key)
    return {"skipped": False, "failed": failed, "candidates": len(task.candidates), "dropped": dropped}


def share(candidates: Sequence[Candidate]) -> list[Shared]:
    """Candidates by what answers in them, in the order in which that first occurs."""
    groups: list[Shared] = []
    for candidate in candidates:
        same = next((g for g in groups if g.sources == candidate.sources), None)
        if same is None:
            digests, failed = source_digests(candidate.sources, anchors=True)
            same = next((g for g in groups if (g.digests, g.failed) == (digests, failed)), None)
            if same is None:
                same = Shared(candidate.sources, digests, failed, [])
                groups.append(same)
        same.candidates.append(candidate)
    return groups


def _check(candidates: Sequence[Candidate]) -> None:
    labels = [candidate.label for candidate in candidates]
    if not labels or len(set(labels)) < len(labels):
        raise EvaluationError(f"tuning: the candidates are {', '.join(labels) or 'none'}.\nEach needs its own label.")
    personas = {tuple(source.persona for source in candidate.sources) for candidate in candidates}
    if len(personas) > 1:
        raise EvaluationError("tuning: candidates speak of different personas.\nAll must have a source for each.")


def _try(
    task: TuneTask,
    worker: Any,
    candidates: Sequence[Candidate],
    resident: Resident,
    rows: Sequence[Example],
    prompter: Prompter,
) -> tuple[dict[str, list[float]], int]:
    """Similarity of each candidate's answers to rows, NaN where nothing answers; and the examples that were dropped.

    Candidates that come to the same weights for a persona have one answer.
    """
    there = [i for i, row in enumerate(rows) if row.persona in resident.answerers]
    places: dict[Any, int] = {}
    asked: list[tuple[int, Answerer]] = []
    of_candidate: dict[str, list[int]] = {}
    for candidate in candidates:
        own = of_candidate.setdefault(candidate.label, [])
        for i in there:
            answerer = resident.answerers[rows[i].persona].scaled(candidate.factor)
            place = places.setdefault((i, tuple(sorted(answerer.weights.items())), answerer.prefix), len(asked))
            if place == len(asked):
                asked.append((i, answerer))
            own.append(place)
    numbers = [i for i, _ in asked]
    prompts = prompter.prompts(there, resident.taken)
    text_of = dict(zip(there, prompts.texts, strict=True))
    answers, _ = answer(task, worker.base, resident, [one for _, one in asked], [text_of[i] for i in numbers])
    figures = similarity(worker.encoder(task.similarity_model), answers, [rows[i].response for i in numbers]).tolist()
    found = {}
    for label, own in of_candidate.items():
        found[label] = [float("nan")] * len(rows)
        for i, place in zip(there, own, strict=True):
            found[label][i] = figures[place]
    return found, prompts.dropped


def _table(
    candidates: Sequence[Candidate],
    rows: Sequence[Example],
    found: Mapping[str, Sequence[float]],
    failed: Mapping[str, str],
) -> Any:
    kept = [i for i, row in enumerate(rows) if row.persona not in failed]
    many = len(candidates)
    columns = {
        "candidate": pa.array([c.label for c in candidates for _ in kept], pa.string()),
        "persona": pa.array([rows[i].persona for i in kept] * many, pa.string()),
        "example": pa.array(numbered([rows[i] for i in kept]) * many, pa.int32()),
        "similarity": pa.array([found[c.label][i] for c in candidates for i in kept], pa.float32()),
    }
    return pa.table(columns)
