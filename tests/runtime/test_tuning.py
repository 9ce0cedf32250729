"""Tuning scores each candidate as the adapter that it stands for would be scored."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raymerge.adapters import LoraAdapter, load_adapter, save_adapter
from raymerge.errors import EvaluationError
from raymerge.manifest import read_manifest
from raymerge.runtime import answering, sources
from raymerge.runtime.experts import merge_to_folder
from raymerge.runtime.tasks import AnswerSource, Candidate, EvaluateTask, Retrieval, TuneTask
from raymerge.runtime.workers import ModelWorker
from tests.runtime.conftest import ENCODER, NAMES, merge_task, source


def tune_task(like: EvaluateTask, candidates: tuple[Candidate, ...], folder: Path, **more: Any) -> TuneTask:
    return TuneTask(
        folder=str(folder), candidates=candidates, personas=like.personas, split="validation",
        generation=like.generation, similarity_model=like.similarity_model, batch_size=like.batch_size,
        base_digest=like.base_digest, **more,
    )  # fmt: skip


def similarities(folder: str) -> dict[str, list[tuple[str, int, float]]]:
    found: dict[str, list[tuple[str, int, float]]] = {}
    for row in pq.read_table(Path(folder, "similarity.parquet")).to_pylist():
        found.setdefault(row["candidate"], []).append((row["persona"], row["example"], row["similarity"]))
    return found


def label(factor: float) -> str:
    return json.dumps({"factor": factor})


@pytest.fixture
def experts(saved: Callable[..., str]) -> dict[str, str]:
    saved("start", 9)
    return {name: saved(name, seed, started_from="adapters/start") for seed, name in enumerate(NAMES)}


@pytest.mark.parametrize(("anchor", "rank"), [("none", "keep"), ("auto", "exact")])
@pytest.mark.parametrize("retrieval", [None, Retrieval(2, "{prompt} {response} ", ENCODER)])
def test_a_candidate_is_scored_as_its_merged_adapter(
    anchor: str, rank: str, retrieval: Retrieval | None, worker: ModelWorker, experts: dict[str, str],
    evaluate_task: EvaluateTask, tmp_path: Path,
) -> None:  # fmt: skip
    """The real merges at scale 0.9 * factor are written, evaluated, and must come to the same similarities."""

    def merges(scale: float) -> dict[str, Any]:
        return {
            name: merge_task(
                f"{name}_{scale}", [(n, place, 0.8 if n == name else 0.1) for n, place in experts.items()], tmp_path,
                scale=scale, rank=rank, anchor=anchor,
            )
            for name in NAMES
        }  # fmt: skip

    shared = tuple(source(name, "merge", task) for name, task in merges(0.9).items())
    factors = (0.3, 1.0, 2.0)
    candidates = tuple(Candidate(label(factor), shared, factor) for factor in factors)
    task = tune_task(evaluate_task, candidates, tmp_path / "tuning", retrieval=retrieval, most=1)
    assert worker.tune(task) == {"skipped": False, "failed": {}, "candidates": 3, "dropped": 0}
    found = similarities(task.folder)
    assert list(found) == [label(factor) for factor in factors]
    for factor in factors:
        real = merges(0.9 * factor)
        for one in real.values():
            merge_to_folder(one, worker.cache)
        evaluation = replace(
            evaluate_task, folder=str(tmp_path / f"real_{factor}"), split="validation", retrieval=retrieval, most=1,
            sources=tuple(AnswerSource(name, "adapter", location=one.folder) for name, one in real.items()),
        )  # fmt: skip
        worker.evaluate(evaluation)
        wanted = pq.read_table(Path(evaluation.folder, "metrics.parquet")).to_pylist()
        assert found[label(factor)] == [(r["persona"], r["example"], r["similarity"]) for r in wanted]
    assert len({tuple(rows) for rows in found.values()}) == 3


def test_scales_share_a_merge_and_equal_questions_an_answer(
    worker: ModelWorker, experts: dict[str, str], evaluate_task: EvaluateTask, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    built: list[str] = []
    asked: list[int] = []
    build, generate = sources.build, answering.generate
    monkeypatch.setattr(sources, "build", lambda task, *rest: built.append(task.name) or build(task, *rest))
    monkeypatch.setattr(answering, "generate", lambda b, a, p, *rest: asked.append(len(p)) or generate(b, a, p, *rest))
    one = merge_task("one", [("a", experts["ada"], 1.0)], tmp_path, scale=1.2)
    other = merge_task("other", [("a", experts["ada"], 0.5)], tmp_path)
    groups = [tuple(source(name, "merge", replace(task, folder=f"/{name}")) for name in NAMES) for task in (one, other)]
    again = tuple(source(name, "merge", replace(one, name="again")) for name in NAMES)
    candidates = (
        Candidate("a", groups[0], 1.0), Candidate("b", groups[1], 1.0), Candidate("c", groups[0], 1.5),
        Candidate("d", again, 1.5), Candidate("e", tuple(AnswerSource(name, "base") for name in NAMES), 7.0),
    )  # fmt: skip
    task = tune_task(evaluate_task, candidates, tmp_path / "tuning")
    worker.tune(task)
    assert built == ["one", "other"]
    assert asked == [12, 6, 6]
    found = similarities(task.folder)
    assert found["c"] == found["d"]
    assert [len(found[c]) for c in "abcde"] == [6] * 5


def test_who_fails_once_is_left_out_everywhere_and_named(
    worker: ModelWorker, experts: dict[str, str], evaluate_task: EvaluateTask, tmp_path: Path
) -> None:
    narrow = LoraAdapter("n", {p: replace(m, A=m.A[:, :5]) for p, m in load_adapter(experts["ada"]).modules.items()})
    save_adapter(narrow, str(tmp_path / "narrow"))
    whole = tuple(source(name, "adapter", place) for name, place in experts.items())
    torn = tuple(replace(one, location="/nowhere") if one.persona == "bob" else one for one in whole)
    task = tune_task(evaluate_task, (Candidate("a", whole), Candidate("b", torn)), tmp_path / "tuning")
    result = worker.tune(task)
    assert result["failed"].keys() == {"bob"}
    manifest = read_manifest(task.folder)
    assert manifest is not None
    assert manifest["failed"] == result["failed"]
    found = similarities(task.folder)
    assert {persona for rows in found.values() for persona, _, _ in rows} == {"ada", "cyd"}
    assert [len(rows) for rows in found.values()] == [4, 4]
    assert manifest["bytes"]["a"] == sum(load_adapter(experts[name]).nbytes for name in ("ada", "cyd")) / 2
    assert worker.tune(task) == {"skipped": True, "failed": result["failed"]}
    other_base = (replace(whole[0], location=str(tmp_path / "narrow")), *whole[1:])
    result = worker.tune(replace(task, candidates=(Candidate("a", whole), Candidate("b", other_base))))
    assert "the model's is" in result["failed"]["ada"]
    found = similarities(task.folder)
    assert {persona for rows in found.values() for persona, _, _ in rows} == {"bob", "cyd"}


def test_what_decides_the_answers_decides_whether_they_are_there(
    worker: ModelWorker, experts: dict[str, str], evaluate_task: EvaluateTask, tmp_path: Path,
    saved: Callable[..., str],
) -> None:  # fmt: skip
    own = tuple(source(name, "adapter", place) for name, place in experts.items())
    candidates = (Candidate("a", own, 1.0), Candidate("b", own, 1.4))
    task = tune_task(evaluate_task, candidates, tmp_path / "tuning")
    assert not worker.tune(task)["skipped"]
    assert worker.tune(task)["skipped"]
    assert not worker.tune(replace(task, candidates=(candidates[0], replace(candidates[1], factor=1.5))))["skipped"]
    assert not worker.tune(replace(task, most=1))["skipped"]
    saved("ada", 77)
    assert not worker.tune(replace(task, most=1))["skipped"]
    assert worker.tune(replace(task, most=1))["skipped"]


def test_candidates_that_cannot_be_compared_are_refused(
    worker: ModelWorker, evaluate_task: EvaluateTask, tmp_path: Path
) -> None:
    base = tuple(AnswerSource(name, "base") for name in NAMES)
    for wrong, said in (
        ((), "the candidates are none"),
        ((Candidate("a", base), Candidate("a", base, 2.0)), "the candidates are a, a"),
        ((Candidate("a", base), Candidate("b", base[:2])), "different personas"),
    ):
        with pytest.raises(EvaluationError, match=said):
            worker.tune(tune_task(evaluate_task, wrong, tmp_path / "tuning"))


@pytest.mark.parametrize("anchor", ["none", "auto"])
@pytest.mark.parametrize("widest", [5, 20])  # 20 and 3 are more than the 16 rows of a module
def test_bytes_and_contributors_are_those_of_what_would_be_published(
    anchor: str,
    widest: int,
    worker: ModelWorker,
    saved: Callable[..., str],
    evaluate_task: EvaluateTask,
    tmp_path: Path,
) -> None:
    """Bytes of the real merges, written and read again."""
    saved("start", 9, rank=1)
    a, b = (saved(name, r, rank=r, started_from="adapters/start") for name, r in (("a", widest), ("b", 3)))
    parts = {"ada": [("a", a, 0.6), ("b", b, 0.3)], "bob": [("a", a, 2.0)], "cyd": [("a", a, 0.5), ("b", b, 0.5)]}
    wanted: dict[str, float] = {"base": 0, "own": load_adapter(b).nbytes}
    candidates = [Candidate("base", tuple(AnswerSource(name, "base") for name in NAMES))]
    candidates.append(Candidate("own", tuple(source(name, "adapter", b) for name in NAMES)))
    for rank in ("exact", 2, {"energy": 0.9}):
        merges = {n: merge_task(f"{n}-{rank}", p, tmp_path, rank=rank, anchor=anchor) for n, p in parts.items()}
        kind = "mixture" if rank == "exact" else "merge"
        candidates.append(Candidate(str(rank), tuple(source(n, kind, task) for n, task in merges.items())))
        for one in merges.values():
            merge_to_folder(one, worker.cache)
        wanted[str(rank)] = sum(load_adapter(one.folder).nbytes for one in merges.values()) / 3
    task = tune_task(evaluate_task, tuple(candidates), tmp_path / "tuning")
    worker.tune(task)
    manifest = read_manifest(task.folder)
    assert manifest is not None
    assert manifest["bytes"] == pytest.approx(wanted)
    five_thirds = pytest.approx(5 / 3)
    assert manifest["experts"] == {
        "base": 0,
        "own": 1,
        "exact": five_thirds,
        "2": five_thirds,
        "{'energy': 0.9}": five_thirds,
    }
