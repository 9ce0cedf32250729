"""A router item: what it leaves, what makes it anew, and that one which was stopped ends as if it had not been."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raymerge import storage
from raymerge.adapters import LoraModule, save_adapter
from raymerge.adapters.stored import StoredPeftModules
from raymerge.errors import AdapterError, ModelError, PersonaError, RoutingError, StorageError
from raymerge.manifest import is_unfinished, read_manifest
from raymerge.merging.difference import difference
from raymerge.models import router_training
from raymerge.models.folded import folded
from raymerge.routing.router import read_router
from raymerge.routing.router_shape import TUNED
from raymerge.runtime.events import Item
from raymerge.runtime.router import headers_of_difference
from raymerge.runtime.training_progress import LiveTrainings
from tests.runtime.router_items import (
    NAMES,
    STEPS,
    Stopped,
    digests,
    make_task,
    random_adapter,
    read_lines,
    run_stopped,
    write_personas,
    write_world,
)
from tests.runtime.training_items import make_worker

FILES = ["candidates.parquet", "manifest.json", "router.json", "router.safetensors"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def worker(tiny_llama):
    return make_worker(tiny_llama)


@pytest.fixture
def world(tmp_path, worker):
    write_world(tmp_path, worker.base)
    return tmp_path


def candidates(folder: Path) -> dict[str, list[dict]]:
    """The candidates of each persona, in the order of the file."""
    found: dict[str, list[dict]] = {}
    for line in storage.read_parquet(str(folder / "router" / "candidates.parquet")).to_pylist():
        found.setdefault(line.pop("persona"), []).append(line)
    return found


def column(lines: list[dict], name: str) -> list[float]:
    return [line[name] for line in lines]


def record(folder: Path):
    return json.loads((folder / "router" / "router.json").read_text())


@pytest.mark.parametrize("network", ["bilinear", "mlp"])
def test_an_item_leaves_a_router_with_its_course_and_its_candidates_and_nothing_else(world, worker, network):
    task = make_task(world, network=network)
    assert worker.train_router(task) == {"skipped": False, "said": [], "spared_s": 0.0}
    assert sorted(p.name for p in (world / "router").iterdir()) == FILES
    made = read_router(task.folder)
    assert (made.shape.network, made.shape.size, made.shape.k) == (network, 6, 2)
    assert made.shape.experts == (NAMES if network == "mlp" else ())
    np.testing.assert_array_equal(made.mean, np.array(storage.read_json(f"{task.placing}/mean.json"), np.float32))
    told = record(world)
    assert (told["settings"]["epochs"], told["held_out"]) == (3, [])
    assert [set(epoch) for epoch in told["history"]] == [{"loss", "validation", "entropy"}] * 4
    validation = [epoch["validation"] for epoch in told["history"]]
    assert told["best_epoch"] == int(np.argmin(validation))
    assert min(validation) < validation[0]
    manifest = read_manifest(task.folder)
    assert manifest["name"] == "router"
    assert (manifest["personas"], list(manifest["experts"])) == (list(NAMES), list(NAMES))
    assert worker.train_router(task) == {"skipped": True}


def test_candidates_say_who_was_asked_and_how_much(world, worker):
    worker.train_router(make_task(world))
    found = candidates(world)
    assert list(found) == list(NAMES)
    for persona, lines in found.items():
        assert len(lines) == 3
        assert persona not in column(lines, "expert")
        assert column(lines, "similarity") == sorted(column(lines, "similarity"), reverse=True)
        learned = column(lines, "learned")
        assert sum(learned) == pytest.approx(1, abs=1e-6)
        assert sum(weight > 0 for weight in learned) <= 2
        by_score = sorted(lines, key=lambda line: -line["score"])
        assert column(by_score, "learned") == sorted(learned, reverse=True)
        share = np.exp(np.array(column(lines, "similarity")[:2]) / 0.1)
        assert column(lines, "similar") == pytest.approx([*share / share.sum(), 0], abs=1e-5)
    assert any(abs(line["learned"] - line["similar"]) > 0.05 for lines in found.values() for line in lines)


def test_nobody_serves_more_personas_than_is_allowed(world, worker):
    worker.train_router(make_task(world, max_in_degree=1))
    asked = Counter(line["expert"] for lines in candidates(world).values() for line in lines if line["learned"] > 0)
    assert set(asked.values()) == {1}


def test_who_is_held_out_is_as_if_without_adapter_and_examples(world, worker):
    task = make_task(world, held_out=("bob", "eva"))
    worker.train_router(task)
    found, manifest = candidates(world), read_manifest(task.folder)
    assert set(found) == set(NAMES)
    others = {"ada", "cyd", "dot", "fay"}
    assert {line["expert"] for lines in found.values() for line in lines} == others
    assert set(manifest["experts"]) == set(manifest["personas"]) == others
    assert record(world)["held_out"] == ["bob", "eva"]
    lines = read_lines(world)
    write_personas(world, [{**line, "response": "w9"} if line["persona"] == "bob" else line for line in lines])
    storage.remove(str(world / "adapters" / "eva"))
    assert worker.train_router(task) == {"skipped": True}


def _change_line(world: Path, split: str, number: int) -> None:
    lines = read_lines(world)
    chosen = [line for line in lines if (line["persona"], line["split"]) == ("cyd", split)][number]
    chosen["response"] = "w40 w41."
    write_personas(world, lines)


def _change_json(location: Path, change) -> None:
    location.write_text(json.dumps(change(json.loads(location.read_text()))))


CHANGES = {
    "a training row": lambda world: _change_line(world, "train", 5),
    "a validation row that says when to stop": lambda world: _change_line(world, "validation", 2),
    "where the mean lies": lambda world: _change_json(world / "placing" / "mean.json", lambda m: [0.5, *m[1:]]),
    "a cluster": lambda world: _change_json(world / "placing" / "labels.json", lambda m: {**m, "ada": "cluster_01"}),
    "an adapter": lambda world: (world / "adapters" / "fay" / "adapter_config.json").write_text(
        (world / "adapters" / "fay" / "adapter_config.json").read_text().replace('"lora_alpha": 2', '"lora_alpha": 3')
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_it_is_made_anew_where_what_decides_it_has_changed(world, worker, what, monkeypatch):
    task = make_task(world)
    worker.train_router(task)
    CHANGES[what](world)
    run_stopped(task, worker, 1, monkeypatch)
    assert is_unfinished(task.folder)


@pytest.mark.parametrize("changed", [{"learning_rate": 0.2}, {"k": 1}, {"seed": 1}, {"weighting": "softmax"}])
def test_it_is_made_anew_with_other_settings(world, worker, changed, monkeypatch):
    worker.train_router(make_task(world))
    run_stopped(make_task(world, **changed), worker, 1, monkeypatch)


def test_what_does_not_decide_it_changes_nothing(world, worker):
    worker.train_router(make_task(world))
    before = digests(world)
    _change_line(world, "test", 0)
    _change_line(world, "validation", 1)  # one that the tuning looks at
    other = make_task(world, checkpoint_every=60, trials=3, held_out=())
    assert worker.train_router(other) == {"skipped": True}
    assert digests(world) == before


def test_experts_that_do_not_fit_together_are_read_in_turn(world, worker):
    expert = random_adapter(worker.base, "one", 0).nbytes
    said = worker.train_router(replace(make_task(world), experts_bytes=4 * expert))["said"]
    assert said[0].startswith("experts do not fit into memory together: ")
    assert [sum(column(lines, "learned")) for lines in candidates(world).values()] == pytest.approx([1] * 6)


def test_experts_of_one_start_are_measured_from_it(tmp_path, worker):
    """As from the base that has it in its weights: so do merges, where the anchor is `auto`."""
    start = random_adapter(worker.base, "start", 99)
    turned = replace(start, modules={p: LoraModule(m.A, m.B, -m.scaling) for p, m in start.modules.items()})
    plain, started = tmp_path / "plain", tmp_path / "started"
    for folder in (plain, started):
        write_world(folder, worker.base)
    save_adapter(start, str(started / "start"))
    for number, name in enumerate(NAMES):
        whole = difference(random_adapter(worker.base, name, number), turned)  # which adds the start
        save_adapter(replace(whole, started_from="start"), str(started / "adapters" / name))
    with folded(worker.base, start):
        worker.base.model.save_pretrained(plain / "base")
        worker.base.tokenizer.save_pretrained(plain / "base")
    before = {name: value.clone() for name, value in worker.base.model.state_dict().items()}
    said = worker.train_router(make_task(started))["said"]
    assert said[0].startswith("6 of 6 experts were started from an adapter (ada from ")
    assert all(torch.equal(value, before[name]) for name, value in worker.base.model.state_dict().items())
    assert make_worker(plain / "base").train_router(make_task(plain))["said"] == []
    for ours, theirs in zip(record(started)["history"], record(plain)["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    theirs = candidates(plain)
    for persona, lines in candidates(started).items():
        assert column(lines, "expert") == column(theirs[persona], "expert")
        assert column(lines, "learned") == pytest.approx(column(theirs[persona], "learned"), abs=1e-2)


@pytest.mark.parametrize("started", [False, True], ids=["of the base", "of a start"])
def test_what_experts_take_is_read_off_their_headers(world, worker, monkeypatch, started):
    if started:
        save_adapter(random_adapter(worker.base, "start", 99), str(world / "start"))
        for number, name in enumerate(NAMES):
            own = random_adapter(worker.base, name, number, started_from="start")
            save_adapter(own, str(world / "adapters" / name))
    read: list[str] = []
    original = StoredPeftModules.__getitem__

    def noting(modules, path):
        read.append(modules._where)
        return original(modules, path)

    monkeypatch.setattr(StoredPeftModules, "__getitem__", noting)
    sizes: list[int | None] = []

    def stopping(experts, personas, room):
        sizes.append(room)
        raise Stopped

    monkeypatch.setattr(router_training, "cut_shards", stopping)
    own = random_adapter(worker.base, "one", 0).nbytes
    with pytest.raises(Stopped):
        worker.train_router(replace(make_task(world), experts_bytes=10 * own))
    assert sizes == [5 if started else 10]  # side by side with the start's, ranks are twice as large
    assert set(read) == ({"anchor: adapter_model.safetensors"} if started else set())


def test_a_difference_has_the_headers_that_are_foretold(worker):
    own, start = random_adapter(worker.base, "one", 0, rank=3), random_adapter(worker.base, "start", 1)
    paths = list(own.modules)
    own = replace(own, modules={path: own.modules[path] for path in paths[1:]})
    half = {p: LoraModule(m.A.half(), m.B.double(), 0.5) for p, m in start.modules.items() if p != paths[-1]}
    start = replace(start, modules=half)
    assert headers_of_difference(own.headers, start.headers) == difference(own, start).headers


def test_without_validation_rows_the_last_epoch_is_kept(world, worker):
    worker.train_router(make_task(world, tuning_examples=4))
    told = record(world)
    assert told["best_epoch"] == 3
    assert all("validation" not in epoch for epoch in told["history"])


def test_personas_without_training_rows_are_routed_and_teach_nothing(world, worker):
    write_personas(world, [line for line in read_lines(world) if line["persona"] != "dot"])
    task = make_task(world)
    worker.train_router(task)
    assert read_manifest(task.folder)["personas"] == [name for name in NAMES if name != "dot"]
    found = candidates(world)
    assert len(found["dot"]) == 3
    assert "dot" in {line["expert"] for lines in found.values() for line in lines}


def test_what_cannot_be_trained_is_told_and_leaves_nothing_that_could_be_used(world, worker):
    task = make_task(world)
    worker.train_router(task)
    with pytest.raises(RoutingError, match=r"^router: there are 1 experts to choose from\."):
        worker.train_router(make_task(world, held_out=NAMES[1:]))
    assert is_unfinished(task.folder)
    lines = read_lines(world)
    write_personas(world, [line for line in lines if line["split"] != "train"])
    with pytest.raises(PersonaError, match=r"personas\.jsonl: nobody whom the router may learn from has training"):
        worker.train_router(task)
    write_personas(world, lines)
    storage.remove(str(world / "adapters" / "cyd"))
    with pytest.raises(AdapterError, match=r"^cyd: "):
        worker.train_router(task)


def test_a_read_that_failed_leaves_the_router_that_is_there(world, worker):
    task = make_task(world)
    worker.train_router(task)
    before, mean = digests(world), world / "placing" / "mean.json"
    content = mean.read_bytes()
    mean.unlink()
    with pytest.raises(StorageError):
        worker.train_router(task)
    assert digests(world) == before
    mean.write_bytes(content)
    assert worker.train_router(task) == {"skipped": True}


def test_a_router_that_is_begun_anew_leaves_no_recipe_of_the_one_before(world, worker, monkeypatch):
    tuned = world / "router" / TUNED
    worker.train_router(make_task(world))
    tuned.write_text("strategy: learned\n")
    assert worker.train_router(make_task(world)) == {"skipped": True}
    assert tuned.exists()
    run_stopped(make_task(world, learning_rate=0.2), worker, 1, monkeypatch)
    assert not tuned.exists()


def test_a_row_without_an_answer_is_named_by_its_persona(world, tiny_llama):
    base = world / "base"
    shutil.copytree(tiny_llama, base)
    leaving_out = {"type": "Replace", "pattern": {"String": "~"}, "content": ""}
    _change_json(base / "tokenizer.json", lambda tokenizer: {**tokenizer, "normalizer": leaving_out})
    lines = read_lines(world)
    chosen = [line for line in lines if line["persona"] == "fay" and line["split"] == "train"][3]
    chosen["response"] = "~"  # of which the tokenizer leaves nothing
    write_personas(world, lines)
    with pytest.raises(ModelError, match=r"^fay: row 3 \(fay's answer to 'w5 w3\?'\): the answer '~' has no token\."):
        make_worker(base).train_router(make_task(world))
    assert not (world / "router" / "progress.json").exists()


def test_people_see_how_far_it_is(world, worker, monkeypatch):
    task = make_task(world)
    told: list[str] = []
    live = LiveTrainings(told.append)
    live.expect([Item("router", "model", "train_router", task, alone=True)])
    assert live.lines(["router"]) == []
    run_stopped(task, worker, 1, monkeypatch)
    [line] = live.lines(["router"])
    loss = record_of_progress(task)["loss"]
    assert line.startswith(f"network: step 1/{STEPS}, loss {loss:.4f}")


def record_of_progress(task):
    return json.loads(Path(task.folder, "progress.json").read_text())["groups"]["network"]
