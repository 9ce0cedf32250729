"""Bad input is refused before any item starts, and a plan tells what it can."""

import json
from pathlib import Path

import pytest
import yaml

from raymerge.errors import (
    AdapterError,
    PersonaError,
    ProjectError,
    RaymergeError,
    RecipeError,
    RoutingError,
    StorageError,
)
from raymerge.pipelines.init import init
from raymerge.pipelines.merge import merge
from raymerge.pipelines.opening import open_project
from raymerge.pipelines.run import run
from raymerge.runtime.bases import base_digest
from tests.pipelines.conftest import NAMES, make_adapter, write_project

NEAR = {"strategy": "top_k", "k": 2}


def change(project: str, **keys) -> None:
    value = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**value, **keys}))


def keep_splits(project: str, *splits: str) -> None:
    examples = Path(project).parent / "personas.jsonl"
    rows = [json.loads(line) for line in examples.read_text().splitlines()]
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows if row["split"] in splits))


def shared(project: str) -> Path:
    return Path(project).parent / "runs/_shared"


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ({"dtype": "flaot"}, RecipeError, r"unknown dtype 'flaot'. Did you mean float\d\d\?"),
        ({"anchor": "absent"}, AdapterError, "recipe x: its anchor 'absent' is not there"),
        ({"embedding": "absent.parquet"}, StorageError, "absent.parquet: cannot be read"),
    ],
)
def test_a_recipe_that_would_fail_every_item(project, recipe, error, message):
    change(project, recipes={"near": NEAR, "x": {"strategy": "top_k", **recipe}})
    with pytest.raises(error, match=message):
        merge(project, local=True)
    assert not shared(project).exists()


def test_a_changed_recipe(project):
    change(project, recipes={"near": NEAR, "avg": {"strategy": "simple_average"}})
    assert merge(project, recipes=["avg"], local=True) == 0
    change(project, recipes={"near": NEAR, "avg": {"strategy": "simple_average", "rank": 1}})
    (shared(project) / "timings.jsonl").unlink(missing_ok=True)
    with pytest.raises(RecipeError, match="another recipe of the name avg"):
        merge(project, local=True)
    assert not (shared(project) / "embeddings").exists()


@pytest.mark.parametrize(
    ("splits", "message"), [(("train",), "examples of split test"), (("test",), "training examples")]
)
def test_no_examples_of_a_split(project, splits, message):
    keep_splits(project, *splits)
    change(project, recipes={"near": NEAR})
    with pytest.raises(PersonaError, match=f"nobody has {message}"):
        run(project, local=True)
    assert not shared(project).exists()


def test_a_run_without_examples(adapters):
    (adapters / "base").mkdir()
    (adapters / "base/config.json").write_text("{}")
    location = write_project(adapters, base_model="base", recipes={"near": NEAR})
    with pytest.raises(ProjectError, match="evaluation needs `personas`"):
        run(location, local=True)
    assert not shared(location).exists()


def test_a_file_of_clusters_that_names_a_stranger(project):
    folder = Path(project).parent
    (folder / "clusters.json").write_text(json.dumps({"a": [*NAMES[:3], "p55"], "b": list(NAMES[3:])}))
    change(project, recipes={"near": {"strategy": "sparse_moe", "k": 2}})
    with pytest.raises(RoutingError, match=r"'p55' is no persona. Did you mean p5\?"):
        merge(project, local=True)
    assert not shared(project).exists()


@pytest.mark.parametrize(
    ("source", "message"), [("delta", r"Did you mean deltas\?"), ("absent.parquet", "cannot be read")]
)
def test_an_unknown_source_of_embeddings(project, source, message):
    change(project, embedding={"source": source}, recipes={"near": NEAR})
    with pytest.raises(RaymergeError, match=message):
        merge(project, local=True)
    assert not shared(project).exists()


@pytest.mark.parametrize("name", ["cluster_x", "unified", "base", "all"])
def test_an_adapter_whose_name_means_another_one(adapters, name):
    from raymerge.adapters import save_adapter

    save_adapter(make_adapter(name, 1), str(adapters / "adapters" / name))
    location = write_project(adapters, recipes={"avg": {"strategy": "simple_average"}})
    with pytest.raises(AdapterError, match=f"the name {name} is taken"):
        merge(location, local=True)


def test_a_plan_right_after_init_says_that_embeddings_come_first(adapters, capsys):
    location, _ = init(str(adapters))
    change(location, recipes={"near": NEAR, "avg": {"strategy": "simple_average"}})
    assert merge(location, plan=True) == 0
    out = capsys.readouterr().out
    assert "near: 6 personas, k = 2, 6 experts; embeddings come first" in out
    assert "avg: 6 personas, 1 merges of 6 contributors" in out
    assert not shared(location).exists()


def test_a_plan_writes_nothing_where_embeddings_are_there(adapters, capsys):
    location, _ = init(str(adapters))
    change(location, clusters={"count": 2}, recipes={"near": NEAR})
    assert merge(location, local=True) == 0
    change(location, recipes={"moe": {"strategy": "sparse_moe", "k": 1}})
    before = {p: p.stat().st_mtime_ns for p in adapters.rglob("*")}
    assert merge(location, plan=True) == 0
    assert "moe: 6 personas, " in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in adapters.rglob("*")} == before | {
        adapters / "runs": (adapters / "runs").stat().st_mtime_ns  # the probe whether it can be written
    }


def test_a_base_model_on_the_hub_is_named_by_its_id(project):
    folder = Path(project).parent
    change(project, base_model="someone/small-model")
    assert open_project(project).need_base("training") == "someone/small-model"
    assert base_digest("someone/small-model") != base_digest("someone/other-model")
    (folder / "someone").mkdir()
    with pytest.raises(ProjectError, match="base_model 'someone/small-model' is not there"):
        open_project(project).need_base("training")
