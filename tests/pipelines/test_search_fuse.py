"""`raymerge search --fuse`: the weights of a few adapters, without a project."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from raymerge.adapters import load_adapter, save_adapter
from raymerge.adapters.formats import encode_adapter
from raymerge.cli import main
from raymerge.search.results import read_summary, read_trials
from tests.pipelines.conftest import make_adapter


@pytest.fixture
def here(tmp_path, tiny_llama, monkeypatch) -> Path:
    """Two adapters in PEFT's form and one in MLX's, and four prompts with responses, in the working directory."""
    for seed, name in enumerate(["ann", "bob", "eve"]):
        save_adapter(make_adapter(name, seed), str(tmp_path / name), format="mlx" if name == "eve" else "peft")
    rows = [{"prompt": f"w{i} w{i + 3}?", "response": f"w{2 * i} w{i + 1}."} for i in range(4)]
    (tmp_path / "asks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "base").symlink_to(tiny_llama)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def search(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["search", "--fuse", *arguments, "--max-new-tokens", "4", "--local"])
    return int(end.value.code or 0)


ASKED = ("--prompts", "asks.jsonl", "--base", "base", "--trials", "4", "--sampler", "random")


def test_weights_on_the_simplex_and_the_command_that_fuses_with_them(here, capsys):
    assert search("ann", "elsewhere=bob", "eve", *ASKED, "--out", "found") == 0
    out = capsys.readouterr().out
    trials, summary = read_trials(str(here / "found/search")), read_summary(str(here / "found/search"))
    assert [trial.state for trial in trials] == ["complete"] * 4
    assert {trial.last.personas for trial in trials} == {4}
    written = yaml.safe_load((here / "found/search/best_recipe.yaml").read_text())["searched"]
    assert list(written["weights"]) == ["ann", "elsewhere", "eve"]
    assert sum(written["weights"].values()) == pytest.approx(1)
    assert summary.similarity == max(trial.last.values["similarity"] for trial in trials)
    assert summary.test is None
    weights = ", ".join(f"{name} {weight:.3g}" for name, weight in written["weights"].items())
    assert f"Winner: trial {summary.winner}, {weights}" in out  # and not the numbers that they are made from
    command = next(line for line in out.splitlines() if line.startswith("raymerge fuse "))
    words = shlex.split(command.replace("--out DIR", "--out fused"))
    with pytest.raises(SystemExit) as end:
        main(words[1:])
    assert not end.value.code
    fused = load_adapter("fused")
    assert {module.rank for module in fused.modules.values()} == {6}  # exact: nothing is lost that was scored
    listed = json.loads((here / "fused/manifest.json").read_text())["experts"]
    assert {one["name"]: one["weight"] for one in listed} == pytest.approx(written["weights"], abs=1e-4)


def test_weights_below_zero_are_searched_where_asked(here, capsys):
    assert search("ann", "bob", *ASKED, "--negative") == 0
    values = [list(trial.values.values()) for trial in read_trials(str(here / "fuse_search/search"))]
    assert min(map(min, values)) < 0
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("raymerge fuse "))
    assert re.search(r" --weights=-?[\d.]+,-?[\d.]+ ", command)


def test_the_same_command_goes_on_and_other_prompts_are_another_search(here, capsys):
    assert search("ann", "bob", *ASKED) == 0
    first = [(t.values, t.last.values) for t in read_trials(str(here / "fuse_search/search"))]
    assert search("ann", "bob", *ASKED[:-4], "--trials", "5", "--sampler", "random") == 0
    again = [(t.values, t.last.values) for t in read_trials(str(here / "fuse_search/search"))]
    assert again[:4] == first
    assert len(again) == 5
    (here / "asks.jsonl").write_text('{"prompt": "w1?", "response": "w2"}\n')
    capsys.readouterr()
    assert search("ann", "bob", *ASKED) == 2
    assert "--restart" in capsys.readouterr().err
    assert search("ann", "bob", *ASKED, "--restart") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ann", *ASKED), "one adapter has no weights to search"),
        (("ann", "bob", "--base", "base"), "there is nothing to score weights on"),
        (("ann", "bob", "--prompts", "asks.jsonl"), "base_model 'tiny' is not there"),
        (("ann", "other", "--prompts", "asks.jsonl"), "the adapters do not record one base model"),
        (("ann", "bob", "--prompts", "bare.jsonl", "--base", "base"), "prompt 2 has no response"),
        (("ann", "bob", "--prompts", "absent.jsonl", "--base", "base"), "there is no such file of prompts"),
        (("ann", "nobody", *ASKED), "nobody: there is no adapter"),
        (("ann", "unified=bob", *ASKED), "the name 'unified' is taken"),
        (("ann", "ann", *ASKED), "ann: two adapters have this name"),
        (("ann", "bob", *ASKED, "--prompt-format", "x"), "must be `chat` or a text with {prompt} in it; x"),
        (("ann", "bob", *ASKED[:-1], "annealing"), "--sampler annealing: Input should be"),
        (("ann", "bob", *ASKED, "--out", "asks.jsonl/below"), "cannot be written"),
    ],
)
def test_what_cannot_be_searched_is_refused(here, arguments, message, capsys):
    other = make_adapter("other", 9)
    files = encode_adapter(type(other)(**{**vars(other), "base_model": "else"}))
    (here / "other").mkdir()
    for name, data in files.items():
        (here / "other" / name).write_bytes(data)
    (here / "bare.jsonl").write_text('{"prompt": "w1?", "response": "w2"}\n{"prompt": "w2?"}\n')
    assert search(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "not foreseen" not in said
    assert not list(here.rglob("journal.jsonl"))
