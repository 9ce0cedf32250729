"""Trainings that begin from an adapter, and merges around an anchor."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from raymerge.adapters import load_adapter, save_adapter
from raymerge.errors import AdapterError, ProjectError
from raymerge.pipelines.merge import merge
from raymerge.pipelines.opening import open_project
from raymerge.pipelines.plan import Plan, Steps
from raymerge.pipelines.run import run
from raymerge.pipelines.train import train
from raymerge.pipelines.trainings import all_groupings
from tests.pipelines.conftest import NAMES, make_adapter

OWN = {"own": {"strategy": "own"}, "unified": {"strategy": "unified"}}


def change(project: str, **keys) -> None:
    value = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**value, **keys}))


def started(folder: Path) -> str | None:
    return load_adapter(str(folder)).started_from


def test_every_grouping_begins_where_it_is_told_to(project):
    folder = Path(project).parent
    assert train(project, group_by="unified", local=True) == 0
    assert train(project, group_by="cluster", start_from="./unified", local=True) == 0
    assert started(folder / "clusters/cluster_00") == "unified"
    with pytest.raises(ProjectError, match="cannot start from itself"):
        train(project, group_by="unified", start_from=str(folder / "unified"), local=True)
    for grouping in ("persona", "cluster", "unified"):
        with pytest.raises(AdapterError, match="there is no adapter to start from"):
            train(project, group_by=grouping, start_from="nowhere", local=True)


def test_a_run_begins_where_the_adapters_that_are_there_began(project, capsys):
    folder = Path(project).parent
    change(project, adapters="trained/{persona}", recipes=OWN)
    assert train(project, group_by="unified", local=True) == 0
    assert train(project, group_by="persona", start_from="unified", local=True) == 0
    before = {p: p.stat().st_mtime_ns for p in (folder / "trained").rglob("*.safetensors")}
    assert run(project, local=True) == 0
    assert "persona: training starts from unified, as that of the adapters there did" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (folder / "trained").rglob("*.safetensors")} == before
    manifest = folder / "trained/p1/manifest.json"
    value = json.loads(manifest.read_text())
    value["training"]["start_from"] = None
    manifest.write_text(json.dumps(value))
    with pytest.raises(ProjectError, match="began from different ones: p0 from unified, p1 from nothing"):
        run(project, local=True)


def test_a_start_is_compared_by_where_it_lies(project):
    change(project, adapters="trained/{persona}", training={"start_from": "./unified"}, recipes={"own": OWN["own"]})
    opened = open_project(project)
    assert all_groupings(opened) == ("persona", "unified")
    items = {item.id: item for item in Plan(opened, Steps(train=all_groupings(opened))).first()}
    assert items["train/unified"].after == frozenset()
    assert items["train/persona/0000"].after == {"train/unified"}


def test_a_merge_waits_for_its_anchor(project):
    change(project, recipes={"avg": {"strategy": "simple_average", "anchor": "./unified"}})
    opened = open_project(project)
    assert all_groupings(opened) == ("persona", "unified")
    steps = Steps(train=all_groupings(opened), merge=True, evaluate=True)
    items = {item.id: item for item in Plan(opened, steps).first()}
    assert items["merge/avg/all"].after == {"train/unified"}
    in_memory = Plan(opened, Steps(train=("unified",), evaluate=True)).first()
    assert next(i for i in in_memory if i.id.startswith("evaluate/")).after == {"train/unified"}


def test_adapters_from_a_start_are_tuned_as_they_are_published(project):
    """Each factor's similarity in tuning is that of the written merge start + f (own - start), and own itself at 1."""
    folder = Path(project).parent
    save_adapter(make_adapter("start", 77), str(folder / "start"))
    for name in NAMES:
        place = str(folder / "adapters" / name)
        save_adapter(replace(load_adapter(place), started_from="start"), place)
    own = {"strategy": "own", "rank": "exact"}
    fixed = {f"at_{f}": {**own, "scale": {"match_norm": f}} for f in (0.5, 1, 3)}
    evaluation = {"scales": [0.5, 1, 3], "personas_per_item": 4, "batch_size": 4, "split": "validation"}
    change(project, recipes={**fixed, "own": {**own, "scale": "tuned"}}, evaluation=evaluation)
    assert run(project, local=True) == 0
    told = json.loads((folder / "runs/own/tuning/tuning.json").read_text())
    for one in told["tried"]:
        run_folder = folder / f"runs/at_{one['factor']:g}"
        summary = json.loads((run_folder / "evaluation/summary.json").read_text())
        assert one["similarity"] == pytest.approx(100 * summary["mean"]["similarity"], abs=1e-3)
        assert (run_folder / "adapters/p0").exists() == (one["factor"] != 1)
    assert len({one["similarity"] for one in told["tried"]}) == 3


def test_tuning_waits_for_what_adapters_are_measured_from(project):
    change(project, recipes={"own": {"strategy": "own", "scale": "tuned", "anchor": "./unified"}})
    steps = Steps(train=("unified",), merge=True, evaluate=True)
    items = {item.id: item for item in Plan(open_project(project), steps).first()}
    assert items["tune/own/0000"].after == {"train/unified"}


def test_a_persona_without_training_examples_stops_nobody(project, capsys):
    folder = Path(project).parent
    with open(folder / "personas.jsonl", "a") as file:
        file.write(json.dumps({"persona": "z", "prompt": "w0?", "response": "w1 w2.", "split": "test"}) + "\n")
    change(
        project, adapters="trained/{persona}", clusters={"count": 2},
        recipes={"near": {"strategy": "sparse_moe", "k": 2}, "avg": {"strategy": "simple_average"}},
    )  # fmt: skip
    assert run(project, local=True) == 0
    said = capsys.readouterr().err
    assert "z: has no training examples (1 such personas)" in said
    assert "near: z: has no embedding and gets the base (1 such personas)" in said
    assert {p.name for p in (folder / "trained").iterdir()} == set(NAMES)
    adapters = json.loads((folder / "runs/near/routing_info.json").read_text())["personas"]
    assert adapters["z"]["adapter"] is None
    assert json.loads((folder / "runs/near/evaluation/summary.json").read_text())["personas"] == 7
    assert json.loads((folder / "runs/avg/routing_info.json").read_text())["personas"]["z"]["adapter"] == "all"


def test_adapters_of_nobody_are_left_out_by_name(project, capsys):
    folder = Path(project).parent
    examples = (folder / "personas.jsonl").read_text().splitlines()
    (folder / "personas.jsonl").write_text("".join(line + "\n" for line in examples if '"p5"' not in line))
    change(project, recipes={"avg": {"strategy": "simple_average"}})
    assert merge(project, local=True) == 0
    assert "p5: has no examples, so its adapter is left out (1 such adapters)" in capsys.readouterr().err
