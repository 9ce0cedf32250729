"""A training item: what it leaves, and that one which was stopped ends as if it had not been."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from raymerge import storage
from raymerge.errors import ModelError
from raymerge.manifest import is_unfinished, read_manifest, write_artefact
from raymerge.runtime import training
from raymerge.runtime.tasks import Trial
from tests.runtime.test_training_curves import read_curves
from tests.runtime.training_items import ROWS, build_gate, digests, kill_at_gate, make_task, make_worker

ROOT = Path(__file__).parents[2]
STEPS = {"a": 20, "b": 4, "c": 16, "d": 12}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def worker(tiny_llama):
    return make_worker(tiny_llama)


class Stopped(BaseException):
    """Nothing of ours catches it."""


def stop_at(step: int, monkeypatch) -> None:
    """End the next training after a step, as a signal would."""

    class Stopping(training.Recorder):
        seen = 0

        def stepped(self, progress, tokens):
            super().stepped(progress, tokens)
            self.seen += 1
            if self.seen == step:
                raise Stopped

    monkeypatch.setattr(training, "Recorder", Stopping)


def run_stopped(task, worker, step: int, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        stop_at(step, patched)
        with pytest.raises(Stopped):
            worker.train(task)


def test_an_item_leaves_its_adapters_with_their_course_and_nothing_else(tmp_path, worker):
    task = make_task(tmp_path / "item")
    result = worker.train(task)
    assert (result["skipped"], result["adapters"], result["failed"], result["said"]) == (False, 4, {}, [])
    for group in task.groups:
        manifest = read_manifest(group.folder)
        assert manifest["name"] == group.name
        assert (manifest["grouping"], manifest["personas"]) == ("persona", [group.name])
        assert manifest["steps"] == len(manifest["losses"]) == STEPS[group.name]
        assert manifest["losses"][-1] < manifest["losses"][0]
        assert (manifest["validation"], manifest["best_step"], manifest["epochs_chosen"]) == ([], None, None)
        assert manifest["tokens"] > 0
    assert not Path(task.folder).exists()
    before = digests(tmp_path / "item")
    (Path(task.folder) / "checkpoint-0").mkdir(parents=True)  # killed between its last adapter and its end
    (Path(task.folder) / "progress.json").touch()
    assert worker.train(task) == {"skipped": True}
    assert digests(tmp_path / "item") == before
    assert not Path(task.folder).exists()


def test_a_cluster_tells_who_its_members_are(tmp_path, worker):
    task = make_task(tmp_path, "cluster", epochs=1)
    worker.train(task)
    assert json.loads((tmp_path / "adapters" / "cluster_00" / "cluster_info.json").read_text()) == {
        "cluster": "cluster_00",
        "members": ["a", "b", "c", "d"],
        "personas": 4,
        "examples": sum(ROWS.values()),
        "largest": {"persona": "a", "examples": 9},
    }
    assert "cluster_info.json" in read_manifest(task.groups[0].folder)["files"]
    unified = make_task(tmp_path, "unified", epochs=1)
    worker.train(unified)
    assert not (tmp_path / "adapters" / "unified_00" / "cluster_info.json").exists()


def test_a_killed_training_ends_in_the_bytes_of_one_that_was_not(tmp_path, worker, tiny_llama):
    settings = {"patience": 3, "dropout": 0.1, "tensorboard": True}
    whole = make_task(tmp_path / "whole", **settings)
    worker.train(whole)
    gate = build_gate(tmp_path / "killed")
    code = f"""
