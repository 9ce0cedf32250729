"""The commands' pipelines in this process, on small real inputs."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from raymerge.adapters import load_adapter, save_adapter
from raymerge.errors import AdapterError, EvaluationError, ProjectError, RecipeError
from raymerge.pipelines.compare import compare
from raymerge.pipelines.evaluate import evaluate
from raymerge.pipelines.init import init
from raymerge.pipelines.merge import merge
from raymerge.pipelines.run import run
from raymerge.pipelines.train import train
from tests.pipelines.conftest import NAMES, make_adapter, write_project


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def metrics(evaluation: Path):
    return pq.read_table(evaluation / "metrics.parquet")


def change(project: str, **keys) -> None:
    value = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**value, **keys}))


def test_a_folder_of_adapters_alone_is_routed_by_its_deltas(adapters, capsys):
    before = files(adapters)
    location, lines = init(str(adapters))
    assert lines[0] == "6 adapters in adapters/{persona}"
    change(location, clusters={"count": 2}, recipes={"near": {"strategy": "top_k", "k": 2, "rank": "keep"}})
    assert merge(location, local=True) == 0
    routed = pq.read_table(adapters / "runs/near/routing.parquet").to_pylist()
    asked = {name: {r["expert"] for r in routed if r["persona"] == name} for name in NAMES}
    assert asked["p0"] == {"p1", "p2"}
    assert asked["p4"] == {"p3", "p5"}
    assert {name: before[name] for name in before} == {n: b for n, b in files(adapters).items() if n in before}
    merged = load_adapter(str(adapters / "runs/near/adapters/p0"))
    assert merged.headers["model.layers.0.self_attn.q_proj"].rank == 4


def test_init_says_what_it_lacks(tmp_path):
    with pytest.raises(ProjectError, match="holds no adapters"):
        init(str(tmp_path))
    write_project(tmp_path)
    with pytest.raises(ProjectError, match="is there already"):
        init(str(tmp_path))


def test_run_trains_merges_evaluates_and_compares(project, capsys):
    folder = Path(project).parent
    before = files(folder / "adapters")
    change(project, recipes={
        "unified": {"strategy": "unified"}, "cluster_trained": {"strategy": "cluster_trained"},
        "near": {"strategy": "sparse_moe", "k": 2}, "base": {"strategy": "base"},
    })  # fmt: skip
    assert run(project, local=True) == 0
    assert "Report:" in capsys.readouterr().out
    assert files(folder / "adapters") == before  # adapters of others are used, never trained over
    assert {p.name for p in (folder / "clusters").iterdir()} == {"cluster_00", "cluster_01"}
    assert (folder / "unified/manifest.json").exists()
    scored = pq.read_table(folder / "runs/near/evaluation/metrics.parquet")
    assert scored.num_rows == 12
    summary = json.loads((folder / "runs/near/evaluation/summary.json").read_text())
    assert summary["personas"] == 6
    assert np.isclose(summary["mean"]["similarity"], scored["similarity"].to_numpy().mean())
    assert compare(project, runs=["near", "unified"], as_json=True) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["name"] for row in rows} == {"near", "unified"}


def test_an_exact_recipe_scores_the_same_as_mixture_and_as_merge(project):
    folder = Path(project).parent
    assert merge(project, recipes=["exact"], local=True) == 0
    assert evaluate(project, runs=["exact"], local=True) == 0
    assert evaluate(project, recipes=["exact"], local=True) == 0
    merged, mixed = (metrics(folder / "runs/exact" / place) for place in ("evaluation", "evaluation_in_memory"))
    np.testing.assert_allclose(merged["nll"].to_numpy(), mixed["nll"].to_numpy(), rtol=1e-5)
    assert merged["similarity"].to_pylist() == mixed["similarity"].to_pylist()


def test_what_is_scored_in_memory_is_the_compressed_adapter(project):
    folder = Path(project).parent
    assert evaluate(project, recipes=["small"], local=True) == 0
    assert not (folder / "runs/small/adapters").exists()
    assert merge(project, recipes=["small"], local=True) == 0
    assert evaluate(project, runs=["small"], local=True) == 0
    compressed, written = (metrics(folder / "runs/small" / place) for place in ("evaluation_in_memory", "evaluation"))
    np.testing.assert_allclose(compressed["nll"].to_numpy(), written["nll"].to_numpy(), rtol=1e-5)
    assert merge(project, recipes=["exact"], local=True) == 0
    assert evaluate(project, runs=["exact"], local=True) == 0
    exact = metrics(folder / "runs/exact/evaluation")
    assert not np.allclose(exact["nll"].to_numpy(), written["nll"].to_numpy(), rtol=1e-4)


def test_again_writes_nothing_and_a_lost_file_is_made_again(project):
    folder = Path(project).parent
    assert merge(project, recipes=["exact"], local=True) == 0
    run_folder = folder / "runs/exact"
    times = {p: p.stat().st_mtime_ns for p in run_folder.rglob("*") if p.is_file()}
    before = files(run_folder)
    assert merge(project, recipes=["exact"], local=True) == 0
    assert {p: p.stat().st_mtime_ns for p in run_folder.rglob("*") if p.is_file()} == times
    lost = run_folder / "adapters/cluster_00/adapter_model.safetensors"
    lost.unlink()
    assert merge(project, recipes=["exact"], local=True) == 0
    kept = {name for name in before if not name.endswith("timings.jsonl")}
    assert {name: files(run_folder)[name] for name in kept} == {name: before[name] for name in kept}


def test_a_changed_expert_is_merged_again(project):
    folder = Path(project).parent
    assert merge(project, recipes=["exact"], local=True) == 0
    before = files(folder / "runs/exact/adapters")
    save_adapter(make_adapter("p0", 99), str(folder / "adapters/p0"))
    assert merge(project, recipes=["exact"], local=True) == 0
    after = files(folder / "runs/exact/adapters")
    changed = {name.split("/")[0] for name in before if before[name] != after[name]}
    assert changed == {"cluster_00"}


def test_a_changed_recipe_in_an_old_folder_is_refused_with_the_difference(project):
    assert merge(project, recipes=["small"], local=True) == 0
    recipes = yaml.safe_load(Path(project).read_text())["recipes"]
    change(project, recipes={**recipes, "small": {"strategy": "cluster_average", "rank": 2}})
    with pytest.raises(RecipeError, match=r"rank: 1 there, 2 now"):
        merge(project, recipes=["small"], local=True)


def test_rows_of_one_adapter_as_it_is_are_not_copied(project):
    folder = Path(project).parent
    assert merge(project, recipes=["own", "base"], local=True) == 0
    assert not (folder / "runs/own/adapters").exists()
    own = pq.read_table(folder / "runs/own/assignments.parquet").to_pylist()
    assert {row["persona"]: row["location"] for row in own} == {name: f"adapters/{name}" for name in NAMES}
    base = pq.read_table(folder / "runs/base/assignments.parquet").to_pylist()
    assert {row["adapter"] for row in base} == {None}


def test_personas_start_from_the_unified_adapter_and_merge_around_it(project):
    folder = Path(project).parent
    change(project, adapters="started/{persona}", recipes={"mean": {"strategy": "simple_average", "rank": "exact"}})
    assert train(project, group_by="unified", local=True) == 0
    assert train(project, group_by="persona", start_from="unified", local=True) == 0
    unified = load_adapter(str(folder / "unified"))
    experts = [load_adapter(str(folder / "started" / name)) for name in NAMES]
    assert {expert.started_from for expert in experts} == {"unified"}
    assert merge(project, local=True) == 0
    merged = load_adapter(str(folder / "runs/mean/adapters/all"))
    manifest = json.loads((folder / "runs/mean/adapters/all/manifest.json").read_text())
    assert manifest["anchor"] is not None
    path = "model.layers.0.self_attn.q_proj"
    anchor = unified.modules[path].delta(torch.float64)
    moved = [expert.modules[path].delta(torch.float64) - anchor for expert in experts]
    direction = sum(moved) / len(moved)
    found = merged.modules[path].delta(torch.float64) - anchor
    cosine = (found * direction).sum() / found.norm() / direction.norm()
    assert cosine > 0.999
    assert found.norm() > direction.norm()


def test_clusters_are_frozen_and_newcomers_join_them(project):
    folder = Path(project).parent
    change(project, clusters={"count": 2}, recipes={"mean": {"strategy": "cluster_average"}})
    assert merge(project, local=True) == 0
    first = json.loads((folder / "runs/_shared/clusters/clusters.json").read_text())
    with open(folder / "personas.jsonl", "a") as file:
        file.write(json.dumps({"persona": "p9", "prompt": "w0?", "response": "w1 w2.", "split": "train"}) + "\n")
    change(project, recipes={"mean2": {"strategy": "cluster_average"}})
    assert merge(project, local=True) == 0
    second = json.loads((folder / "runs/_shared/clusters/clusters.json").read_text())
    assert {name: second[name] for name in first} == first
    assert second["p9"] in set(first.values())
    change(project, clusters={"count": 3}, recipes={"mean3": {"strategy": "cluster_average"}})
    with pytest.raises(ProjectError, match=r"other settings of `clusters`(.|\n)*--refit"):
        merge(project, local=True)
    assert merge(project, local=True, refit=True) == 0


def test_one_bad_adapter_fails_by_name_and_the_others_finish(project, capsys):
    folder = Path(project).parent
    weights = folder / "adapters/p1/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    assert merge(project, recipes=["exact"], local=True) == 1
    assert "failed: merge/exact/cluster_00: p1: " in capsys.readouterr().err
    assert evaluate(project, runs=["exact"], local=True) == 1
    summary = json.loads((folder / "runs/exact/evaluation/summary.json").read_text())
    assert set(summary["failed"]) == {"p0", "p1", "p2"}
    assert summary["personas"] == 3


def test_plan_says_and_does_nothing(project, capsys):
    folder = Path(project).parent
    assert merge(project, recipes=["exact", "own"], plan=True) == 0
    out = capsys.readouterr().out
    assert "exact: 6 personas, 2 merges of 6 contributors, 0 adapters used as they are" in out
    assert "own: 6 personas, 0 merges of 0 contributors, 6 adapters used as they are" in out
    assert not (folder / "runs/exact").exists()


def test_a_recipe_from_the_command_line(project):
    folder = Path(project).parent
    assert merge(project, extra={"strategy": "sparse_moe", "k": 1, "rank": "2"}, local=True) == 0
    assert json.loads((folder / "runs/sparse_moe_k1/recipe.json").read_text())["rank"] == 2
    with pytest.raises(RecipeError, match="needs --strategy"):
        merge(project, extra={"k": 1}, local=True)


def test_what_cannot_be_done_is_said_before_work_starts(project, tmp_path):
    with pytest.raises(EvaluationError, match="run exact has not been merged"):
        evaluate(project, runs=["exact"], local=True)
    with pytest.raises(EvaluationError, match="no run has been evaluated"):
        compare(project)
    with pytest.raises(RecipeError, match=r"unknown recipe 'exakt'. Did you mean exact\?"):
        merge(project, recipes=["exakt"], local=True)
    with pytest.raises(ProjectError, match="unknown grouping"):
        train(project, group_by="family", local=True)
    change(project, adapters="none/{persona}")
    with pytest.raises(AdapterError, match="there is no adapter"):
        merge(project, recipes=["exact"], local=True)
    change(project, base_model="nowhere")
    with pytest.raises(ProjectError, match="base_model 'nowhere' is not there"):
        train(project, group_by="unified", local=True)
