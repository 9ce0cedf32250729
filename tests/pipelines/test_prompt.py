"""`raymerge prompt` on a real small Llama: one batch says what each adapter says alone, and scores say how well."""

import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from raymerge import load_adapter, merge, save_adapter
from raymerge.adapters import LoraAdapter
from raymerge.cli import main
from raymerge.errors import AdapterError, EvaluationError, ModelError, PersonaError, RaymergeError
from raymerge.models.base import load_base
from raymerge.models.generation import GenerationSettings, generate, score_references
from raymerge.models.multilora import MultiLora
from raymerge.models.training import TrainingGroup, TrainingSettings, train
from raymerge.pipelines.prompt import ask
from raymerge.pipelines.prompt_answers import Question
from raymerge.pipelines.prompt_file import Prompt, read_prompts

TEXTS = ["Once upon a time", "Lily saw a big", "The dog", "One day, Tom and his mom"]
STORIES = {"ann": "big red dog. It was happy.", "bob": "little blue boat. The end."}
NAMES = ("Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue", "Tim", "Amy", "Jack", "Tina")
SETTINGS = GenerationSettings(max_new_tokens=16)


@pytest.fixture(scope="module")
def llama(test_data) -> str:
    torch.set_num_threads(1)
    return str(test_data / "stories260k")


@pytest.fixture(scope="module")
def world(llama, tmp_path_factory) -> Path:
    """Experts ann and bob that learnt a sentence each, their exact mean, adapters that PEFT made, and prompts."""
    folder = tmp_path_factory.mktemp("prompt")
    groups = [
        TrainingGroup(name, [(f"{who} {verb}", text) for who in NAMES[:6] for verb in ("saw a", "found a", "had a")])
        for name, text in STORIES.items()
    ]
    settings = TrainingSettings(
        rank=4, alpha=8, epochs=6, learning_rate=1e-2, target_modules=("q_proj", "v_proj", "o_proj", "up_proj")
    )
    for trained in train(load_base(llama), groups, settings):
        save_adapter(trained.adapter, str(folder / trained.adapter.name))
    experts = [load_adapter(str(folder / name)) for name in STORIES]
    save_adapter(merge(experts, [0.6, 0.4], rank="exact", name="mean"), str(folder / "mean"))
    made = {"x": {"r": 4}, "y": {"r": 2, "use_rslora": True}, "dora": {"r": 2, "use_dora": True}}
    for seed, (name, options) in enumerate(made.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(llama)
        config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=16, **options)
        get_peft_model(model, config).save_pretrained(folder / name)
    rows = [
        {"prompt": f"{who} {verb}", "response": text, "capability": name}
        for name, text in STORIES.items()
        for who in NAMES[6:]
        for verb in ("saw a", "found a")
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def here(world, monkeypatch) -> Path:
    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "80")
    return world


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["prompt", *arguments])
    return int(end.value.code or 0)