from pathlib import Path
from raymerge.runtime import training
from tests.runtime.training_items import Gate, make_task, make_worker
training.Recorder, Gate.folder = Gate, {gate!r}
make_worker({str(tiny_llama)!r}).train(make_task(Path({gate!r}), **{settings!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    kill_at_gate(tmp_path / "killed")
    process.wait()
    task = make_task(tmp_path / "killed", **settings)
    there = [group.name for group in task.groups if read_manifest(group.folder) is not None]
    assert there == ["b"]
    assert Path(task.folder, "progress.json").exists()
    result = worker.train(task)
    assert result["said"] == [f"goes on from its checkpoint, {4 + 3 * 6} of {sum(STEPS.values())} steps"]
    assert result["spared_s"] > 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert not Path(task.folder).exists()
    for group in task.groups:
        manifest = read_manifest(group.folder)
        curves = read_curves(tmp_path / "killed" / "runs" / "tensorboard" / group.name)
        undisturbed = read_curves(tmp_path / "whole" / "runs" / "tensorboard" / group.name)
        assert list(curves["loss"]) == list(range(1, manifest["steps"] + 1))
        assert list(curves["loss"].values()) == pytest.approx(manifest["losses"], abs=1e-5)
        assert list(curves["validation loss"].items()) == [
            (step, pytest.approx(loss, abs=1e-5)) for step, loss in manifest["validation"]
        ]
        del curves["tokens per second"], undisturbed["tokens per second"]
        assert curves == undisturbed


def test_an_adapter_that_is_lost_after_it_was_finished_is_written_from_the_checkpoint(tmp_path, worker, monkeypatch):
    worker.train(make_task(tmp_path / "whole"))
    task = make_task(tmp_path / "item")
    run_stopped(task, worker, 8, monkeypatch)
    storage.remove(task.groups[1].folder)
    result = worker.train(task)
    assert result["adapters"] == 4
    assert result["said"]
    assert digests(tmp_path / "item") == digests(tmp_path / "whole")


@pytest.mark.parametrize("changed", [{"learning_rate": 0.02}, {"micro_batch": 1}, {"rank": 1}])
def test_a_checkpoint_of_other_settings_does_not_count(tmp_path, worker, monkeypatch, changed):
    worker.train(make_task(tmp_path / "whole", **changed))
    run_stopped(make_task(tmp_path / "item"), worker, 3, monkeypatch)
    assert worker.train(make_task(tmp_path / "item", **changed))["said"] == []
    assert digests(tmp_path / "item") == digests(tmp_path / "whole")


def test_an_item_at_a_uri_is_carried_out_and_goes_on_there(tmp_path, worker, monkeypatch):
    def at_uri(task):
        groups = tuple(replace(group, folder=f"file://{group.folder}") for group in task.groups)
        return replace(task, groups=groups, folder=f"file://{task.folder}")

    worker.train(at_uri(make_task(tmp_path / "whole", tensorboard=True)))
    task = make_task(tmp_path / "item", tensorboard=True)
    run_stopped(at_uri(task), worker, 8, monkeypatch)
    assert worker.train(at_uri(task))["said"]
    assert digests(tmp_path / "item") == digests(tmp_path / "whole")
    assert not Path(task.folder).exists()
    for name, steps in STEPS.items():
        curves = read_curves(tmp_path / "item" / "runs" / "tensorboard" / name)
        assert list(curves["loss"]) == list(range(1, steps + 1))


def test_checkpoints_are_as_far_apart_as_was_asked(tmp_path, worker, monkeypatch):
    task = make_task(tmp_path, checkpoint_every=3600)
    run_stopped(task, worker, 10, monkeypatch)
    assert [p.name for p in Path(task.folder).iterdir()] == ["progress.json"]


def test_a_checkpoint_that_cannot_be_written_ends_no_training(tmp_path, worker):
    task = make_task(tmp_path)
    Path(task.folder).mkdir(parents=True)
    Path(task.folder, "checkpoint-0").touch()
    result = worker.train(task)
    assert result["adapters"] == 4
    assert result["said"][0].startswith("a checkpoint could not be written, training goes on: ")


def test_what_diverged_is_named_and_not_written(tmp_path, worker):
    task = make_task(tmp_path, learning_rate=1e38, clip=1e30)
    result = worker.train(task)
    assert sorted(result["failed"]) == list(ROWS)
    assert result["failed"]["c"] == "c: training diverged: its loss or a factor became NaN. Lower the learning rate."
    assert result["adapters"] == 0
    assert not (tmp_path / "adapters").exists()


def test_an_adapter_whose_last_update_diverged_is_not_written(tmp_path, worker):
    task = make_task(tmp_path, "cluster", epochs=1, batch_size=64, learning_rate=1e38, clip=1e30)
    result = worker.train(task)
    assert (list(result["failed"]), result["adapters"]) == (["cluster_00"], 0)
    assert not (tmp_path / "adapters").exists()


def test_a_row_that_is_too_long_is_named_by_its_persona(tmp_path, worker):
    task = make_task(tmp_path, "cluster", max_length=6)
    with pytest.raises(
        ModelError,
        match=r"^cluster_00: row 0 \(a's answer to 'w0 w0\?'\) has \d+ tokens, the limit is 6: set training\.truncate",
    ):
        worker.train(task)


def test_what_is_there_of_other_settings_is_unfinished_while_it_is_trained_anew(tmp_path, worker, monkeypatch):
    worker.train(make_task(tmp_path))
    task = make_task(tmp_path, rank=1)
    run_stopped(task, worker, 2, monkeypatch)
    assert all(is_unfinished(group.folder) for group in task.groups)


def test_an_adapter_that_the_chosen_trial_made_is_not_trained_again(tmp_path, worker, monkeypatch):
    trials = []
    for epochs, similarity in ((1, 0.2), (2, 0.4)):
        task = make_task(tmp_path / f"try-{epochs}", epochs=epochs)
        [group] = task.groups[:1]
        adapters = str(tmp_path / f"try-{epochs}" / "adapters")
        worker.train(replace(task, groups=(replace(group, folder=f"{adapters}/{group.name}"),)))
        folder = str(tmp_path / "tried" / str(epochs))
        write_artefact(folder, {"summary.json": storage.encode_json({"mean": {"similarity": similarity}})}, {}, "key")
        trials.append(Trial(epochs, adapters, folder))
    task = make_task(tmp_path / "item", epochs=(1, 2))
    task = replace(task, groups=task.groups[:1], trials=tuple(trials))
    monkeypatch.setattr("raymerge.runtime.training.train", lambda *_: pytest.fail("trained again"))
    worker.train(task)
    [group] = task.groups
    made, tried = read_manifest(group.folder), read_manifest(f"{trials[1].adapters}/{group.name}")
    assert made["files"] == tried["files"]
    assert made["epochs_chosen"] == {"tried": {"1": 0.2, "2": 0.4}, "chosen": 2, "by": "own"}
    assert worker.train(task)["skipped"]


def test_tried_epochs_make_the_adapter_of_the_number_that_was_chosen(tmp_path, worker):
    trials = []
    for epochs, similarity in ((1, 0.2), (2, 0.4), (4, 0.3)):
        folder = str(tmp_path / "tried" / str(epochs))
        write_artefact(folder, {"summary.json": storage.encode_json({"mean": {"similarity": similarity}})}, {}, "key")
        trials.append(Trial(epochs, f"{folder}-adapters", folder))
    task = make_task(tmp_path / "item", epochs=(1, 2, 4))
    worker.train(replace(task, trials=tuple(trials)))
    worker.train(make_task(tmp_path / "plain", epochs=2))
    chosen, plain = (read_manifest(str(tmp_path / name / "adapters" / "a")) for name in ("item", "plain"))
    assert chosen["epochs_chosen"] == {"tried": {"1": 0.2, "2": 0.4, "4": 0.3}, "chosen": 2, "by": "own"}
    assert chosen["key"] == plain["key"]
    assert chosen["files"] == plain["files"]
    assert chosen["training"]["epochs"] == 2
