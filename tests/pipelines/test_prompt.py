"""`raymerge prompt`: one batch says what each adapter says alone, and scores say how well."""

import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raymerge import load_adapter, merge, save_adapter
from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.cli import main
from raymerge.errors import AdapterError, EvaluationError, ModelError, PersonaError, RaymergeError
from raymerge.models.base import load_base
from raymerge.models.generation import GenerationSettings, generate, score_references
from raymerge.models.multilora import MultiLora
from raymerge.models.training import TrainingGroup, TrainingSettings, train
from raymerge.pipelines.prompt import ask
from raymerge.pipelines.prompting.answers import Question
from raymerge.pipelines.prompting.file import Prompt, read_prompts

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


def expert(name: str, seed: int) -> LoraAdapter:
    random = torch.Generator().manual_seed(seed)
    paths = {f"model.layers.{i}.self_attn.{m}": n for i in range(2) for m, n in (("q_proj", 32), ("v_proj", 16))}
    modules = {
        path: LoraModule(torch.randn(4, 32, generator=random), torch.randn(rows, 4, generator=random), 0.5)
        for path, rows in paths.items()
    }
    return LoraAdapter(name, modules, base_model="tiny_llama", task_type="CAUSAL_LM")


@pytest.fixture
def bank(tmp_path, monkeypatch) -> Path:
    """Experts e1 to e3 of the tiny base, and prompts of each with references, as the working directory."""
    torch.set_num_threads(1)
    for number in (1, 2, 3):
        save_adapter(expert(f"e{number}", number), str(tmp_path / f"e{number}"))
    rows = [
        {"prompt": " ".join(f"w{i * k % 50}" for k in range(i + 1)), "response": f"w{i} w{9 + i}.", "capability": name}
        for name in ("e1", "e2", "e3")
        for i in range(1, 4)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fuse(*arguments: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fuse", *arguments])
    assert not end.value.code


def scored(base: Path, *adapters: str) -> Question:
    return Question(str(base), adapters, file="prompts.jsonl", max_new_tokens=4, similarity_model="none")


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


# With a tiny base: no real data is needed


def test_one_batch_answers_and_scores_as_one_at_a_time(bank, tiny_llama):
    together = ask(replace(scored(tiny_llama, "e1", "e2", "e3"), batch_size=64))
    assert len({tuple(texts) for texts in together.answers.values()}) == 4
    base = load_base(str(tiny_llama))
    for row, name in enumerate(together.answers):
        lora = MultiLora(base.model)
        lora.load([load_adapter(name)] if name != "base" else [])
        index = None if name == "base" else [0]
        for column, asked in enumerate(together.prompts):
            answer = generate(base, lora if index else None, [asked.text], index, GenerationSettings(4))
            assert [together.answers[name][column]] == answer
            nll = score_references(base, lora if index else None, [asked.text], [asked.reference], index)
            assert together.scores.values["nll"][row, column] == pytest.approx(nll[0], rel=1e-4)
        lora.detach()


def test_json_is_what_was_asked_answered_and_kept(bank, tiny_llama, capsys):
    fuse("e1", "e2", "--out", "m")
    capsys.readouterr()
    asked = ["e1", "m", "--base", str(tiny_llama), "--prompts", "prompts.jsonl", "--max-new-tokens", "4"]
    assert status(*asked, "--similarity-model", "none", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(ask(scored(tiny_llama, "e1", "m")).to_json()))
    assert printed["respondents"][2]["contributors"][0]["name"] == "e1"
    (one,) = [kept for kept in printed["kept"] if kept["metric"] == "nll"]
    means = printed["scores"]["nll"]
    assert (one["base"], one["before"], one["after"]) == tuple(means[who]["e1"] for who in ("base", "e1", "m"))


def test_what_went_in_is_known_by_its_content_under_any_name(bank, tiny_llama):
    fuse("e1", "other=e2", "--out", "m")
    found = ask(scored(tiny_llama, "e1", "e2", "e3", "m"))
    assert {one.expert for one in found.kept} == {"e1", "e2"}
    assert not any("was made of" in note for note in found.notes)
    (bank / "copy").symlink_to("e3")
    renamed = ask(scored(tiny_llama, "other=copy", "m"))  # its name went in, its content did not
    assert not renamed.kept


def test_nothing_is_kept_of_an_expert_that_did_not_go_in(bank, tiny_llama):
    fuse("e1", "e2", "--out", "m")
    found = ask(scored(tiny_llama, "e3", "m"))
    assert found.kept == ()
    assert "m was made of e1, e2, which are not among the adapters here." in found.notes
    (bank / "m/manifest.json").unlink()  # nobody knows what went in
    assert {one.expert for one in ask(scored(tiny_llama, "e3", "m")).kept} == {"e3"}


def test_an_unfinished_adapter_does_not_answer(bank, tiny_llama, capsys):
    (bank / "e2/manifest.json").write_text(json.dumps({"unfinished": True}))
    assert status("e1", "e2", "--base", str(tiny_llama), "--prompt", "w1") == 2
    assert capsys.readouterr().err.startswith("raymerge: e2: was begun and not finished.")


@pytest.mark.parametrize("experts", [["a"], "a", {"a": 1}, [{"weight": 1}], [{"name": 3}], None])
def test_a_foreign_manifest_says_nothing(bank, tiny_llama, experts):
    (bank / "e1/manifest.json").write_text(json.dumps({"files": {}, "experts": experts}))
    respondent = ask(Question(str(tiny_llama), ["e1"], prompts=["w1"], max_new_tokens=1)).respondents[1]
    assert (respondent.kind, respondent.contributors) == ("expert", ())


def test_a_manifest_without_digests_is_matched_by_names(bank, tiny_llama):
    (bank / "e2/manifest.json").write_text(json.dumps({"files": {}, "experts": [{"name": "e1"}, {"name": "gone"}]}))
    found = ask(scored(tiny_llama, "e1", "e3", "e2"))
    assert {one.expert for one in found.kept} == {"e1"}
    assert "e2 was made of gone, which is not among the adapters here." in found.notes


def test_dora_needs_a_base_that_is_a_folder(bank, tiny_llama):
    configuration = bank / "e1/adapter_config.json"
    configuration.write_text(json.dumps(json.loads(configuration.read_text()) | {"use_dora": True}))
    file = bank / "e1/adapter_model.safetensors"
    tensors = load_file(file)
    magnitudes = {
        key.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(len(value))
        for key, value in tensors.items()
        if "lora_B" in key
    }
    save_file({**tensors, **magnitudes}, file)
    with pytest.raises(AdapterError, match=r"^e1: is DoRA.*--base somebody/model is no folder"):
        ask(Question("somebody/model", ["e1"], prompts=["w1"]))
    assert ask(Question(str(tiny_llama), ["e1"], prompts=["w1"], max_new_tokens=1)).answers["e1"]


def test_what_is_no_text_is_refused(bank, tiny_llama):
    odd = os.fsdecode(b"od\xff")
    os.rename("e3", odd)
    with pytest.raises(RaymergeError, match=r"^od\\udcff: this path is not text in UTF-8"):
        ask(Question(str(tiny_llama), [odd], prompts=["w1"]))
    with pytest.raises(RaymergeError, match=r"^od\\udcff: is not text in UTF-8"):
        ask(Question(str(tiny_llama), ["e1"], prompts=[odd]))


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
    assert [(r.name, r.kind, tuple(c.name for c in r.contributors)) for r in found.respondents] == [
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
        assert (one["before"], one["after"], one["base"]) == pytest.approx((before, after, base))
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
def test_what_cannot_be_asked_is_refused(bank, tiny_llama, options, error, first_line):
    (bank / "ann").symlink_to("e1")
    with pytest.raises(error) as raised:
        ask(Question(**{"base": str(tiny_llama), "adapters": ["ann"], **options}))
    assert str(raised.value).splitlines()[0] == first_line.format(here=bank)


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


def test_out_is_refused_before_anything_is_asked(bank, capsys):
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
