"""Reading examples: what is kept, what is refused and where the fault is said to be."""

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.errors import PersonaError
from raymerge.personas import SPLITS, Example, PersonaSource, from_examples, read_personas

text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8).filter(str.strip)
examples = st.lists(
    st.builds(Example, st.sampled_from(["ann", "bob", "Zoe", "9"]), text, text, st.sampled_from(SPLITS))
)


def write_lines(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(**changes: object) -> dict[str, object]:
    return {"persona": "ann", "prompt": "why?", "response": "so.", "split": "train", **changes}


@given(examples.filter(bool))
def test_both_formats_keep_every_example_and_the_order_of_the_file(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("personas")
    rows = [vars(e) for e in made]
    lines = read_personas(write_lines(folder / "p.jsonl", rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "p.parquet")
    table = read_personas(str(folder / "p.parquet"))
    assert lines == table
    assert lines.digest == table.digest == from_examples(made).digest
    assert lines.names == tuple(sorted({e.persona for e in made}))
    for name in lines.names:
        assert lines.examples(name) == tuple(e for e in made if e.persona == name)
        for split in SPLITS:
            expected = tuple(e for e in made if e.persona == name and e.split == split)
            assert lines.examples(name, split) == expected
            assert lines.counts()[name][split] == len(expected)
            assert (name in lines.missing(split)) == (not expected)
    assert pickle.loads(pickle.dumps(lines)) == lines


def test_digest_of_one_persona_ignores_the_others(tmp_path):
    ann, bob = Example("ann", "a", "b", "train"), Example("bob", "a", "b", "train")
    changed = Example("bob", "a", "c", "train")
    before, after = from_examples([ann, bob]), from_examples([changed, ann])
    assert before.digest_of("ann") == after.digest_of("ann")
    assert before.digest_of("bob") != after.digest_of("bob")
    assert before.digest != after.digest


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"persona": "ann"', ":3: is not a line of JSON"),
        ("[1, 2]", ":3: is not a JSON object"),
        (json.dumps(row(split="dev")), ":3: unknown split 'dev'.\nAllowed: train, validation, test"),
        (json.dumps(row(split="dev")), "split: {validation: [dev]}"),
        (json.dumps(row(response=" \t")), ":3: its response is empty.\n1 of 3 examples"),
        (json.dumps(row(prompt="")), ":3: its prompt is empty"),
        (json.dumps(row(prompt="")), "skip_empty: true"),
        (json.dumps(row(persona=True)), ":3: persona is not text; found True"),
        (json.dumps({"persona": "ann", "messages": []}), "It has 'messages': is that meant?"),
        (json.dumps({"who": "ann"}), "Expected persona, prompt, response, split; found who"),
        (json.dumps(row(response=None)), ":3: has no response"),
        (json.dumps(row(prompt=7)), ":3: prompt is not text; found 7"),
        (json.dumps(row(persona="a/b")), ":3: persona 'a/b' holds a slash"),
        (json.dumps(row(persona="..")), ":3: persona '..' begins with a dot"),
        (json.dumps(row(persona="unified")), ":3: persona 'unified' is taken"),
        (json.dumps({"persona": "ann", "prompt": "a", "reponse": "b", "split": "train"}), "It has 'reponse'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    path = tmp_path / "p.jsonl"
    path.write_text(f"{json.dumps(row())}\n\n{bad}\n{json.dumps(row())}\n", encoding="utf-8")
    with pytest.raises(PersonaError) as caught:
        read_personas(str(path))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_other_columns_are_ignored_and_blank_lines_skipped(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(f"\n{json.dumps(row(source={'a': [1, None]}))}\n\n{json.dumps(row(persona='bob'))}\n")
    assert read_personas(str(path)).names == ("ann", "bob")


def test_what_arrow_cannot_read_in_one_block_is_read_line_by_line(tmp_path):
    long = "x" * (3 << 20)  # longer than Arrow's block
    read = read_personas(write_lines(tmp_path / "p.jsonl", [row(), row(response=long)]))
    assert read.examples("ann")[1].response == long


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"a", "is neither .jsonl nor .parquet"),
        ("p.jsonl", b"", "holds no examples"),
        ("p.parquet", b"PAR1", "is not a parquet file"),
        ("missing.jsonl", None, "there is no such file"),
    ],
)
def test_a_file_without_examples_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PersonaError, match=message):
        read_personas(str(tmp_path / name))


def test_parquet_faults_name_the_row_or_column(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist([row(), row(split="dev")]), path)
    with pytest.raises(PersonaError, match="row 2: unknown split 'dev'"):
        read_personas(str(path))
    pq.write_table(pa.Table.from_pylist([row(), row(response="")]), path)
    with pytest.raises(PersonaError, match="row 2: its response is empty"):
        read_personas(str(path))
    pq.write_table(pa.Table.from_pylist([row(prompt=7)]), path)
    with pytest.raises(PersonaError, match="row 1: prompt is not text; found 7"):
        read_personas(str(path))
    pq.write_table(pa.Table.from_pylist([{"persona": "ann", "prompt": "a"}]), path)
    with pytest.raises(PersonaError, match=r"has no column response.\nExpected .*; found persona, prompt\."):
        read_personas(str(path))


def test_an_unknown_persona_is_answered_with_the_nearest():
    with pytest.raises(PersonaError, match="Did you mean persona_01"):
        from_examples([Example("persona_01", "a", "b", "train")]).examples("persona_1")


names = st.permutations(["persona", "prompt", "response", "split", "a", "b"])


@given(examples.filter(bool), names)
def test_the_names_of_columns_change_nothing(tmp_path_factory, made, names):
    folder = tmp_path_factory.mktemp("personas")
    ours = ("persona", "prompt", "response", "split")
    rows = [{theirs: getattr(e, name) for name, theirs in zip(ours, names[:4], strict=True)} for e in made]
    source = PersonaSource(
        path=write_lines(folder / "p.jsonl", rows), **dict(zip(ours[:3], names[:3], strict=True)), split=names[3]
    )
    pq.write_table(pa.Table.from_pylist(rows), folder / "p.parquet")
    lines = read_personas(source)
    table = read_personas(source.model_copy(update={"path": str(folder / "p.parquet")}))
    assert lines == table == from_examples(made)
    assert lines.digest == table.digest == from_examples(made).digest
    assert lines.source == source


def test_values_of_a_split_column_are_mapped(tmp_path):
    rows = [row(split=name) for name in ("training", "dev", "val", "test", "train")]
    source = PersonaSource(
        path=write_lines(tmp_path / "p.jsonl", rows), split={"train": "training", "validation": ["dev", "val"]}
    )
    assert [e.split for e in read_personas(source).examples("ann")] == [
        "train", "validation", "validation", "test", "train"
    ]  # fmt: skip


@pytest.mark.parametrize("names", [[7, 10, 7], [7, "ann", 10], [7.0, 10.0, 7.0], [7.5, 10, "7"], [2**70, 7, 10]])
def test_numbers_become_names(tmp_path, names):
    lines = write_lines(tmp_path / "p.jsonl", [row(persona=name) for name in names])
    expected = {str(int(name)) if not isinstance(name, str) and name == int(name) else str(name) for name in names}
    assert set(read_personas(lines).names) == expected
    if all(isinstance(name, type(names[0])) and name != 2**70 for name in names):
        pq.write_table(pa.Table.from_pylist([row(persona=name) for name in names]), tmp_path / "p.parquet")
        assert read_personas(str(tmp_path / "p.parquet")) == read_personas(lines)


def test_names_that_look_like_dates_stay_what_they_are(tmp_path):
    read = read_personas(write_lines(tmp_path / "p.jsonl", [row(persona="2024-01-01"), row(persona="2024-01-02")]))
    assert read.names == ("2024-01-01", "2024-01-02")


def test_empty_examples_are_left_out_where_asked(tmp_path):
    rows = [row(), row(response=""), row(persona="bob", prompt="\n"), row(prompt="how?")]
    source = PersonaSource(path=write_lines(tmp_path / "p.jsonl", rows), skip_empty=True)
    read = read_personas(source)
    assert [e.prompt for e in read.examples("ann")] == ["why?", "how?"]
    assert (read.names, read.skipped) == (("ann",), 2)
    with pytest.raises(PersonaError, match="all 1 are empty"):
        read_personas(source.model_copy(update={"path": write_lines(tmp_path / "q.jsonl", [row(prompt="")])}))


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=3))
def test_what_strip_empties_is_empty(tmp_path_factory, said):
    lines = write_lines(tmp_path_factory.mktemp("personas") / "p.jsonl", [row(response=said)])
    if said.strip():
        assert read_personas(lines).examples("ann")[0].response == said
    else:
        with pytest.raises(PersonaError, match=":1: its response is empty"):
            read_personas(lines)


