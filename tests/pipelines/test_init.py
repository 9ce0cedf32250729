"""`raymerge init`: what it makes of examples that lie beside the adapters."""

import json
from pathlib import Path

import pytest
import yaml

from raymerge.config import load_project
from raymerge.personas import read_personas, source_of
from raymerge.pipelines.init import init
from raymerge.pipelines.opening import open_project
from tests.pipelines.conftest import NAMES

CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


def write(path: Path, rows) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def written(location: str):
    return yaml.safe_load(Path(location).read_text()).get("personas")


def test_a_file_of_chats_is_mapped_and_can_be_opened(adapters):
    rows = [{"user_id": n, "messages": CHAT, "split": s} for n in (*NAMES, "new") for s in ("train", "dev", "test")]
    write(adapters / "conversations.jsonl", rows)
    location, lines = init(str(adapters))
    assert written(location) == {
        "path": "conversations.jsonl",
        "persona": "user_id",
        "messages": "messages",
        "split": {"validation": ["dev"]},
    }
    assert "examples in conversations.jsonl: 7 personas (6 with an adapter), 7 train, 7 validation, 7 test" in lines
    opened = open_project(location)
    assert opened.names == tuple(sorted((*NAMES, "new")))
    assert opened.personas == read_personas(source_of(load_project(location)))


@pytest.mark.parametrize("name", ["personas.jsonl", "personas/part-0.jsonl"])
def test_our_own_names_need_no_mapping(adapters, name):
    row = {"persona": "p0", "prompt": "w1", "response": "w2", "split": "train"}
    write(adapters / name, [row])
    write(adapters / "other.jsonl", [row])  # the name decides
    location, _ = init(str(adapters))
    assert written(location) == name.split("/")[0]
    assert open_project(location).names == ("p0",)


def test_what_is_not_known_is_said(adapters):
    write(adapters / "personas.jsonl", [{"who": "p0", "text": "w1"}])
    location, lines = init(str(adapters))
    assert written(location) == "personas.jsonl"
    assert lines[-1] == "examples in personas.jsonl: its columns are not known; docs/data.md says how to name them"


def test_two_files_are_not_chosen_between(adapters):
    for name in ("a.jsonl", "b.jsonl"):
        write(adapters / name, [{"user": "p0", "question": "w1", "answer": "w2"}])
    location, lines = init(str(adapters))
    assert written(location) is None
    assert lines[-1] == "examples in a.jsonl, b.jsonl: give one as `personas`"


def test_files_of_something_else_are_left_alone(adapters):
    write(adapters / "prompts.jsonl", [{"prompt": "w1"}])
    location, lines = init(str(adapters))
    assert written(location) is None
    assert lines[-1] == "no personas file: routed by the adapters' deltas"


def test_what_cannot_be_read_is_said_with_its_line(adapters):
    write(adapters / "personas.jsonl", [{"persona": "p0", "prompt": "w1", "response": "", "split": "train"}])
    location, lines = init(str(adapters))
    assert written(location) == "personas.jsonl"
    assert lines[-1] == f"{adapters}/personas.jsonl:1: its response is empty."


def test_examples_left_out_are_said_at_opening(adapters):
    row = {"persona": "p0", "prompt": "w1", "response": "w2", "split": "train"}
    write(adapters / "personas.jsonl", [row, {**row, "response": ""}])
    location, _ = init(str(adapters))
    value = yaml.safe_load(Path(location).read_text())
    value["personas"] = {"path": "personas.jsonl", "skip_empty": True}
    Path(location).write_text(yaml.safe_dump(value))
    assert f"{adapters}/personas.jsonl: 1 examples without text are left out" in open_project(location).notes
