"""Retrieval puts a persona's own most similar training examples before a prompt, and nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from raymerge.manifest import read_manifest
from raymerge.models.answers import encode_prompts
from raymerge.models.generation import GenerationSettings, generate, score_references
from raymerge.personas import Example, Turn, read_personas, render_prompt
from raymerge.routing.embeddings import Encoder
from raymerge.runtime.retrieval import fit, nearest, render_with_examples
from raymerge.runtime.scoring import gather
from raymerge.runtime.tasks import EvaluateTask, GatherTask, Retrieval
from raymerge.runtime.workers import ModelWorker
from tests.runtime.conftest import ENCODER

RETRIEVAL = Retrieval(2, "{prompt} {response} ", ENCODER)


def example(prompt: str, response: str = "w1", persona: str = "ada", split: Any = "train", **more: Any) -> Example:
    return Example(persona, prompt, response, split, **more)


def test_the_most_similar_prompts_are_found_and_stand_last(encoder: Encoder) -> None:
    texts = ["How do I bake bread?", "Where is the train station?", "How do I bake a cake?", "What is a good novel?"]
    known = {"ada": [example(text, f"a{i}") for i, text in enumerate(texts)]}
    rows = [example("How can I bake a pie?", split="test"), example("Which book should I read?", split="test")]
    first, second = nearest(known, rows, 2, encoder)
    assert {e.prompt for e in first} == {texts[0], texts[2]}
    assert second[-1].prompt == texts[3]
    for row, found in zip(rows, (first, second), strict=True):
        vectors = encoder.model.encode([row.prompt, *(e.prompt for e in found)], normalize_embeddings=True)
        cosines = vectors[1:] @ vectors[0]
        assert np.all(np.diff(cosines) > 0)
        assert all(vectors[0] @ encoder.model.encode(t, normalize_embeddings=True) <= cosines[0] + 1e-6
                   for t in texts if t not in {e.prompt for e in found})  # fmt: skip


def test_never_the_example_itself_and_only_ones_own(encoder: Encoder) -> None:
    known = {"ada": [example("w1 ?", "yes"), example("w2 ?", "no")], "bob": [example("w1 ?", "never", "bob")]}
    rows = [known["ada"][0], example("w1 ?", "perhaps", "cyd", "test"), example("w1 ?", "else", split="test")]
    found = nearest(known, rows, 5, encoder)
    assert [[e.response for e in one] for one in found] == [["no"], [], ["no", "yes"]]


def test_equally_similar_prompts_keep_their_order(encoder: Encoder) -> None:
    prompts = ["novels", "bake bread", "cats", "bake bread", "bake bread"]
    known = {"ada": [example(prompt, f"a{i}") for i, prompt in enumerate(prompts)]}
    rows = [example("bake bread", "?", split="test")]
    for count in (1, 2, 3, 9):
        (found,) = nearest(known, rows, count, encoder)
        assert len(found) == min(count, 5)
        assert [e.response for e in reversed(found)][:3] == ["a1", "a3", "a4"][:count]


def test_examples_stand_before_the_prompt_as_written(worker: ModelWorker) -> None:
    shown = [example("a {response}", "{prompt}"), example("b", "c")]
    row = example("who?", split="test")
    form = "Q: {prompt}\nA: {response}\n\n"
    text = render_with_examples(row, shown, form, "Q: {prompt}\nA:")
    assert text == "Q: a {response}\nA: {prompt}\n\nQ: b\nA: c\n\nQ: who?\nA:"
    opened = render_with_examples(row, shown[1:], form, "<s>Q: {prompt}\nA:", worker.base.tokenizer)
    assert opened == "<s>Q: b\nA: c\n\nQ: who?\nA:"
    assert render_with_examples(row, (), form, "Q: {prompt}\nA:") == render_prompt("who?", "Q: {prompt}\nA:")


def test_in_a_chat_examples_are_turns(worker: ModelWorker) -> None:
    tokenizer = worker.base.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    system = Turn("system", "be brief")
    shown = [
        example("b", "c"),
        example("x", "e", turns=(system, Turn("user", "d"), Turn("assistant", "?"), Turn("user", "x"))),
    ]
    row = example("who?", split="test", turns=(system, Turn("user", "who?")))
    assert render_with_examples(row, shown, "unused", "chat", tokenizer) == (
        "[system] be brief\n[user] b\n[assistant] c\n[user] d\n[assistant] ?\n[user] x\n[assistant] e\n"
        "[user] who?\n[assistant]"
    )


def test_what_the_context_does_not_hold_is_dropped_from_the_least_similar_on(worker: ModelWorker) -> None:
    base = worker.base
    rows = [example("w1 w2", split="test"), example("w3", split="test"), example(" ".join(["w4"] * 9), split="test")]
    shown = [[example("w5 w6 w7", "w8"), example("w9", "w10 w11")], [], [example("w1", "w2")]]
    for room, kept in ((9, 2), (8, 1), (5, 1), (4, 0), (None, 2)):
        prompts = fit(rows, shown, RETRIEVAL, "{prompt}", base, room)
        texts = [RETRIEVAL.format.replace("{prompt}", e.prompt).replace("{response}", e.response) for e in shown[0]]
        assert prompts.texts[0] == "".join(texts[2 - kept :]) + "w1 w2"
        assert prompts.texts[1] == "w3"
        last = 1 if room is None else 0
        assert prompts.texts[2].endswith(rows[2].prompt)
        assert (prompts.examples, prompts.dropped) == (kept + last, 3 - kept - last)
        if room is not None:
            assert len(encode_prompts(base, [prompts.texts[0]])[0]) <= room


def test_answers_and_scores_are_those_of_the_longer_prompt(
    worker: ModelWorker, evaluate_task: EvaluateTask, tmp_path: Path
) -> None:
    task = replace(evaluate_task, retrieval=RETRIEVAL)
    assert worker.evaluate(task)["failed"] == {}
    everybody = read_personas(task.personas)
    rows = [e for s in task.sources for e in everybody.examples(s.persona, "test")]
    known = {s.persona: everybody.examples(s.persona, "train") for s in task.sources}
    found = nearest(known, rows, 2, worker.encoder(ENCODER))
    assert [len(one) for one in found] == [2] * 6 + [0] * 3
    texts = [
        "".join(f"{e.prompt} {e.response} " for e in one) + row.prompt for row, one in zip(rows, found, strict=True)
    ]
    answers = generate(worker.base, None, texts, None, GenerationSettings(max_new_tokens=6), 4)
    nats = score_references(worker.base, None, texts, [e.response for e in rows], None, 4)
    table = pq.read_table(Path(task.folder, "generations.parquet"))
    assert table["generated"].to_pylist() == answers
    assert table["prompt"].to_pylist() == [e.prompt for e in rows]
    scores = pq.read_table(Path(task.folder, "metrics.parquet"))
    assert scores["nll"].to_pylist() == pytest.approx(nats, rel=1e-6)
    manifest = read_manifest(task.folder)
    assert manifest is not None
    assert manifest["retrieval"] == {"examples": 12, "dropped": 0}
    gather(GatherTask(str(tmp_path / "joined"), (task.folder,)))
    summary = (tmp_path / "joined" / "summary.json").read_text()
    assert '"retrieval"' in summary
    plain = replace(evaluate_task, folder=str(tmp_path / "plain"))
    worker.evaluate(plain)
    without = pq.read_table(Path(plain.folder, "generations.parquet"))["generated"].to_pylist()
    assert without[6:] == answers[6:]
    assert without[:6] != answers[:6]


def test_only_training_rows_come_in_and_they_decide_whether_a_result_is_there(
    worker: ModelWorker, evaluate_task: EvaluateTask, tmp_path: Path
) -> None:
    task = replace(evaluate_task, retrieval=RETRIEVAL)
    file = Path(str(evaluate_task.personas))
    assert not worker.evaluate(task)["skipped"]
    assert worker.evaluate(task)["skipped"]
    lines = file.read_text().splitlines()

    def changed(split: str) -> str:
        at = next(i for i, line in enumerate(lines) if f'"split": "{split}"' in line)
        return (
            "\n".join([*lines[:at], lines[at].replace('"response": "w', '"response": "w5 w'), *lines[at + 1 :]]) + "\n"
        )

    file.write_text(changed("validation"))
    assert worker.evaluate(task)["skipped"]
    file.write_text(changed("train"))
    assert not worker.evaluate(task)["skipped"]
    for other in (replace(RETRIEVAL, examples=1), replace(RETRIEVAL, format="{response} {prompt} "), None):
        assert not worker.evaluate(replace(task, retrieval=other))["skipped"]
    file.write_text("\n".join(lines) + "\n")
    plain = replace(task, retrieval=None)
    assert not worker.evaluate(replace(plain, most=1))["skipped"]
    assert worker.evaluate(replace(plain, most=1))["skipped"]
