"""A router item on a model worker: rows, embeddings and adapters in; a router with its candidates and marker out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from raymerge import storage
from raymerge.adapters import LoraAdapter
from raymerge.adapters.adapter import ModuleHeader
from raymerge.errors import ModelError, RaymergeError, StorageError
from raymerge.manifest import invalidate, is_complete, write_artefact
from raymerge.merging.difference import difference
from raymerge.models.folded import folded
from raymerge.models.router_passes import Experts
from raymerge.models.router_training import Learner, RouterProgress, TrainedRouter, train_router
from raymerge.models.training import GroupProgress
from raymerge.personas import read_personas, render_prompt
from raymerge.routing.router import CONFIG, Candidates, Router, allow, choose, encode_router, find_candidates, scores
from raymerge.routing.router_shape import CANDIDATES, TUNED
from raymerge.runtime.experts import ExpertCache, first_line
from raymerge.runtime.router_inputs import RouterInputs, gather_router_inputs
from raymerge.runtime.tasks import RouterTask
from raymerge.runtime.training import with_example
from raymerge.runtime.training_checkpoints import Checkpoints
from raymerge.runtime.training_progress import ProgressFile

if TYPE_CHECKING:
    from raymerge.models.base import BaseModel


def train_router_to_folder(task: RouterTask, worker: Any) -> dict[str, Any]:
    """Train a task's router unless it is there. One that was interrupted goes on from its last checkpoint.

    The result tells what people should know (`said`), and the seconds of earlier workers that a checkpoint spared this
    one (`spared_s`). The recipe that an older router was tuned to goes when a new one is begun. Raises what
    `gather_router_inputs` and `train_router` raise; a StorageError leaves the marker of the router that is there.
    """
    try:
        inputs = gather_router_inputs(task, read_personas(task.personas), worker.dtype_name)
    except StorageError:  # may pass, and says nothing of the router that is there
        raise
    except RaymergeError:
        invalidate(task.folder)
        raise
    checkpoints = Checkpoints(task.folder, inputs.key)
    if is_complete(task.folder, inputs.key):
        _clear(task, checkpoints)
        return {"skipped": True}
    invalidate(task.folder)
    storage.remove(storage.join(task.folder, TUNED))
    recorder = RouterRecorder(task, inputs, checkpoints)
    candidates = find_candidates(inputs.space, inputs.shape)
    try:
        trained = _train(task, inputs, candidates, worker, recorder)
    except Exception as error:
        ProgressFile(task.folder).remove()  # checkpoints stay: what is tried again goes on from them
        if isinstance(error, ModelError):
            raise with_example(error, inputs.groups) from error
        raise
    files = _files(task, inputs, candidates, trained)
    write_artefact(task.folder, files, _manifest(task, inputs, trained), inputs.key)
    _clear(task, checkpoints)
    return recorder.result()


def _train(
    task: RouterTask, inputs: RouterInputs, candidates: Candidates, worker: Any, recorder: RouterRecorder
) -> TrainedRouter:
    base = worker.base
    learners = [
        Learner(name, *(
            tuple((render_prompt(e.asked, task.prompt_format, base.tokenizer), e.response) for e in part)
            for part in (group.rows, group.validation)
        ))
        for name, group in inputs.groups.items()
    ]  # fmt: skip
    queries, keys = inputs.space.queries, inputs.space.keys
    with _experts(task, inputs, base, worker.cache, recorder.said) as experts:
        return train_router(
            base, learners, queries, keys, candidates, experts, inputs.shape, inputs.settings, recorder,
            recorder.take_state(), experts_bytes=task.experts_bytes,
        )  # fmt: skip


@contextmanager
def _experts(
    task: RouterTask, inputs: RouterInputs, base: BaseModel, cache: ExpertCache, said: Callable[[str], None]
) -> Iterator[Experts]:
    """Experts by number, read module by module, so that none is kept beside those that the model holds. Where all of
    them were started from one adapter, merges measure them from it: so then do these, and the base has it in its
    weights."""

    def opened(number: int) -> LoraAdapter:
        expert = inputs.experts[number]
        return cache.open(expert.name, expert.location, digest=expert.digest, base=task.base)

    if inputs.start is None or base.quantization != "none":
        if inputs.start is not None:
            said(
                f"experts are measured from the base, not from {inputs.start[0]}, which cannot be added to weights in "
                f"{base.quantization}: the scale that is learned fits their merges less well"
            )
        yield Experts(lambda numbers: [opened(number) for number in numbers], lambda number: opened(number).headers)
        return
    anchor = cache.read("anchor", inputs.start[0], digest=inputs.start[1], base=task.base)
    with folded(base, anchor):
        yield Experts(
            lambda numbers: [difference(opened(number), anchor) for number in numbers],
            lambda number: headers_of_difference(opened(number).headers, anchor.headers),
        )


def headers_of_difference(
    own: Mapping[str, ModuleHeader], start: Mapping[str, ModuleHeader]
) -> dict[str, ModuleHeader]:
    """The headers of what `difference` makes of two adapters, by module, from theirs."""
    found = {}
    for path in sorted({*own, *start}):
        parts = [headers[path] for headers in (own, start) if path in headers]
        dtype = reduce(torch.promote_types, [part.dtype for part in parts], torch.float32)
        rank, (outer, inner) = sum(part.rank for part in parts), parts[0].shape
        found[path] = ModuleHeader(rank, inner, outer, 1.0, dtype, rank * (inner + outer) * dtype.itemsize)
    return found


class RouterRecorder:
    """What the training of a router tells, written down: how far it is, and checkpoints. See models' `RouterWatch`."""

    def __init__(self, task: RouterTask, inputs: RouterInputs, checkpoints: Checkpoints) -> None:
        found = checkpoints.newest()
        note: Mapping[str, Any] = {} if found is None else found.note
        self._state = None if found is None else found.state
        self._every_s = float(task.settings["checkpoint_every"])
        self._checkpoints = checkpoints
        self._spared_s = float(note.get("seconds", 0.0))
        self._steps: list[int] = list(note.get("steps", (0, 0)))
        self._started = self._saved = time.monotonic()
        self._progress = ProgressFile(task.folder)
        self._progress.remove()  # that of a worker that was killed
        for text in inputs.notes:
            self.said(text)
        if found is not None:
            self.said(f"goes on from its checkpoint, {self._steps[0]} of {self._steps[1]} steps")

    def take_state(self) -> bytes | None:
        """What the training goes on from, handed over."""
        state, self._state = self._state, None
        return state

    def stepped(self, progress: RouterProgress, tokens: int) -> None:
        """See RouterWatch."""
        self._steps = [progress.step, progress.steps]
        shown = GroupProgress(
            progress.step, progress.steps, progress.epoch, progress.loss, progress.validation, done=False
        )  # fmt: skip
        self._progress.stepped({"network": shown}, tokens)

    def said(self, text: str) -> None:
        """See RouterWatch."""
        self._progress.say(text)

    def due(self) -> bool:
        """See RouterWatch."""
        return time.monotonic() - self._saved >= self._every_s

    def save(self, state: bytes) -> None:
        """See RouterWatch. A checkpoint that cannot be written ends no training."""
        try:
            self._checkpoints.write(
                state, {"steps": self._steps, "seconds": self._spared_s + time.monotonic() - self._started}
            )
        except OSError as error:
            self.said(f"a checkpoint could not be written, training goes on: {first_line(error)}")
        self._saved = time.monotonic()

    def result(self) -> dict[str, Any]:
        """What the driver is told."""
        return {"skipped": False, "said": self._progress.said, "spared_s": self._spared_s}


