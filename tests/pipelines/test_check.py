"""`raymerge check`: what it finds in prompts, adapters, splits and the model, and what its exit status says."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from raymerge.adapters import LoraAdapter, LoraModule, save_adapter
from raymerge.errors import PersonaError
from raymerge.models.base import load_base
from raymerge.models.training import TrainingGroup, TrainingSettings, train
from raymerge.pipelines.check import check, checked
from raymerge.pipelines.checking import prompts
from raymerge.pipelines.checking.model import check_model
from raymerge.pipelines.checking.table import report
from raymerge.pipelines.opening import open_project
from raymerge.pipelines.trainings import check_training


def change(project, **keys):
    told = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump(told | keys))


def add_rows(project, *rows):
    with open(Path(project).parent / "personas.jsonl", "a") as file:
        file.writelines(
            json.dumps(dict(zip(("persona", "prompt", "response", "split"), r, strict=True))) + "\n" for r in rows
        )


def section(found, name):
    return next(one for one in found.sections if one.name == name)


def texts(found, name):
    return "\n".join(f"{f.sign}: {f.text}" for f in section(found, name).findings)


@pytest.fixture
def clean(project) -> str:
    """The small project, without the answers that its personas share, and with random adapters that fit the base."""
    folder = Path(project).parent
    names = [f"p{i}" for i in range(6)]
    splits = ["train"] * 8 + ["validation"] * 2 + ["test"] * 2
    rows = [(n, f"w{i} w{j} w{i + j}?", f"w{(7 * i + 3 * j) % 56} w{(i * j) % 56} w{j}.", s)
            for i, n in enumerate(names) for j, s in enumerate(splits)]  # fmt: skip
    (folder / "personas.jsonl").write_text("")
    add_rows(project, *rows)
    return project


# The command


def test_a_project_that_is_in_order_is_ready_and_json_says_the_same(clean, capsys):
    assert check(clean) == 0
    printed = capsys.readouterr().out
    assert check(clean, as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sign"] != "bad"
    assert [one["name"] for one in told["sections"]] == [
        "recipes", "adapters", "prompts", "splits", "leaks", "power"
    ]  # fmt: skip
    for one in told["sections"]:
        assert one["name"] in printed
        assert all(finding["todo"] for finding in one["findings"] if finding["sign"] != "ok")
    assert {step["name"] for step in told["estimate"]["steps"]} >= {"merge", "evaluate", "compare"}


def test_what_is_bad_ends_with_status_2_and_a_warning_does_not(clean, capsys):
    assert section(checked(clean), "power").sign == "warn"
    assert check(clean) == 0
    add_rows(clean, ("p0", "w0 w10 w10?", "w30 w0 w10.", "train"))  # its first test row
    assert check(clean) == 2
    assert "Not ready: leaks" in capsys.readouterr().out


def test_everything_fits_80_columns(clean):
    add_rows(clean, ("p0", "w1 " * 200, "w1 " * 30, "train"), ("p" * 60, "w3", "w4 w9 w9 w9", "test"))
    found = checked(clean)
    stream = io.StringIO()
    Console(file=stream, width=80, highlight=False).print(
        report(found.sections, found.examples, found.estimate, found.sign, 80)
    )
    assert max(map(len, stream.getvalue().splitlines())) <= 80


def test_what_the_run_would_refuse_is_said(clean):
    change(clean, recipes={"anchored": {"strategy": "simple_average", "anchor": "nowhere"}})
    assert "bad: recipe anchored: its anchor 'nowhere' is not there." in texts(checked(clean), "recipes")
    change(clean, recipes={"own": {"strategy": "own"}}, training={"target_modules": ["q_prj"]})
    found = checked(clean)
    assert "bad: training.target_modules names 'q_prj'" in texts(found, "base")
    assert found.exit_status == 2


def test_an_empty_answer_is_refused_by_name(clean):
    add_rows(clean, ("p0", "w1", " ", "train"))
    with pytest.raises(PersonaError, match="empty"):
        checked(clean)


# Prompts


def test_three_prompts_are_shown_with_their_tokens_and_the_end(clean):
    change(clean, generation={"prompt_format": "user {prompt} assistant"})
    found = checked(clean)
    assert [one.which for one in found.examples] == ["first", "median", "longest"]
    first = found.examples[0]
    assert first.prompt.replace(" ", "") == "userw0w0w0?assistant"
    assert first.answer.replace(" ", "") == "w0w0w0.</s>"
    assert (first.prompt_tokens, first.answer_tokens) == (6, 5)


def test_a_doubled_opening_token_is_found(clean):
    change(clean, generation={"prompt_format": "<s>{prompt}"})
    assert section(checked(clean), "prompts").facts["doubled_opening"] == 0  # the text's own replaces the tokenizer's
    change(clean, generation={"prompt_format": "<s><s>{prompt}"})
    found = checked(clean)
    assert "bad: 72 prompts begin with <s><s>" in texts(found, "prompts")
    assert found.exit_status == 2


@pytest.mark.parametrize("most", [10**6, 20])
def test_rows_beyond_the_context_are_counted_and_the_worst_is_named(clean, most, monkeypatch):
    monkeypatch.setattr(prompts, "MOST", most)
    monkeypatch.setattr(prompts, "_LONGEST", 5)
    add_rows(clean, ("p1", "w1 " * 130, "w2", "train"), ("p2", "w1 " * 150, "w2", "validation"))
    found = checked(clean)
    assert "2 training or validation rows longer than 128 tokens, the worst 152 tokens, of p2" in texts(
        found, "prompts"
    )
    assert "1 prompt to be answered longer than the 124 tokens" in texts(found, "prompts")
    assert section(found, "prompts").sign == "bad"
    change(clean, training={"max_length": 500, "rank": 2})  # what the base knows is the limit all the same
    assert "2 training or validation rows longer than 128 tokens" in texts(checked(clean), "prompts")
    change(clean, training={"truncate": True, "rank": 2})
    assert section(checked(clean), "prompts").sign == "warn"


@pytest.mark.parametrize(("count", "most"), [(30, 40), (1_000, 100), (977, 64)])
def test_rows_looked_at_stand_for_all_and_the_longest_are_among_them(count, most, monkeypatch):
    monkeypatch.setattr(prompts, "MOST", most)
    monkeypatch.setattr(prompts, "_LONGEST", 10)
    sizes = np.random.default_rng(0).permutation(count)
    chosen, weight = prompts._chosen(sizes.tolist())
    assert len(chosen) <= most
    assert weight.sum() == pytest.approx(count)
    assert set(np.argsort(-sizes)[:10]) <= set(chosen)
    assert np.average(sizes[chosen], weights=weight) == pytest.approx(sizes.mean(), rel=0.02)


# Adapters


def adapter(name, shapes, rank=2, base="base"):
    modules = {path: LoraModule(torch.ones(rank, i), torch.ones(o, rank), 1.0) for path, (o, i) in shapes.items()}
    return LoraAdapter(name, modules, base_model=base, task_type="CAUSAL_LM")


def test_what_does_not_fit_base_or_bank_is_named(clean):
    folder = Path(clean).parent / "adapters"
    for name, shape, path in (("p1", (32, 31), "model.layers.0.self_attn.q_proj"), ("p2", (8, 8), "model.other")):
        for file in (folder / name).iterdir():
            file.unlink()
        save_adapter(adapter(name, {path: shape}), str(folder / name))
    (folder / "p3" / "adapter_model.safetensors").write_bytes(b"nothing")
    said = texts(checked(clean), "adapters")
    assert "bad: cannot be read: p3: adapter_model.safetensors is truncated" in said
    assert "of another shape: p1" in said
    assert "bad: 1 adapters do not fit base: p1" in said.replace("1 adapter do", "1 adapters do")
    assert "p2: the model has no linear layer model.other" in said or "do not fit base: p2" in said


def test_headers_alone_are_read(clean):
    """Weights that no merge could use are not looked at: thousands of adapters would take hours."""
    place = Path(clean).parent / "adapters" / "p1" / "adapter_model.safetensors"
    data = bytearray(place.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    place.write_bytes(data)
    assert section(checked(clean), "adapters").sign != "bad"


def test_a_folder_of_foreign_adapters_is_described_without_base_and_texts(tmp_path, test_data):
    (tmp_path / "raymerge.yaml").write_text(yaml.safe_dump({
        "adapters": str(test_data / "adapters") + "/{persona}", "recipes": {"mean": {"strategy": "simple_average"}},
    }))  # fmt: skip
    found = checked(str(tmp_path / "raymerge.yaml"))
    facts = section(found, "adapters").facts
    assert facts["formats"] == {"peft": 2, "mlx": 1}
    assert set(facts["ranks"]) == {"8", "1"}
    assert texts(found, "adapters").count("of another shape") == 2
    assert section(found, "base").sign == "warn"
    assert found.estimate is None


# Splits


def test_who_lacks_a_split_and_clusters_of_one_are_named(clean):
    add_rows(clean, ("late", "w1 w1", "w9 w9", "train"))
    folder = Path(clean).parent
    clusters = json.loads((folder / "clusters.json").read_text()) | {"late": "cluster_09"}
    (folder / "clusters.json").write_text(json.dumps(clusters))
    said = texts(checked(clean), "splits")
    for expected in ("without validation rows: late", "without test rows: late", "fewer than 5 training rows: late",
                     "clusters of one persona: cluster_09"):  # fmt: skip
        assert f"warn: {expected}" in said


ALL = tuple(f"p{i}" for i in range(6))


@pytest.mark.parametrize("training", [{"patience": 2}, {"epochs": [2, 4]}])
@pytest.mark.parametrize(
    ("trained", "without"),
    [((), ALL), (ALL, ALL), (("p3",), ("p3",)), (("p3",), ("p2",)), (("p2", "p3"), ("p3",)), (ALL, ("p2",))],
)
@pytest.mark.parametrize("is_there", [False, True])
def test_missing_validation_rows_are_bad_where_training_refuses_them(clean, training, trained, without, is_there):
    """trained: whose adapters training makes, or made before; the others were made elsewhere."""
    folder = Path(clean).parent
    change(clean, training=training)
    marker = {"files": {}, "grouping": "persona", "training": {"start_from": None}}
    for name in trained:
        if is_there:
            (folder / "adapters" / name / "manifest.json").write_text(json.dumps(marker))
        else:
            shutil.rmtree(folder / "adapters" / name)
    lines = [json.loads(line) for line in (folder / "personas.jsonl").read_text().splitlines()]
    kept = [row for row in lines if row["split"] != "validation" or row["persona"] not in without]
    (folder / "personas.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    opened = open_project(clean)
    found = section(checked(clean), "splits").sign
    if found == "bad":
        with pytest.raises(PersonaError, match="validation examples"):
            check_training(opened, {"persona": None})
    else:
        assert found == "warn"
        check_training(opened, {"persona": None})


CHOOSING = {
    "several epochs": {"training": {"epochs": [2, 4], "rank": 2}, "recipes": {"u": {"strategy": "unified"}}},
    "tuned": {"recipes": {"t": {"strategy": "cluster_average", "scale": "tuned"}}},
    "selective": {"recipes": {"base": {"strategy": "base"}, "own": {"strategy": "own"},
                              "s": {"strategy": "selective", "among": ["base", "own"]}}},
    "own epochs": {"recipes": {"p": {"strategy": "prefix", "tokens": 4, "epochs": [1, 2]}}},
}  # fmt: skip


@pytest.mark.parametrize("what", CHOOSING)
def test_one_without_validation_rows_is_left_out_and_only_nobody_is_bad(clean, what):
    change(clean, **CHOOSING[what])
    file = Path(clean).parent / "personas.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for left_out, sign in (("p3",), "warn"), ((f"p{i}" for i in range(6)), "bad"):
        without = set(left_out)
        kept = [row for row in lines if row["split"] != "validation" or row["persona"] not in without]
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        found = checked(clean)
        assert section(found, "splits").sign == sign
        assert (found.exit_status == 2) == (sign == "bad")


def test_patience_needs_validation_rows_of_everybody_whose_own_adapter_is_to_be_trained(clean):
    folder = Path(clean).parent
    change(clean, training={"patience": 2, "rank": 2})
    lines = [json.loads(line) for line in (folder / "personas.jsonl").read_text().splitlines()]
    kept = [row for row in lines if (row["persona"], row["split"]) != ("p3", "validation")]
    (folder / "personas.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert section(checked(clean), "splits").sign == "warn"  # its adapter is there
    shutil.rmtree(folder / "adapters" / "p3")
    found = checked(clean)
    assert "bad: without validation rows: p3 (1 persona), and training.patience" in texts(found, "splits")
    assert found.exit_status == 2
    change(clean, recipes={"unified": {"strategy": "unified"}})
    assert section(checked(clean), "splits").sign == "warn"  # the others' rows stop it


# The model


@pytest.fixture(scope="module")
def chats(test_data, tmp_path_factory) -> Path:
    """Three real people with adapters of a real small Llama, trained elsewhere on their prompts as they are; and the
    same adapters turned round, which unlearn what these learned."""
    folder = tmp_path_factory.mktemp("chats")
    (folder / "base").symlink_to(test_data / "stories260k")
    lines = (test_data / "ubuntu-irc" / "personas.jsonl").read_text().splitlines()[:120]
    (folder / "personas.jsonl").write_text("\n".join(lines))
    rows = [json.loads(line) for line in lines]
    groups = [
        TrainingGroup(
            name, [(r["prompt"], r["response"]) for r in rows if (r["persona"], r["split"]) == (name, "train")]
        )
        for name in sorted({row["persona"] for row in rows})
    ]
    base = load_base(str(folder / "base"))
    for one in train(base, groups, TrainingSettings(epochs=8, learning_rate=4e-3)):
        turned = {path: LoraModule(m.A, -m.B, m.scaling) for path, m in one.adapter.modules.items()}
        save_adapter(one.adapter, str(folder / "own" / one.adapter.name))
        save_adapter(LoraAdapter(one.adapter.name, turned), str(folder / "turned" / one.adapter.name))
    return folder


@pytest.fixture
def quick(monkeypatch):
    """A calibration with one adapter, since these tests look at losses."""
    monkeypatch.setattr("raymerge.runtime.checking._ADAPTERS", (1,))


def ask(folder, adapters="own", prompt_format="{prompt}", **options):
    told = {"base_model": "base", "personas": "personas.jsonl", "adapters": f"{adapters}/{{persona}}",
            "generation": {"prompt_format": prompt_format, "max_new_tokens": 8},
            "recipes": {"own": {"strategy": "own"}}}  # fmt: skip
    (folder / "raymerge.yaml").write_text(yaml.safe_dump(told))
    return checked(str(folder / "raymerge.yaml"), model=True, **options)


def test_own_adapters_with_the_prompts_of_their_training_are_in_order(chats, quick):
    found = ask(chats, local=True)
    assert section(found, "model").sign != "bad", texts(found, "model")
    assert "all 3 beat it" in texts(found, "model")
    assert found.estimate.speeds.source == "calibrated"
    assert found.estimate.speeds.train > 0


@pytest.mark.parametrize("wrong", ["User: {prompt}\nAssistant:", "<{prompt}> I say:"])
def test_a_wrong_prompt_format_is_found_and_the_right_one_named(chats, wrong, quick):
    found = ask(chats, prompt_format=wrong, local=True)
    assert found.exit_status == 2
    assert "bad: own adapters do better on prompts in the form '{prompt}'" in texts(found, "model")
    assert len(found.examples) == 3


def test_adapters_that_do_not_beat_the_base_are_bad(chats, quick):
    found = ask(chats, adapters="turned", local=True)
    assert found.exit_status == 2
    assert "0 of 3 beat it" in texts(found, "model")


def test_without_adapters_the_base_is_timed_and_nothing_is_compared(clean):
    change(clean, adapters="none/{persona}")
    found = checked(clean, model=True, local=True)
    assert "no adapter to compare" in texts(found, "model")
    assert found.exit_status == 0
    assert all(step["source"] == "calibrated" for step in found.to_json()["estimate"]["steps"]
               if step["worker"] == "model")  # fmt: skip


def test_a_base_that_cannot_be_loaded_is_bad():
    assert check_model(None, "base: cannot be loaded\nmore").sign == "bad"


@pytest.mark.ray
def test_the_model_is_asked_on_a_worker(chats):
    assert "all 3 beat it" in texts(ask(chats), "model")
