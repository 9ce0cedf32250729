"""Chats: Arrow's way for whole columns and Python's for single rows are one meaning."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.errors import PersonaError
from raymerge.personas import Example, PersonaSource, Turn, from_examples, read_personas
from raymerge.personas.chats import parse_chat, split_chats

said = st.sampled_from(["w1", "w2 w3", "", " ", "é\nü"])
turn = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": said})
answer = st.fixed_dictionaries({"role": st.just("assistant"), "content": said})
chats = st.lists(st.builds(lambda before, last: [*before, last], st.lists(turn, max_size=4), answer), min_size=1)


def as_table(made):
    return pa.chunked_array([pa.array(made[:1]), pa.array(made[1:], pa.array(made[:1]).type)])


def expected(chat):
    prompt, response, turns = parse_chat(chat)
    return {"prompt": prompt, "response": response, "turns": [{"role": t.role, "content": t.content} for t in turns]}


@given(chats)
def test_a_column_means_what_its_chats_mean(made):
    found = split_chats(as_table(made))
    assert pa.table(found).to_pylist() == [expected(chat) for chat in made]


@given(chats)
def test_from_and_value_are_role_and_content(made):
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}
    other = [[{"from": names[t["role"]], "value": t["content"]} for t in chat] for chat in made]
    assert [parse_chat(chat) for chat in other] == [parse_chat(chat) for chat in made]
    assert pa.table(split_chats(as_table(other))).to_pylist() == [expected(chat) for chat in made]


@given(st.lists(st.lists(turn, max_size=3), min_size=1))
def test_a_column_with_a_fault_is_left_to_a_look_at_each_row(made):
    faulty = [chat for chat in made if not chat or chat[-1]["role"] != "assistant"]
    column = pa.chunked_array([pa.array(made, pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))])
    assert (split_chats(column) is None) == bool(faulty)
    for chat in faulty:
        with pytest.raises(ValueError, match="does not end with a turn of the assistant"):
            parse_chat(chat)


def rows(*made):
    return [{"persona": "ann", "split": "train", "messages": chat} for chat in made]


def read(folder, made, **keys):
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return read_personas(PersonaSource(path=str(path), messages="messages", **keys))


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


ONE = chat(("user", "w1"), ("assistant", "w2"))
LONG = chat(("system", "be brief"), ("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4"))


def test_one_turn_is_a_prompt_and_several_keep_their_roles(tmp_path):
    found = read(tmp_path, rows(ONE, LONG, chat(("system", " "), *((t["role"], t["content"]) for t in ONE))))
    before = (Turn("system", "be brief"), Turn("user", "w1"), Turn("assistant", "w2"), Turn("user", "w3"))
    text = "system: be brief\nuser: w1\nassistant: w2\nuser: w3"
    one = Example("ann", "w1", "w2", "train")
    assert found.examples("ann") == (one, Example("ann", text, "w4", "train", before), one)
    assert found == from_examples(found.examples("ann"))
    assert found.digest_of("ann") == from_examples(found.examples("ann")).digest_of("ann")
    assert [e.asked for e in found.examples("ann")] == ["w1", before, "w1"]


def test_turns_count_in_the_digest():
    turns = (Turn("system", "w1"), Turn("user", "w2"))
    plain = from_examples([Example("ann", "system: w1\nuser: w2", "w3", "train")])
    assert plain.digest != from_examples([Example("ann", "system: w1\nuser: w2", "w3", "train", turns)]).digest


def test_parquet_and_lines_agree(tmp_path):
    made = rows(ONE, LONG, ONE)
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "p.parquet")
    table = read_personas(PersonaSource(path=str(tmp_path / "p.parquet"), messages="messages"))
    assert table == read(tmp_path, made)


def test_content_in_parts_of_text_is_joined(tmp_path):
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    found = read(tmp_path, rows(ONE, [{"role": "user", "content": parts}, {"role": "assistant", "content": "w3"}]))
    assert found.examples("ann")[1] == Example("ann", "w1 w2", "w3", "train")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            chat(("assistant", "w1"), ("user", "w2")),
            "does not end with a turn of the assistant: its last turn is the user",
        ),
        ([], "does not end with a turn of the assistant: it has no turn"),
        ("hello", r"is no chat; expected a list of \{role, content\}, found 'hello'"),
        (["hello"], "is no chat"),
        (chat(("narrator", "w1"), ("assistant", "w2")), "turn 1 of an unknown role 'narrator'; known are system, user"),
        ([{"role": "user", "content": None}], "turn 1 without role and content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "turn 1 whose content is not text"),
    ],
)
def test_what_is_no_chat_is_named(tmp_path, bad, message):
    with pytest.raises(PersonaError, match=rf"p.jsonl:2: messages (has a )?.*{message}"):
        read(tmp_path, rows(ONE, bad, ONE))


@pytest.mark.parametrize(
    ("empty", "what"),
    [
        (chat(("user", "w1"), ("assistant", "")), "response"),
        (chat(("user", " "), ("assistant", "w1")), "prompt"),
        (chat(("assistant", "w1")), "prompt"),
        (chat(("user", "w1"), ("assistant", ""), ("user", "w1"), ("assistant", "w1")), "prompt"),
    ],
)
def test_chats_without_text_are_refused_or_left_out(tmp_path, empty, what):
    with pytest.raises(PersonaError, match=f"p.jsonl:2: its {what} is empty"):
        read(tmp_path, rows(ONE, empty))
    assert read(tmp_path, rows(ONE, empty), skip_empty=True) == read(tmp_path, rows(ONE))


def test_a_file_without_the_column_says_which_there_are(tmp_path):
    with pytest.raises(
        PersonaError, match=r"p.jsonl:1: has no messages.\nExpected persona, messages, split; found persona, te"
    ):
        read(tmp_path, [{"persona": "ann", "text": "w1"}])