def _files(
    task: RouterTask, inputs: RouterInputs, candidates: Candidates, trained: TrainedRouter
) -> dict[str, bytes]:  # fmt: skip
    router = Router(inputs.shape, trained.network.cpu(), inputs.mean, trained.scale, trained.layers)
    files = encode_router(router)
    told = {
        "settings": asdict(inputs.settings),
        "held_out": sorted(task.held_out),
        "embedding": task.embedding,
        "anchor": inputs.anchor,
        "history": [{k: v if math.isfinite(v) else None for k, v in epoch.items()} for epoch in trained.history],
        "best_epoch": trained.best_epoch,
    }
    files[CONFIG] = storage.encode_json({**json.loads(files[CONFIG]), **told})
    files[CANDIDATES] = storage.encode_parquet(candidate_table(inputs, candidates, router))
    return files


def candidate_table(inputs: RouterInputs, candidates: Candidates, router: Router) -> pa.Table:
    """One line per persona and candidate, the most similar first: persona, expert, similarity, score, learned, similar.

    learned: the weights that the router gives, before it is tuned. similar: those of `top_k` with the same k and
    temperature. Both float32, summing to 1 over a persona's candidates, 0 where one is not chosen.
    """
    shape, space = router.shape, inputs.space
    near, experts = torch.from_numpy(candidates.near), torch.from_numpy(candidates.experts)
    with torch.no_grad():
        found = scores(
            router.network, torch.from_numpy(space.queries), torch.from_numpy(space.keys), experts, near,
            torch.from_numpy(candidates.same),
        )  # fmt: skip
        allowed = None
        if shape.max_in_degree is not None:
            allowed = torch.from_numpy(allow(found.numpy(), candidates.experts, shape.k, shape.max_in_degree))
        learned = torch.zeros_like(found).scatter_(1, *choose(found, shape.k, shape.weighting, allowed))
        by_similarity = (near / shape.temperature).masked_fill(experts < 0, -torch.inf)
        similar = torch.zeros_like(found).scatter_(1, *choose(by_similarity, shape.k, "softmax"))
    rows, columns = np.nonzero(candidates.experts >= 0)

    def names(values: Sequence[str], numbers: Any) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), pa.array(values, pa.string()))

    return pa.table(
        {
            "persona": names(space.personas, rows),
            "expert": names(space.experts, candidates.experts[rows, columns]),
            "similarity": pa.array(candidates.near[rows, columns]),
            "score": pa.array(found.numpy()[rows, columns]),
            "learned": pa.array(learned.numpy()[rows, columns]),
            "similar": pa.array(similar.numpy()[rows, columns]),
        }
    )


def _manifest(task: RouterTask, inputs: RouterInputs, trained: TrainedRouter) -> dict[str, Any]:
    return {
        "name": "router",
        "personas": [name for name, group in inputs.groups.items() if group.rows],
        "held_out": sorted(task.held_out),
        "experts": {expert.name: expert.digest for expert in inputs.experts},
        "base_digest": task.base_digest,
        "best_epoch": trained.best_epoch,
        "notes": list(inputs.notes),
    }


def _clear(task: RouterTask, checkpoints: Checkpoints) -> None:
    """Nothing of a finished training stays but the router."""
    checkpoints.clear()
    ProgressFile(task.folder).remove()
