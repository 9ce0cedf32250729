"""Recipes over adapters that mean nothing without the base: DoRA, and tensors stored whole."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from raymerge.adapters import load_adapter, read_adapter, save_adapter
from raymerge.adapters.base_weights import BaseWeights
from raymerge.pipelines import planning
from raymerge.pipelines.evaluate import evaluate
from raymerge.pipelines.merge import merge
from tests.pipelines.conftest import NAMES, SHAPES


def change(project: str, **keys) -> None:
    value = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**value, **keys}))


def make_dora(project: str, name: str) -> None:
    folder = Path(project).parent / "adapters" / name
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    norms = {
        f"base_model.model.{path}.lora_magnitude_vector": 1.1
        * BaseWeights(str(folder.parents[1] / "base")).weight(f"{path}.weight").norm(dim=1)
        for path in SHAPES
    }
    save_file({**load_file(weights), **norms}, weights)
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))


def make_whole(project: str, name: str) -> None:
    folder = Path(project).parent / "adapters" / name
    head = {"lm_head.weight": torch.randn(64, 32, generator=torch.Generator().manual_seed(int(name[1:])))}
    save_adapter(replace(load_adapter(str(folder)), whole=head, modules_to_save=("lm_head",)), str(folder))


def summary(project: str, run: str, where: str = "evaluation") -> dict:
    return json.loads((Path(project).parent / "runs" / run / where / "summary.json").read_text())


def test_dora_is_merged_and_scored_with_the_base_of_the_project(project):
    for name in NAMES[:3]:
        make_dora(project, name)
    assert merge(project, recipes=["small", "own"], local=True) == 0
    assert evaluate(project, local=True) == 0
    for run in ("small", "own"):
        assert (summary(project, run)["failed"], summary(project, run)["personas"]) == ({}, 6)
    folder = Path(project).parent
    merged = load_adapter(str(folder / "runs/small/adapters/cluster_00"))
    assert {header.rank for header in merged.headers.values()} == {1}
    assert evaluate(project, recipes=["small", "own"], local=True) == 0
    for run in ("small", "own"):
        here, there = (summary(project, run, where)["mean"]["nll"] for where in ("evaluation_in_memory", "evaluation"))
        assert here == pytest.approx(there, rel=1e-5)


def test_dora_as_it_is_scores_as_its_delta(project):
    make_dora(project, "p0")
    assert merge(project, recipes=["own"], local=True) == 0
    assert evaluate(project, local=True) == 0
    before = summary(project, "own")["mean"]["nll"]
    folder = Path(project).parent
    one = read_adapter(str(folder / "adapters/p0"), base=BaseWeights(str(folder / "base")))
    save_adapter(one, str(folder / "adapters/p0"))  # plain LoRA of full rank
    assert evaluate(project, local=True) == 0
    assert summary(project, "own")["mean"]["nll"] == pytest.approx(before, rel=1e-5)


def test_what_cannot_be_written_is_not_scored_as_a_mixture(project):
    make_dora(project, "p4")
    assert merge(project, recipes=["exact"], local=True) == 1
    assert evaluate(project, recipes=["exact"], local=True) == 1
    failed = summary(project, "exact", "evaluation_in_memory")["failed"]
    assert set(failed) == {"p3", "p4", "p5"}
    assert all("p4: " in why and "rank exact" in why for why in failed.values())


def test_what_models_cannot_run_is_merged_and_its_personas_fail_alone(project):
    for name in NAMES[:3]:
        make_whole(project, name)
    assert merge(project, recipes=["small"], local=True) == 0
    assert load_adapter(str(Path(project).parent / "runs/small/adapters/cluster_00")).whole
    assert evaluate(project, local=True) == 1
    failed = summary(project, "small")["failed"]
    assert set(failed) == {"p0", "p1", "p2"}
    assert all("cannot be scored, since it holds whole tensors (lm_head.weight)" in why for why in failed.values())
    assert summary(project, "small")["personas"] == 3


def test_without_a_base_model_what_needs_it_fails_by_name(project, capsys):
    make_dora(project, "p4")
    change(project, base_model=None, personas=None)
    assert merge(project, recipes=["exact"], local=True) == 1
    lines = capsys.readouterr().err.splitlines()
    failed = [line for line in lines if line.startswith("failed: ")]
    assert failed == [
        "failed: merge/exact/cluster_01: p4: is a DoRA adapter, whose deltas depend on the base's weights, and the "
        "project has no `base_model`."
    ]


def test_what_becomes_of_rows_is_planned_once_in_a_recipe(project, monkeypatch):
    asked, real = [], planning._experts
    monkeypatch.setattr(planning, "_experts", lambda *row: asked.append(row[2].adapter) or real(*row))
    assert merge(project, recipes=["exact"], local=True) == 0
    assert asked == ["cluster_00", "cluster_01"]
    asked.clear()
    assert evaluate(project, runs=["exact"], local=True) == 0  # test and validation examples
    assert (Path(project).parent / "runs/exact/validation").exists()
    assert asked == ["cluster_00", "cluster_01"]


def test_notes_of_methods_are_said_once(project, capsys):
    recipes = {
        f"r{n}": {"strategy": "cluster_average", "method": m}
        for n, m in enumerate(["ties", "della", "ties", "karcher"])
    }
    change(project, recipes={**recipes, "plain": {"strategy": "cluster_average"}})
    assert merge(project, plan=True) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("method ")]
    assert [line.partition(": ")[0] for line in said] == ["method ties, della", "method karcher"]
    assert said[1].endswith("Only the ratios of the weights count: weights twice as large give the same result.")
    assert merge(project, recipes=["r3"], local=True) == 0
    assert "note: method karcher: Only the ratios" in capsys.readouterr().err