def peft_answers(llama: str, adapter: str | None) -> list[str]:
    """What PEFT answers, one prompt at a time."""
    base = load_base(llama)
    model = PeftModel.from_pretrained(base.model, adapter).eval() if adapter else base.model
    answers = []
    for text in TEXTS:
        ids = base.tokenizer(text, return_tensors="pt", return_token_type_ids=False)["input_ids"]
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=SETTINGS.max_new_tokens, do_sample=False,
            pad_token_id=base.pad_id,
        )  # fmt: skip
        answers.append(str(base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip())
    return answers


# Who answers


def test_every_adapter_answers_as_with_peft_alone(here, llama):
    names = ["x", "y", "dora", "ann", "bob"]
    found = ask(Question(llama, names, prompts=TEXTS, max_new_tokens=SETTINGS.max_new_tokens))
    wanted = {name: peft_answers(llama, name) for name in names}
    assert dict(found.answers) == {"base": peft_answers(llama, None), **wanted}
    assert len({tuple(texts) for texts in found.answers.values()}) == 6
    assert found.scores is None


def test_an_exact_linear_merge_answers_as_the_mixture(here, llama):
    question = Question(llama, ["mean"], prompts=TEXTS, max_new_tokens=SETTINGS.max_new_tokens, with_base=False)
    found = ask(question)
    base = load_base(llama)
    lora = MultiLora(base.model)
    lora.load([load_adapter("ann"), load_adapter("bob")])
    weights = torch.tensor([[0.6, 0.4]])
    mixed = generate(base, lora, TEXTS, weights.expand(len(TEXTS), 2), SETTINGS)
    assert dict(found.answers) == {"mean": mixed}
    scored = ask(Question(llama, ["mean"], file="prompts.jsonl", max_new_tokens=2, similarity_model="none"))
    prompts, _ = read_prompts("prompts.jsonl")
    texts, references = [p.text for p in prompts], [p.reference or "" for p in prompts]
    nll = score_references(base, lora, texts, references, weights.expand(len(texts), 2))
    assert scored.scores is not None
    assert scored.scores.values["nll"][1].tolist() == pytest.approx(nll, rel=1e-4)


def test_fused_adapters_stand_last_and_are_known_by_their_files(here, llama):
    save_adapter(merge([load_adapter("ann"), load_adapter("bob")], [1, 1], rank="exact", name="sum"), "sum")
    (here / "sum/manifest.json").unlink()
    with pytest.raises(SystemExit):
        main(["fuse", "ann", "bob", "--out", "fused"])
    found = ask(Question(llama, ["sum", "fused", "other=x", "ann"], ["y"], TEXTS[:1], max_new_tokens=1))
    assert [(r.name, r.kind, r.contributors) for r in found.respondents] == [
        ("base", "base", ()),
        ("other", "expert", ()),
        ("ann", "expert", ()),
        ("sum", "fused", ()),
        ("fused", "fused", ("ann", "bob")),
        ("y", "fused", ()),
    ]
    assert found.locations["other"] == "other=x"


def test_format_and_stop_reach_the_model(here, llama):
    base = load_base(llama)
    rendered = [f"Once,\n{text} and" for text in TEXTS]
    wanted = generate(base, None, rendered, None, GenerationSettings(12, ("a",)))
    arguments = ["x", "--base", llama, "--json", "--prompt-format", r"Once,\n{prompt} and", "--stop", "a"]
    texts = [word for text in TEXTS for word in ("--prompt", text)]
    with pytest.MonkeyPatch.context() as patch:
        printed = io.StringIO()
        patch.setattr("sys.stdout", printed)
        assert status(*arguments, *texts, "--max-new-tokens", "12") == 0
    found = json.loads(printed.getvalue())
    assert [one["answers"]["base"] for one in found["prompts"]] == wanted


# Scores


def test_experts_know_their_own_prompts_and_a_merge_keeps_a_share(here, llama, capsys):
    asked = ["--base", llama, "--prompts", "prompts.jsonl", "--max-new-tokens", "8"]
    assert status("ann", "bob", "mean", *asked, "--json", "--out", "made/all.json") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = json.loads(printed.out)
    assert json.loads((here / "made/all.json").read_text()) == found
    assert found["scored"] == {"ann": 12, "bob": 12}
    assert list(found["scores"]) == ["chrf", "nll", "similarity"]
    for metric, rows in found["scores"].items():
        for name in STORIES:
            values = [one["scores"]["mean"][metric] for one in found["prompts"] if one["capability"] == name]
            assert rows["mean"][name] == pytest.approx(sum(values) / 12)
            ranked = sorted(rows, key=lambda who: rows[who][name], reverse=metric != "nll")
            assert ranked[0] == name
    for one in found["kept"]:
        before, after, base = (
            found["scores"][one["metric"]][r][one["expert"]] for r in (one["expert"], "mean", "base")
        )
        assert (one["before"], one["after"], one["base"]) == (before, after, base)
        assert one["share"] == pytest.approx((after - base) / (before - base))
        assert one["certain"]
    assert [(one["expert"], one["metric"]) for one in found["kept"]] == [
        (name, metric) for name in STORIES for metric in ("similarity", "chrf", "nll")
    ]
    best = max((one for one in found["kept"] if one["metric"] == "nll"), key=lambda one: one["share"])
    assert 0.5 < best["share"] < 1


def test_prompts_without_a_reference_are_answered_and_not_scored(here, llama, tmp_path):
    rows = [{"prompt": "Tim saw a", "response": "big dog."}, {"prompt": "Tom"}, {"prompt": "Ann", "capability": "ann"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = ask(Question(llama, ["ann"], file=str(tmp_path / "p.jsonl"), max_new_tokens=2, similarity_model="none"))
    assert found.scored == (0,)
    assert found.scores is not None
    assert found.scores.prompts == {"other": 1}
    assert list(found.scores.values) == ["chrf", "nll"]
    value = found.to_json()
    assert [bool(one["scores"]) for one in value["prompts"]] == [True, False, False]
    assert [set(one["answers"]) for one in value["prompts"]] == [{"base", "ann"}] * 3


def test_why_nothing_is_kept_is_said(here, llama, tmp_path):
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "Tim", "response": "saw.", "persona": "zoe", "split": "test"})
    )
    question = {"file": str(tmp_path / "p.jsonl"), "max_new_tokens": 1, "similarity_model": "none"}
    named = ask(Question(llama, ["ann", "mean"], **question))
    assert named.kept == ()
    assert any("`capability` names it: ann" in note for note in named.notes)
    bare = ask(Question(llama, ["ann", "mean"], with_base=False, **question))
    assert bare.kept == ()
    assert any("--no-base" in note for note in bare.notes)