def test_shards_are_read_as_one_file(tmp_path):
    rows = [row(persona=f"p{i % 3}", prompt=f"q{i}") for i in range(12)]
    whole = read_personas(write_lines(tmp_path / "whole.jsonl", rows))
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "notes.txt").write_text("not read")
    for number in range(3):
        pq.write_table(pa.Table.from_pylist(rows[4 * number : 4 * number + 4]), shards / f"part-{number}.parquet")
    assert read_personas(str(shards)) == whole
    assert read_personas(f"file://{shards}/part-*.parquet") == whole
    assert read_personas(str(shards / "part-[01].parquet")) == from_examples(
        Example(**vars(e)) for name in whole.names for e in whole.examples(name) if int(e.prompt[1:]) < 8
    )
    pq.write_table(pa.Table.from_pylist([row(), row(response=" ")]), shards / "part-9.parquet")
    with pytest.raises(PersonaError, match=r"part-9.parquet: row 2: its response is empty.\n1 of 14 examples"):
        read_personas(str(shards))
    with pytest.raises(PersonaError, match="matches no file of personas"):
        read_personas(str(shards / "*.jsonl"))
    (shards / "none").mkdir()
    with pytest.raises(PersonaError, match="holds no file of personas"):
        read_personas(str(shards / "none"))


