"""What the first run fits stays as it is, whatever happens to the later ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from raymerge import storage
from raymerge.adapters import save_adapter
from raymerge.errors import ProjectError
from raymerge.pipelines.init import init
from raymerge.pipelines.merge import merge
from raymerge.routing.embeddings import encode_embeddings, make_embeddings
from tests.pipelines.conftest import NAMES, make_adapter

MOE = {"strategy": "sparse_moe", "k": 1}


def change(project: str, **keys) -> None:
    value = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**value, **keys}))


def test_an_edited_file_of_clusters_needs_a_refit(project):
    folder = Path(project).parent
    change(project, recipes={"moe": MOE})
    assert merge(project, local=True) == 0
    (folder / "clusters.json").write_text(json.dumps({n: f"cluster_{i % 2:02d}" for i, n in enumerate(NAMES)}))
    with pytest.raises(ProjectError, match=r"other settings of `clusters`(.|\n)*--refit"):
        merge(project, local=True)
    assert merge(project, local=True, refit=True) == 0
    assert json.loads((folder / "runs/_shared/clusters/clusters.json").read_text())["p1"] == "cluster_01"


def test_a_job_killed_while_newcomers_are_admitted_leaves_the_fit(project, monkeypatch):
    folder = Path(project).parent
    change(project, clusters={"count": 2}, recipes={"mean": {"strategy": "cluster_average"}})
    assert merge(project, local=True) == 0
    place = folder / "runs/_shared/clusters"
    before = json.loads((place / "fit.json").read_text())
    with open(folder / "personas.jsonl", "a") as file:
        file.write(json.dumps({"persona": "q", "prompt": "w0?", "response": "w40 w41.", "split": "train"}) + "\n")
    write = storage.write_bytes

    def killed(location: str, data: bytes) -> None:
        write(location, data)
        if "_shared/clusters" in location:
            raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        merge(project, local=True)
    monkeypatch.undo()
    assert merge(project, local=True) == 0
    after = json.loads((place / "fit.json").read_text())
    assert after["mean"] == before["mean"]
    assert {k: v["centroid"] for k, v in after["clusters"].items()} == {
        k: v["centroid"] for k, v in before["clusters"].items()
    }
    assert "q" in json.loads((place / "clusters.json").read_text())


def test_a_refit_removes_adapters_that_no_row_names(project):
    folder = Path(project).parent
    change(project, clusters={"count": 3}, recipes={"avg": {"strategy": "cluster_average"}})
    assert merge(project, local=True) == 0
    save_adapter(make_adapter("mine", 5), str(folder / "runs/avg/adapters/mine"))
    change(project, clusters={"count": 2})
    assert merge(project, local=True, refit=True) == 0
    assert {p.name for p in (folder / "runs/avg/adapters").iterdir()} == {"cluster_00", "cluster_01", "mine"}


def test_a_file_of_vectors_is_the_source_of_embeddings(project):
    folder = Path(project).parent
    vectors = np.eye(6)[[1, 0, 3, 2, 5, 4]] + np.eye(6)
    (folder / "mine.parquet").write_bytes(encode_embeddings(make_embeddings(NAMES, vectors)))
    change(project, embedding={"source": "mine.parquet"}, recipes={"near": {"strategy": "top_k", "k": 1}})
    assert merge(project, local=True) == 0
    people = json.loads((folder / "runs/near/routing_info.json").read_text())["personas"]
    assert [people[name]["experts"][0]["expert"] for name in NAMES] == ["p1", "p0", "p3", "p2", "p5", "p4"]
    assert not (folder / "runs/_shared/embeddings").exists()


def test_an_adapter_that_cannot_be_read_is_left_out_of_what_needs_embeddings(adapters, capsys):
    weights = adapters / "adapters/p1/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    location, _ = init(str(adapters))
    change(location, clusters={"count": 2}, recipes={"moe": MOE, "own": {"strategy": "own"}})
    assert merge(location, local=True) == 1
    said = capsys.readouterr().err
    assert "failed: embed/0000/p1: p1: " in said
    assert "moe: p1: cannot be read and is left out (1 such adapters)" in said
    people = {
        n: json.loads((adapters / "runs" / n / "routing_info.json").read_text())["personas"] for n in ("moe", "own")
    }
    assert set(people["moe"]) == set(NAMES) - {"p1"}
    assert set(people["own"]) == set(NAMES)
    assert "p1" not in {e["expert"] for person in people["moe"].values() for e in person["experts"]}
