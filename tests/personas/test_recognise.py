"""What `raymerge init` makes of files under the names that are usual elsewhere."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raymerge.personas import PersonaSource, read_personas, recognise

ASKED = ["why?", "how?", "when?", "who?"]
RANDOM = {"by": "random", "seed": 0, "validation": 0.2, "test": 0.2}


def write(folder, rows, name="p.jsonl"):
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def pairs(persona, prompt, response, **more):
    return [{persona: "ann", prompt: asked, response: "so.", **more} for asked in ASKED]


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
@pytest.mark.parametrize(
    ("rows", "keys", "notes"),
    [
        (pairs("persona", "prompt", "response", split="train"), {}, ()),
        (
            pairs("user_id", "question", "answer", split="train"),
            {"persona": "user_id", "prompt": "question", "response": "answer"},
            (),
        ),
        (
            pairs("persona_id", "input", "target"),
            {"persona": "persona_id", "prompt": "input", "response": "target", "split": RANDOM},
            ("no column split: made by random",),
        ),
        (
            pairs("persona", "instruction", "output", input="", split="dev"),
            {"prompt": "instruction", "response": "output", "split": {"validation": ["dev"]}},
            ("column input, beside instruction, is not read: join them into one column if it matters",),
        ),
        (
            pairs("persona", "prompt", "response", created_at="2024-01-01"),
            {"split": {"by": "time", "column": "created_at", "validation": 0.2, "test": 0.2}},
            ("no column split: made by time",),
        ),
        (
            pairs("persona", "prompt", "response", split="held-out"),
            {},
            ("split 'held-out' is none that is known (1 such)",),
        ),
    ],
)
def test_usual_names_are_mapped(tmp_path, rows, keys, notes, name):
    found = recognise(write(tmp_path, rows, name))
    assert (found.keys, found.notes) == (keys, notes)


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_what_is_recognised_can_be_read(tmp_path, name):
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]
    splits = ["Train", "training", "val", "valid", "test"]
    path = write(tmp_path, [{"user": "ann", "messages": chat, "split": split} for split in splits], name)
    found = recognise(path)
    assert found.keys == {
        "persona": "user",
        "messages": "messages",
        "split": {"train": ["Train", "training"], "validation": ["val", "valid"]},
    }
    read = read_personas(PersonaSource(path=path, **found.keys))
    assert read.counts() == {"ann": {"train": 2, "validation": 2, "test": 1}}


@pytest.mark.parametrize("row", [{"a": 1}, {"persona": "ann"}, {"prompt": "a", "response": "b"}, ["no object"]])
def test_other_files_are_not(tmp_path, row):
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    assert recognise(str(tmp_path / "p.jsonl")) is None


def test_broken_lines_end_the_look(tmp_path):
    (tmp_path / "p.jsonl").write_text("{")
    assert recognise(str(tmp_path / "p.jsonl")) is None