def test_a_file_is_read_again_when_it_changes(tmp_path):
    lines = write_lines(tmp_path / "p.jsonl", [row()])
    first = read_personas(lines)
    assert read_personas(lines) is first
    write_lines(tmp_path / "p.jsonl", [row(), row()])
    assert len(read_personas(lines).examples("ann")) == 2


def test_examples_in_memory_are_checked_too():
    for made, message in [
        (Example("a/b", "p", "r", "train"), "example 1: persona 'a/b' holds a slash"),
        (Example("ann", " ", "r", "train"), "example 1: its prompt is empty"),
        (Example("ann", "p", "r", "dev"), "example 1: unknown split 'dev'"),
    ]:
        with pytest.raises(PersonaError, match=message):
            from_examples([made])


def test_the_real_personas(test_data):
    personas = read_personas(str(test_data / "ubuntu-irc" / "personas.jsonl"))
    assert len(personas.names) == 200
    assert set(map(str, personas.counts().values())) == {str({"train": 24, "validation": 8, "test": 8})}
    assert personas.missing("train") == ()


def test_the_real_personas_under_other_names(test_data, tmp_path):
    location = test_data / "ubuntu-irc" / "personas.jsonl"
    plain = read_personas(str(location))
    rows = [json.loads(line) for line in location.read_text(encoding="utf-8").splitlines()]
    names = {"train": "training", "validation": "dev", "test": "test"}
    chats = [
        {
            "user_id": r["persona"],
            "subset": names[r["split"]],
            "conversations": [{"from": "human", "value": r["prompt"]}, {"from": "gpt", "value": r["response"]}],
        }
        for r in rows
    ]
    source = PersonaSource(
        path=write_lines(tmp_path / "p.jsonl", chats),
        persona="user_id",
        messages="conversations",
        split={"column": "subset", "train": "training", "validation": "dev"},
    )
    assert read_personas(source) == plain
    assert read_personas(source).digest == plain.digest
    made = read_personas(PersonaSource(path=str(location), split={"by": "order", "validation": 0.2, "test": 0.2}))
    assert set(map(str, made.counts().values())) == {str({"train": 24, "validation": 8, "test": 8})}
