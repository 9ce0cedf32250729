"""What is no longer wanted is never read as if it were: stale merges, interrupted trainings, passing read errors."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from raymerge import storage
from raymerge.adapters import load_adapter, save_adapter
from raymerge.adapters.formats import adapter_digest
from raymerge.errors import AdapterError, EvaluationError, StorageError
from raymerge.manifest import UNFINISHED
from raymerge.pipelines.compare import compare
from raymerge.pipelines.evaluate import evaluate
from raymerge.pipelines.merge import merge
from raymerge.pipelines.opening import open_project
from raymerge.pipelines.placing import Placing, embeddings_are_there
from raymerge.pipelines.search import placed_for
from raymerge.runtime import experts
from raymerge.runtime.experts import ExpertCache
from raymerge.runtime.scoring import gather
from raymerge.runtime.tasks import GatherTask
from tests.pipelines.conftest import make_adapter


def summary(project: str, run: str) -> dict:
    return json.loads((Path(project).parent / "runs" / run / "evaluation/summary.json").read_text())


def change(project: str, **keys) -> None:
    Path(project).write_text(yaml.safe_dump({**yaml.safe_load(Path(project).read_text()), **keys}))


def cut_short(project: str, name: str) -> None:
    weights = Path(project).parent / "adapters" / name / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])


def test_a_merge_that_fails_leaves_no_old_adapter_to_be_scored(project):
    assert merge(project, recipes=["exact"], local=True) == 0
    assert evaluate(project, runs=["exact"], local=True) == 0
    assert summary(project, "exact")["failed"] == {}
    cut_short(project, "p1")
    assert evaluate(project, runs=["exact"], local=True) == 1
    assert set(summary(project, "exact")["failed"]) == {"p0", "p1", "p2"}


def test_a_half_trained_adapter_is_no_expert(project, capsys):
    folder = Path(project).parent / "adapters/p4"
    (folder / "manifest.json").write_text(json.dumps(UNFINISHED))
    assert merge(project, recipes=["exact"], local=True) == 1
    assert "p4: " in capsys.readouterr().err
    with pytest.raises(AdapterError, match="begun and not finished"):
        adapter_digest(str(folder))


def test_an_adapter_of_another_base_fails_its_persona_alone(project):
    folder = Path(project).parent
    other = make_adapter("p1", 5)
    path = "model.layers.0.self_attn.k_proj"
    modules = {**other.modules, path: other.modules["model.layers.0.self_attn.q_proj"]}
    save_adapter(type(other)("p1", modules), str(folder / "adapters/p1"))
    assert merge(project, recipes=["own"], local=True) == 0
    assert evaluate(project, runs=["own"], local=True) == 1
    assert set(summary(project, "own")["failed"]) == {"p1"}
    assert summary(project, "own")["personas"] == 5


def test_a_portion_in_which_everybody_failed_is_joined_with_the_others(project):
    for name in ("p0", "p1", "p2", "p3"):  # portions are of four
        cut_short(project, name)
    assert merge(project, recipes=["own"], local=True) == 0
    assert evaluate(project, runs=["own"], local=True) == 1
    assert set(summary(project, "own")["failed"]) == {"p0", "p1", "p2", "p3"}
    assert summary(project, "own")["personas"] == 2


def test_a_read_error_that_passes_is_forgotten(project, monkeypatch):
    assert merge(project, recipes=["exact"], local=True) == 0
    read = experts.read_adapter

    def fails_once(location, name, base):
        monkeypatch.setattr(experts, "read_adapter", read)
        raise StorageError(f"{location}: cannot be read just now.")

    monkeypatch.setattr(experts, "read_adapter", fails_once)
    assert evaluate(project, runs=["exact"], local=True) == 1
    assert evaluate(project, runs=["exact"], local=True) == 0
    assert summary(project, "exact")["failed"] == {}


def test_the_dtype_of_the_base_is_part_of_what_decides_an_evaluation(project):
    assert merge(project, recipes=["exact"], local=True) == 0
    assert evaluate(project, runs=["exact"], local=True) == 0
    place = Path(project).parent / "runs/exact/evaluation/metrics.parquet"
    before = pq.read_table(place)["nll"].to_pylist()
    value = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**value, "hardware": {"dtype": "bfloat16"}}))
    assert evaluate(project, runs=["exact"], local=True) == 0
    assert pq.read_table(place)["nll"].to_pylist() != before


def test_a_cached_adapter_goes_by_the_name_it_is_asked_for(adapters):
    cache = ExpertCache(2**20)
    place = str(adapters / "adapters/p0")
    assert cache.read("p0", place).name == "p0"
    assert cache.read("unified", place).name == "unified"
    assert cache.held == load_adapter(place).nbytes


def test_the_cache_holds_no_more_than_its_bytes(adapters):
    one = load_adapter(str(adapters / "adapters/p0")).nbytes
    cache = ExpertCache(2 * one)
    for name in ("p0", "p1", "p2", "p3"):
        cache.read(name, storage.join(str(adapters), "adapters", name))
        assert cache.held <= 2 * one


def test_an_evaluation_whose_part_failed_is_not_compared_with_its_old_figures(project):
    assert merge(project, recipes=["exact"], local=True) == 0
    assert evaluate(project, runs=["exact"], local=True) == 0
    evaluation = Path(project).parent / "runs/exact/evaluation"
    parts = sorted(str(p) for p in (evaluation / "parts").iterdir())
    (Path(parts[0]) / "manifest.json").write_text(json.dumps(UNFINISHED))
    with pytest.raises(EvaluationError, match="cannot be summed up"):
        gather(GatherTask(str(evaluation), tuple(parts)))
    with pytest.raises(EvaluationError, match="no run has been evaluated"):
        compare(project)


def test_a_recipe_that_nobody_could_answer_with_is_named_and_no_crash(project, capsys):
    for name in ("p0", "p1", "p2", "p3", "p4", "p5"):
        cut_short(project, name)
    assert evaluate(project, recipes=["exact"], local=True) == 1
    assert "failed: evaluate/exact/0000/p0: " in capsys.readouterr().err


@pytest.mark.parametrize("source", ["texts", "deltas"])
def test_embeddings_are_not_there_for_who_is_new_or_was_changed(project, source):
    change(project, embedding={"source": source})
    folder = Path(project).parent
    examples = folder / "personas.jsonl"

    def is_there() -> bool:
        opened = open_project(project)
        return embeddings_are_there(opened, opened.adapters)

    def embed() -> None:
        opened = open_project(project)
        placed_for(opened, Placing(opened.adapters, embeddings=True, clusters=False), title="test", local=True)

    assert not is_there()
    embed()
    assert is_there()
    old = examples.read_text()
    examples.write_text(old.replace('"w1 w2."', '"w7 w7 w7."'))
    assert examples.read_text() != old
    assert is_there() == (source == "deltas")
    save_adapter(make_adapter("p0", 77), str(folder / "adapters/p0"))
    assert not is_there()
    embed()
    assert is_there()
    line = {"persona": "p9", "prompt": "w1?", "response": "w2 w3.", "split": "train"}
    examples.write_text(examples.read_text() + json.dumps(line) + "\n")
    save_adapter(make_adapter("p9", 9), str(folder / "adapters/p9"))
    assert not is_there()
