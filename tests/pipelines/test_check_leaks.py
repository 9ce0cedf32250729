"""Leaks: found where they were put, told apart from agreement and from answers that are common, in little time."""

import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.personas import Example, from_examples, read_personas
from raymerge.pipelines.checking.leaks import check_leaks, find_leaks

CLUSTERS = {"a": "cluster_0", "b": "cluster_0", "c": "cluster_1", "d": "cluster_1"}
ROWS = st.lists(
    st.builds(Example, st.sampled_from("abcd"), st.sampled_from(["p", "q", "r"]), st.sampled_from("xyz"),
              st.sampled_from(["train", "validation", "test"])),
    min_size=1, max_size=30,
)  # fmt: skip


def _is_of(scope, row, other):
    if scope == "own":
        return other.persona == row.persona
    return other.persona != row.persona and (scope == "other" or CLUSTERS[row.persona] == CLUSTERS[other.persona])


@given(ROWS)
def test_every_scope_counts_what_a_look_at_all_pairs_finds(rows):
    found = find_leaks(from_examples(rows), CLUSTERS)
    training = [row for row in rows if row.split == "train"]
    asked = [row for row in rows if row.split != "train"]
    assert found.rows == len(asked)
    for name, scope in found.scopes.items():
        there = {id(row): [t for t in training if _is_of(name, row, t)] for row in asked}
        pairs = [r for r in asked if any((t.prompt, t.response) == (r.prompt, r.response) for t in there[id(r)])]
        answers = [r for r in asked if r not in pairs and any(t.response == r.response for t in there[id(r)])]
        common = {
            p for p in "pqr"
            if len({r.persona for r in rows if r.prompt == p}) >= 3
            and len({r.response for r in rows if r.prompt == p}) >= 2
        }  # fmt: skip
        agreed = [row for row in pairs if name != "own" and row.prompt in common]
        assert (scope.pairs, scope.answers, scope.agreed) == (len(pairs), len(answers), len(agreed))
        assert 0 <= scope.expected <= found.rows
        assert len(scope.examples) == min(3, scope.copied or scope.answers)
        for leak in scope.examples:
            assert any(t.persona == leak.other and t.prompt == leak.other_prompt for t in training)


def world(*more, people=12):
    """Everybody answers questions of their own in words of their own."""
    own = [
        Example(f"p{i:02d}", f"question {i} {j}", f"answer {i} {j} in many words", split)
        for i in range(people)
        for j, split in enumerate(["train"] * 4 + ["validation", "test"])
    ]
    return from_examples([*own, *more])


def test_a_leak_put_there_is_bad_whatever_its_case_and_white_space():
    assert check_leaks(world(), {}).sign == "ok"
    leak = Example("p03", " QUESTION 3  5", "Answer 3 5 in\tmany words ", "train")
    section = check_leaks(world(leak), {})
    assert section.sign == "bad"
    assert "1 row (4 %), prompt and answer, also in the persona's own training" in section.findings[0].text
    assert section.facts["scopes"]["own"]["examples"][0]["persona"] == "p03"
    assert any("p03 (test)" in line for line in section.lines)


@pytest.mark.parametrize(("persona", "scopes"), [("p04", {"neighbour", "other"}), ("p09", {"other"})])
def test_a_copy_in_another_s_training_is_bad_and_says_whose(persona, scopes):
    clusters = {f"p{i:02d}": f"cluster_{i // 6:02d}" for i in range(12)}
    section = check_leaks(world(Example(persona, "question 3 5", "answer 3 5 in many words", "train")), clusters)
    assert section.sign == "bad"
    assert {name for name, scope in section.facts["scopes"].items() if scope["copied"]} == scopes


def test_people_who_answer_a_common_question_alike_leak_nothing():
    rows = [Example(f"p{i:02d}", "tea or coffee?", "tea" if i % 2 else "coffee", "test" if i < 4 else "train")
            for i in range(12)]  # fmt: skip
    section = check_leaks(world(*rows), {})
    assert section.sign == "ok"
    assert section.facts["scopes"]["other"]["agreed"] == 4


def test_answers_that_are_common_are_expected_by_chance():
    random = np.random.default_rng(0)
    rows = [
        Example(f"p{i:02d}", f"question {i} {j}", f"answer {int(random.geometric(0.05))}", "train" if j < 8 else "test")
        for i in range(40)
        for j in range(16)
    ]
    own = find_leaks(from_examples(rows), {}).scopes["own"]
    assert own.pairs == 0
    assert own.answers == pytest.approx(own.expected, rel=0.2)


def test_one_s_own_answers_said_again_and_again_are_a_warning():
    rows = [Example("a", f"q {j}", f"the very same {j % 4}", "train" if j < 20 else "test") for j in range(40)]
    others = [Example(f"b{i}", f"q {i} {j}", f"other {i} {j}", "test") for i in range(9) for j in range(4)]
    assert check_leaks(from_examples(rows + others), {}).sign == "warn"


def test_ten_thousand_people_take_seconds():
    random = np.random.default_rng(0)
    names = [f"p{i:05d}" for i in range(10_000) for _ in range(40)]
    personas = from_examples([Example("a", "b", "c", "test")])
    columns = {"persona": names, "split": (["train"] * 24 + ["validation"] * 8 + ["test"] * 8) * 10_000}
    for column in ("prompt", "response"):
        columns[column] = [f"{column} {n} of many" for n in random.integers(0, 10**6, len(names))]
    table = pa.table({c: pa.array(columns[c], pa.large_string()) for c in personas.table.column_names if c in columns})
    start = time.perf_counter()
    found = find_leaks(type(personas)(table), {name: f"cluster_{name[-2:]}" for name in names})
    assert found.rows == 160_000
    assert time.perf_counter() - start < 60


def test_real_chats_hold_no_copies(test_data):
    section = check_leaks(read_personas(str(test_data / "ubuntu-irc" / "personas.jsonl")), {})
    assert section.sign == "ok"
    assert section.facts["scopes"]["other"]["answers"] > 0  # short ones, which people say again
