"""`raymerge search` in real processes: killed on Ray, gone on with, and raised in trials."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from tests.e2e.conftest import WORLD, kill_with_children, raymerge, start, wait_for

pytestmark = pytest.mark.e2e
TRIALS = 6


def world_in(folder: Path, demo: Path) -> Path:
    """The quick demo with its adapters and without its runs; returns the project file."""
    folder.mkdir()
    for name in (*WORLD, "adapters", "unified", "clusters"):
        os.symlink(demo / name, folder / name)
    (folder / "raymerge.yaml").unlink()
    shutil.copytree(demo / "runs/_shared", folder / "runs/_shared")
    project = yaml.safe_load((demo / "raymerge.yaml").read_text())
    project["hardware"] = {
        "max_model_workers": 1,
        "max_merge_workers": 1,
    }  # each takes long to start, and has little to do
    project["search"] |= {"trials": TRIALS, "smallest": 6, "ranks": ["exact"]}
    (folder / "raymerge.yaml").write_text(yaml.safe_dump({**project, "recipes": {}}))
    return folder / "raymerge.yaml"


def trials_of(project: Path) -> list[dict]:
    """Rows of `trials.parquet` without what depends on how often it was begun."""
    rows = pq.read_table(project.parent / "runs/search/trials.parquet").to_pylist()
    return [{name: value for name, value in row.items() if name not in ("seconds", "answers")} for row in rows]


def finished(project: Path) -> dict[Path, int]:
    """Evaluations that are complete, and when each was written."""
    places = (project.parent / "runs/search/evaluations").glob("*/manifest.json")
    return {p: p.stat().st_mtime_ns for p in places if "unfinished" not in json.loads(p.read_text())}


def model_workers(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::Host"):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def until(process: subprocess.Popen, log: Path, project: Path, count: int) -> None:
    """Wait for so many finished evaluations of a search that is under way."""

    def are_there() -> bool:
        assert process.poll() is None, log.read_text()
        return len(finished(project)) >= count

    wait_for(are_there, 120, f"{count} evaluations")


def test_killed_twice_it_ends_as_an_undisturbed_search(quick_demo, tmp_path):
    """The driver is killed, then a model worker; what comes out is what `--local` finds without Ray."""
    project, log = world_in(tmp_path / "killed", quick_demo), tmp_path / "log"
    first = start("search", project, "--concurrency", "1", log=log)
    until(first, log, project, 3)
    kill_with_children(first)
    known = finished(project)
    assert len(known) >= 3
    assert not (project.parent / "runs/search/search.json").exists()
    second = start("search", project, "--concurrency", "1", log=log)
    until(second, log, project, len(known) + 2)
    workers = model_workers(second)
    assert workers
    workers[0].kill()
    assert second.wait(300) == 0, log.read_text()
    later = finished(project)
    assert {place: later[place] for place in known} == known
    undisturbed = world_in(tmp_path / "local", quick_demo)
    done = raymerge("search", undisturbed, "--local")
    assert done.returncode == 0, done.stdout + done.stderr
    expected, found = trials_of(undisturbed), trials_of(project)
    assert [row["number"] for row in found] == list(range(TRIALS))
    assert found == expected
    recipes = [(p.parent / "runs/search/best_recipe.yaml").read_bytes() for p in (project, undisturbed)]
    assert recipes[0] == recipes[1]
    # it goes on with more trials
    before = finished(project)
    job = raymerge("search", project, "--trials", TRIALS + 3, "--local")
    assert job.returncode == 0, job.stdout + job.stderr
    assert len(trials_of(project)) == TRIALS + 3
    assert trials_of(project)[:TRIALS] == found
    after = finished(project)
    assert {place: after[place] for place in before} == before
    rows = {row["name"] for row in json.loads((project.parent / "runs/comparison.json").read_text())["rows"]}
    assert rows == {"searched", "searched_random_k", "searched_unified"}
    assert "Traceback" not in job.stderr + log.read_text()


def test_bad_input_ends_with_status_2_before_anything_starts(quick_demo, tmp_path):
    project = world_in(tmp_path / "bad", quick_demo)
    value = yaml.safe_load(project.read_text())
    value["search"]["space"]["kk"] = [1]
    project.write_text(yaml.safe_dump(value))
    done = raymerge("search", project)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith(f"raymerge: {project}: search.space: unknown parameter 'kk'")
    assert not (project.parent / "runs/search").exists()
