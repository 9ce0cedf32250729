"""Examples under other names, as chats, are the same examples to every job."""

import json
from pathlib import Path

import pyarrow.parquet as pq

from raymerge.pipelines.evaluate import evaluate
from raymerge.pipelines.train import train
from tests.pipelines.test_pipelines import change

NAMES = {"train": "training", "validation": "dev", "test": "test"}


def as_chats(rows):
    return [
        {
            "user_id": row["persona"],
            "part": NAMES[row["split"]],
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ],
        }
        for row in rows
    ]


def test_mapped_chats_repeat_no_work(project, capsys):
    folder = Path(project).parent
    assert train(project, group_by="unified", local=True) == 0
    assert evaluate(project, recipes=["own"], local=True) == 0
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    scored = (folder / "runs/own/evaluation_in_memory/manifest.json").stat().st_mtime_ns
    rows = [json.loads(line) for line in (folder / "personas.jsonl").read_text().splitlines()]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in as_chats(rows)))
    mapping = {
        "path": "chats.jsonl",
        "persona": "user_id",
        "messages": "messages",
        "split": {"column": "part", "train": "training", "validation": "dev"},
    }
    change(project, personas=mapping)
    (folder / "personas.jsonl").unlink()
    assert train(project, group_by="unified", local=True) == 0
    assert evaluate(project, recipes=["own"], local=True) == 0
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")} == before
    assert (folder / "runs/own/evaluation_in_memory/manifest.json").stat().st_mtime_ns == scored


def test_turns_of_a_chat_are_trained_and_answered(project, capsys):
    folder = Path(project).parent
    rows = [json.loads(line) for line in (folder / "personas.jsonl").read_text().splitlines()]
    chats = as_chats(rows)
    for chat in chats:
        chat["messages"].insert(0, {"role": "system", "content": "w9"})
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    split = {"column": "part", "train": "training", "validation": "dev"}
    change(project, personas={"path": "chats.jsonl", "persona": "user_id", "messages": "messages", "split": split})
    assert train(project, group_by="unified", local=True) == 0
    assert evaluate(project, recipes=["own"], local=True) == 0
    answered = pq.read_table(folder / "runs/own/evaluation_in_memory/generations.parquet").to_pylist()
    tested = [row for row in rows if row["split"] == "test"]
    assert [a["prompt"] for a in answered] == [f"system: w9\nuser: {row['prompt']}" for row in tested]
    assert [a["reference"] for a in answered] == [row["response"] for row in tested]
