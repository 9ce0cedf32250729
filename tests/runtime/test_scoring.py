"""An evaluation item: who answers what, what is left out, and how parts are joined."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raymerge import storage
from raymerge.runtime.scoring import gather
from raymerge.runtime.tasks import AnswerSource, EvaluateTask, GatherTask, PrefixTask, Retrieval, TrainGroup
from raymerge.runtime.workers import ModelWorker
from tests.runtime.conftest import ENCODER, NAMES, merge_task, source
from tests.runtime.test_prefix import TRAINING


def rows(folder: str, name: str = "metrics") -> list[dict[str, Any]]:
    return list(pq.read_table(Path(folder, f"{name}.parquet")).to_pylist())


def test_the_first_examples_are_scored_as_they_are_among_all(
    worker: ModelWorker, evaluate_task: EvaluateTask, tmp_path: Path
) -> None:
    worker.evaluate(evaluate_task)
    whole = rows(evaluate_task.folder)
    assert [row["example"] for row in whole] == [0, 1, 2] * 3
    for most, kept in ((1, 1), (2, 2), (9, 3)):
        part = replace(evaluate_task, folder=str(tmp_path / f"most_{most}"), most=most)
        worker.evaluate(part)
        assert rows(part.folder) == [
            {**row, "nll": pytest.approx(row["nll"], rel=1e-5)} for row in whole if row["example"] < kept
        ]


def test_each_persona_is_answered_by_its_own_source(
    worker: ModelWorker, evaluate_task: EvaluateTask, saved: Callable[..., str], tmp_path: Path
) -> None:
    """Adapter, prefix, base, merge and mixture in one item answer as each does in an item of its own."""
    prefix = str(tmp_path / "prefix")
    worker.train_prefixes(
        PrefixTask(
            (TrainGroup("bob", prefix, ("bob",)),),
            4,
            evaluate_task.personas,
            TRAINING,
            "{prompt}",
            "b",
            prefix + "-item",
        )
    )
    merged = merge_task("m", [("a", saved("a", 1), 0.5), ("b", saved("b", 2), 0.5)], tmp_path, rank="exact")
    own = source("ada", "adapter", saved("own", 3))
    for number, sources in enumerate((
        (own, source("bob", "prefix", prefix), AnswerSource("cyd", "base")),
        (source("ada", "merge", merged), source("bob", "prefix", prefix), source("cyd", "mixture", merged)),
    )):  # fmt: skip
        together = replace(evaluate_task, folder=str(tmp_path / f"together_{number}"), sources=sources)
        worker.evaluate(together)
        alone: list[dict[str, Any]] = []
        for one in sources:
            task = replace(evaluate_task, folder=str(tmp_path / "alone"), sources=(one,))
            worker.evaluate(task)
            alone += rows(task.folder)
        found = rows(together.folder)
        assert [(r["persona"], r["similarity"]) for r in found] == [(r["persona"], r["similarity"]) for r in alone]
        assert [r["nll"] for r in found] == pytest.approx([r["nll"] for r in alone], rel=1e-4)


def test_parts_are_joined_with_what_failed_and_what_was_dropped(
    worker: ModelWorker, evaluate_task: EvaluateTask, tmp_path: Path
) -> None:
    retrieval = Retrieval(6, "{prompt} {response} " + "w1 " * 20, ENCODER)
    parts = []
    for number, name in enumerate(NAMES):
        one = AnswerSource(name, "base") if name != "bob" else AnswerSource(name, "adapter", location="/nowhere")
        task = replace(evaluate_task, folder=str(tmp_path / str(number)), sources=(one,), retrieval=retrieval)
        result = worker.evaluate(task)
        parts.append(task.folder)
        assert result["dropped"] == (6 if name == "ada" else 0)
    gather(GatherTask(str(tmp_path / "joined"), tuple(parts)))
    summary = storage.read_json(str(tmp_path / "joined" / "summary.json"))
    assert summary["personas"] == 2
    assert summary["failed"].keys() == {"bob"}
    assert summary["retrieval"] == {"examples": 12, "dropped": 6}
    assert [row["persona"] for row in rows(str(tmp_path / "joined"))] == ["ada"] * 3 + ["cyd"] * 3
