"""`raymerge router` in real processes: its driver killed twice, and gone on with on Ray."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests.e2e.conftest import WORLD, kill_with_children, raymerge, start, wait_for

pytestmark = pytest.mark.e2e
TRIALS = 3
RUNS = {"learned_router", "learned_router_random_k", "learned_router_unified"}


def world_in(folder: Path, demo: Path) -> Path:
    """The quick demo with its adapters and without its runs; returns the project file."""
    folder.mkdir()
    for name in (*WORLD, "adapters", "unified", "clusters"):
        os.symlink(demo / name, folder / name)
    (folder / "raymerge.yaml").unlink()
    shutil.copytree(demo / "runs/_shared", folder / "runs/_shared")
    project = yaml.safe_load((demo / "raymerge.yaml").read_text())
    project["hardware"] |= {"max_model_workers": 1, "max_merge_workers": 1}  # each takes long to start
    project["search"] |= {"ranks": ["exact"], "concurrency": 1}  # one at a time, a tuning is exact by its seed
    project["router"] = {"k": 5, "trials": TRIALS, "checkpoint_every": 0}
    (folder / "raymerge.yaml").write_text(yaml.safe_dump({**project, "recipes": {}}))
    return folder / "raymerge.yaml"


def until(process: subprocess.Popen, log: Path, folder: Path, pattern: str, count: int) -> None:
    """Wait for so many files of a router that is under way."""

    def are_there() -> bool:
        assert process.poll() is None, log.read_text()
        return len(list(folder.glob(pattern))) >= count

    wait_for(are_there, 240, f"{count} of {pattern}")


def trials_of(project: Path) -> list[dict]:
    """Rows of `trials.parquet` without what depends on how often it was begun."""
    rows = pq.read_table(project.parent / "runs/router/tuning/trials.parquet").to_pylist()
    return [{name: value for name, value in row.items() if name not in ("seconds", "answers")} for row in rows]


def made(project: Path) -> dict[str, bytes]:
    """What must not depend on interruptions, nor on Ray."""
    runs = project.parent / "runs"
    names = ["router.safetensors", "router.json", "candidates.parquet", "recipe.yaml"]
    files = [*(runs / "router" / name for name in names), runs / "learned_router/routing.parquet"]
    files += sorted((runs / "learned_router/adapters").rglob("adapter_model.safetensors"))
    files += [runs / "learned_router/evaluation/metrics.parquet"]
    return {str(path.relative_to(runs)): path.read_bytes() for path in files}


def test_killed_while_it_trains_and_while_it_is_tuned_it_ends_as_an_undisturbed_one(quick_demo, tmp_path):
    project, log = world_in(tmp_path / "killed", quick_demo), tmp_path / "log"
    folder = project.parent / "runs/router"
    first = start("router", project, "--local", log=log)
    until(first, log, folder, "checkpoint-1/*", 1)  # so the other is whole
    kill_with_children(first)
    assert not (folder / "router.safetensors").exists()
    second = start("router", project, log=log)
    until(second, log, folder, "tuning/evaluations/*/similarity.parquet", 1)
    assert "goes on from its checkpoint" in log.read_text()
    kill_with_children(second)
    trained = (folder / "manifest.json").stat().st_mtime_ns
    third = raymerge("router", project)
    assert third.returncode == 0, third.stdout + third.stderr
    assert (folder / "manifest.json").stat().st_mtime_ns == trained
    assert third.stdout.splitlines()[0].startswith(("Better than", "Not better: learned_router"))
    undisturbed = world_in(tmp_path / "local", quick_demo)
    done = raymerge("router", undisturbed, "--local")
    assert done.returncode == 0, done.stdout + done.stderr
    assert trials_of(project) == trials_of(undisturbed)
    assert made(project) == made(undisturbed)
    assert len(trials_of(project)) == TRIALS
    rows = {row["name"] for row in json.loads((project.parent / "runs/comparison.json").read_text())["rows"]}
    assert rows == RUNS
    assert "Traceback" not in third.stderr + log.read_text()
