"""A workspace at a URI: the same commands, the same files as in a local folder."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from raymerge.adapters import save_adapter
from raymerge.errors import StorageError
from raymerge.pipelines.compare import compare
from raymerge.pipelines.evaluate import evaluate
from raymerge.pipelines.init import init
from raymerge.pipelines.merge import merge
from raymerge.pipelines.opening import open_project
from raymerge.pipelines.placing import Placing, embeddings_are_there
from raymerge.pipelines.run import run
from raymerge.pipelines.search import placed_for
from tests.pipelines.conftest import make_adapter


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Copies of remote files lie in the temporary folder, which is this test's own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("copies")))


def at_uri(project: str) -> str:
    value = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**value, "workspace": f"file://{Path(project).parent}/."}))
    return f"file://{project}"


def artefacts(runs: Path) -> dict[str, bytes]:
    """All files of the runs and of what they share, but the timings."""
    found = [p for name in ("small", "own", "_shared") for p in (runs / name).rglob("*") if p.is_file()]
    return {str(p.relative_to(runs)): p.read_bytes() for p in found if p.name != "timings.jsonl"}


def test_all_steps_on_a_file_uri_give_the_bytes_of_a_local_run(project, capsys):
    folder = Path(project).parent
    assert run(project, recipes=["small", "own"], local=True) == 0
    local = artefacts(folder / "runs")
    (folder / "runs").rename(folder / "local_runs")
    location = at_uri(project)
    assert merge(location, recipes=["small", "own"], plan=True) == 0
    assert run(location, recipes=["small", "own"], local=True) == 0
    assert artefacts(folder / "runs") == local
    assigned = pq.read_table(folder / "runs/own/assignments.parquet")["location"].to_pylist()
    assert assigned[0] == "adapters/p0"
    assert compare(location, runs=["small"], as_json=True) == 0
    again = {p: p.stat().st_mtime_ns for p in (folder / "runs/small/adapters").rglob("*")}
    assert evaluate(location, runs=["small"], local=True) == 0
    assert {p: p.stat().st_mtime_ns for p in (folder / "runs/small/adapters").rglob("*")} == again


def test_training_into_a_uri_workspace(project):
    folder = Path(project).parent
    location = at_uri(project)
    value = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**value, "recipes": {"unified": {"strategy": "unified"}}}))
    assert run(location, local=True) == 0
    assert json.loads((folder / "unified/manifest.json").read_text())["grouping"] == "unified"


def test_init_at_a_uri(adapters):
    location, lines = init(f"file://{adapters}/adapters/../")
    assert location == f"file://{adapters}/raymerge.yaml"
    assert lines[0] == "6 adapters in adapters/{persona}"
    assert (adapters / "raymerge.yaml").exists()


def test_a_scheme_that_nobody_knows_is_named(adapters):
    with pytest.raises(StorageError, match=r"ftp2://x/y.*cannot be opened"):
        init("ftp2://x/y")


def test_who_is_new_at_a_uri_is_seen_to_lack_an_embedding(project):
    location = at_uri(project)
    value = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**value, "embedding": {"source": "deltas"}}))
    placing = Placing(open_project(location).adapters, embeddings=True, clusters=False)
    placed_for(open_project(location), placing, title="test", local=True)
    assert embeddings_are_there(open_project(location), placing.experts)
    save_adapter(make_adapter("p9", 9), str(Path(project).parent / "adapters/p9"))
    with (Path(project).parent / "personas.jsonl").open("a") as file:
        file.write(json.dumps({"persona": "p9", "prompt": "w1?", "response": "w2.", "split": "test"}) + "\n")
    assert not embeddings_are_there(open_project(location), open_project(location).adapters)
