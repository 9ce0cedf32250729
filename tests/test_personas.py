"""Reading examples: what is kept, what is refused and where the fault is said to be."""

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.errors import PersonaError, ProjectError
from raymerge.personas import SPLITS, Example, from_examples, read_personas, render_prompt

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
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
    pq.write_table(pa.Table.from_pylist([{"persona": 7, "prompt": "a", "response": "b", "split": "train"}]), path)
    with pytest.raises(PersonaError, match="row 1: persona is not text; found 7"):
        read_personas(str(path))
    pq.write_table(pa.Table.from_pylist([{"persona": "ann", "prompt": "a"}]), path)
    with pytest.raises(PersonaError, match="has no column response"):
        read_personas(str(path))


def test_an_unknown_persona_is_answered_with_the_nearest():
    with pytest.raises(PersonaError, match="Did you mean persona_01"):
        from_examples([Example("persona_01", "a", "b", "train")]).examples("persona_1")


@given(text)
def test_a_prompt_is_put_in_as_it_is(prompt):
    assert render_prompt(prompt, '{"q": {prompt}}') == '{"q": ' + prompt + "}"


def test_chat_uses_the_tokenizers_template(tiny_llama):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(ProjectError, match="no chat template"):
        render_prompt("w1", "chat", tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    assert render_prompt("w1", "chat", tokenizer) == "user w1\nassistant "
    with pytest.raises(ProjectError, match=r"has no \{prompt\}"):
        render_prompt("w1", "Q: prompt")
    with pytest.raises(ProjectError, match="no chat template"):
        render_prompt("w1", "chat")


def test_the_real_personas(test_data):
    personas = read_personas(str(test_data / "ubuntu-irc" / "personas.jsonl"))
    assert len(personas.names) == 200
    assert set(map(str, personas.counts().values())) == {str({"train": 24, "validation": 8, "test": 8})}
    assert personas.missing("train") == ()