# The terminal


def test_the_terminal_shows_every_answer_whole_in_80_columns(here, llama, capsys):
    asked = ["--prompt", TEXTS[0], "--prompt", "Tim said: \x1b[31m\nhello"]
    names = ["ann", "a-name-much-longer-than-its-column=bob", "mean"]
    assert status(*names, "--base", llama, *asked, "--max-new-tokens", "60") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert max(len(line) for line in printed.out.splitlines()) <= 80
    assert "\x1b" not in printed.out
    assert "prompt 2 of 2" in printed.out
    found = ask(Question(llama, names, prompts=[TEXTS[0], "Tim said: \x1b[31m\nhello"], max_new_tokens=60))
    shown = re.sub(r"\s", "", printed.out)
    for texts in found.answers.values():
        for text in texts:
            assert "".join(c for c in text if c.isprintable() and not c.isspace()) in shown


def test_scores_fit_80_columns_however_many_capabilities(here, llama, tmp_path, capsys):
    rows = [{"prompt": "Tim saw", "response": "a dog.", "capability": f"capability {i:02d}"} for i in range(12)]
    rows += [{"prompt": "Sue saw a", "response": STORIES["ann"], "capability": "ann"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert status("ann", "mean", "--base", llama, "--prompts", str(tmp_path / "p.jsonl"), "--max-new-tokens", "6") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 80
    text = "\n".join(lines)
    assert "and 5 more prompts" in text
    for row in rows:
        assert text.count(f"{row['capability']}") >= 3  # in each of three matrices
    line = next(line for line in lines if re.match(r"mean +ann ", line))
    assert line.count("%?") == 3
    assert "within chance" in text


def test_progress_goes_to_a_terminal_only(here, llama, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert status("ann", "--base", llama, "--prompt", "Tim", "--max-new-tokens", "4", "--json") == 0
    printed = capsys.readouterr()
    assert "answering" in printed.err
    assert json.loads(printed.out)["prompts"][0]["prompt"] == "Tim"


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "first_line"),
    [
        ({}, EvaluationError, "no prompts are given."),
        ({"prompts": ["a"], "file": "prompts.jsonl"}, EvaluationError, "--prompt and --prompts: give one of them."),
        ({"adapters": [], "prompts": ["a"]}, AdapterError, "no adapter is given."),
        (
            {"adapters": ["base=ann"], "prompts": ["a"]},
            AdapterError,
            "base=ann: the name base stands for the base model.",
        ),
        ({"adapters": ["ann", "ann=bob"], "prompts": ["a"]}, RaymergeError, "ann: two adapters have this name."),
        ({"adapters": ["amy"], "prompts": ["a"]}, AdapterError, "amy: there is no adapter in {here}/amy."),
        ({"prompts": ["a"], "prompt_format": "a"}, RaymergeError, "prompt_format 'a': has no {{prompt}}."),
        ({"prompts": ["a"], "base": "/no/such"}, ModelError, "/no/such: there is no such folder."),
    ],
)
def test_what_cannot_be_asked_is_refused(here, llama, options, error, first_line):
    with pytest.raises(error) as raised:
        ask(Question(**{"base": llama, "adapters": ["ann"], **options}))
    assert str(raised.value).splitlines()[0] == first_line.format(here=here)


def test_an_adapter_of_another_base_is_refused_with_both_names(here, llama, test_data, capsys):
    other = str(test_data / "adapters/gpt2-r8-fan-in-fan-out")
    assert status("ann", other, "--base", llama, "--prompt", "a") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    first, *rest = printed.err.splitlines()
    assert first == f"raymerge: gpt2-r8-fan-in-fan-out: does not fit the base {llama}."
    assert "gpt2 as its base" in rest[-1]


def test_an_adapter_that_holds_more_than_deltas_is_refused(here, llama):
    ann = load_adapter("ann")
    whole = {"lm_head.weight": torch.zeros(512, 64)}
    save_adapter(LoraAdapter("head", ann.modules, whole=whole, modules_to_save=("lm_head",)), "head")
    with pytest.raises(
        AdapterError, match=r"^head: cannot answer in a batch with others, since it holds whole tensors"
    ):
        ask(Question(llama, ["head"], prompts=["a"]))


def test_out_is_refused_before_anything_is_asked(here, capsys):
    for out in ("answers.txt", "prompts.jsonl", "."):
        assert status("ann", "--base", "/no/such", "--prompt", "a", "--out", out) == 2
        assert capsys.readouterr().err.startswith(f"raymerge: --out {out}: is no JSON file.")


# Files of prompts


def test_all_kinds_of_files_say_the_same(tmp_path):
    rows = [{"prompt": "a b", "response": None, "persona": None}, {"prompt": "ü", "response": "r", "persona": "ann"}]
    wanted = (Prompt("a b"), Prompt("ü", "r", "ann")), 0
    (tmp_path / "p.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8-sig")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.jsonl")) == wanted
    assert read_prompts(str(tmp_path / "p.parquet")) == wanted
    (tmp_path / "p.txt").write_bytes("a b\r\n\n ü\n".encode())
    assert read_prompts(str(tmp_path / "p.txt")) == ((Prompt("a b"), Prompt("ü")), 0)


def test_of_a_file_of_personas_the_test_examples_are_taken(tmp_path):
    rows = [
        {"persona": "ann", "prompt": f"p{i}", "response": "r", "split": split}
        for i, split in enumerate(["train", "test", "validation", "test"])
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert read_prompts(str(tmp_path / "p.jsonl")) == ((Prompt("p1", "r", "ann"), Prompt("p3", "r", "ann")), 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"promt": "b"}', "p.jsonl:2: unknown column 'promt'. Did you mean prompt?"),
        ("p.jsonl", '{"response": "b"}', "p.jsonl:1: has no prompt."),
        ("p.jsonl", '{"prompt": 3}', "p.jsonl:1: prompt is not text; found 3."),
        ("p.jsonl", '{"prompt": "a", "response": " "}', "p.jsonl:1: response is empty."),
        ("p.jsonl", '{"prompt": "a", "persona": "a", "capability": "b"}', "p.jsonl:1: has capability and persona"),
        ("p.jsonl", '{"prompt": "a", "split": "tests"}', "p.jsonl:1: unknown split 'tests'. Did you mean test?"),
        ("p.jsonl", '{"prompt": "a", "split": "train"}', "p.jsonl: holds no test examples among 1."),
        ("p.jsonl", "[]", "p.jsonl:1: is not a JSON object."),
        ("p.jsonl", "{", "p.jsonl:1: is not a line of JSON."),
        ("p.jsonl", "\n", "p.jsonl: holds no prompts."),
        ("p.txt", "", "p.txt: holds no prompts."),
        ("p.csv", "prompt", "p.csv: is no file of prompts."),
        ("p.json", None, "p.json: is no file of prompts."),
        ("p.txt", None, "p.txt: there is no such file of prompts."),
    ],
)
def test_a_bad_file_is_named_with_the_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(PersonaError) as raised:
        read_prompts(str(tmp_path / name))
    assert str(raised.value).startswith(f"{tmp_path}/{message}")


def test_a_parquet_file_is_refused_by_row(tmp_path):
    pq.write_table(pa.table({"prompt": ["a", "b"], "response": ["r", ""]}), tmp_path / "p.parquet")
    with pytest.raises(PersonaError, match=r"p.parquet: row 2: response is empty"):
        read_prompts(str(tmp_path / "p.parquet"))
    pq.write_table(pa.table({"prompt": ["a"], "answer": ["r"]}), tmp_path / "q.parquet")
    with pytest.raises(PersonaError, match=r"q.parquet: unknown column 'answer'"):
        read_prompts(str(tmp_path / "q.parquet"))
