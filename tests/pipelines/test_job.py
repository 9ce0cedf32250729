"""Which workers a job asks for, and what it notes of times, on a job that is ended in the middle too."""

import json
from pathlib import Path

import pytest
import yaml

from raymerge import storage
from raymerge.config import load_project
from raymerge.pipelines import job
from raymerge.pipelines.compare import read_scores
from raymerge.pipelines.job import Timings, carry_out, kinds_used, read_timings, worker_kinds
from raymerge.pipelines.merge import merge
from raymerge.pipelines.opening import open_project
from raymerge.pipelines.run import run
from raymerge.pipelines.train import train
from raymerge.runtime.scheduler import Item, Outcome
from raymerge.runtime.tasks import EmbedTask, SketchTask
from tests.pipelines.conftest import write_project


def change(project: str, **keys) -> str:
    Path(project).write_text(yaml.safe_dump({**yaml.safe_load(Path(project).read_text()), **keys}))
    return project


@pytest.fixture
def asked(monkeypatch):
    """The kinds of worker and the options of every run of items, which then goes on in this process."""
    seen = []

    def spy(items, kinds, *, follow, progress, max_attempts, **options):
        seen.append(({kind.name for kind in kinds}, options))
        return job.run_local(items, kinds, follow=follow, progress=progress, max_attempts=max_attempts)

    monkeypatch.setattr(job, "run_on_ray", spy)
    return seen


def test_only_workers_that_have_something_to_do_are_asked_for(project, asked):
    assert merge(project, recipes=["exact"]) == 0
    assert train(change(project, adapters="new/{persona}"), group_by="persona") == 0
    assert run(change(project, adapters="adapters/{persona}"), recipes=["small"]) == 0
    assert [kinds for kinds, _ in asked] == [{"merge"}, {"model"}, {"merge", "model"}]


def test_what_may_follow_on_embeddings_is_asked_for_too(project, adapters):
    texts = Item("embed/0", "model", "embed", EmbedTask("f", "p", ("a",), "m"))
    deltas = Item("embed/0", "merge", "sketch", SketchTask("f", (("a", "w"),), 8, 0))
    opened = open_project(project)
    assert kinds_used(opened, [texts]) == kinds_used(opened, [deltas]) == {"merge", "model"}
    assert kinds_used(opened.without_recipes(), [texts]) == {"model"}
    alone = open_project(write_project(adapters, base_model="base", recipes={"own": {"strategy": "own"}}))
    assert kinds_used(alone, [deltas]) == {"merge"}


def test_texts_are_embedded_without_a_base_model_too(adapters):
    alone = open_project(write_project(adapters))
    assert [kind.name for kind in worker_kinds(alone.project, None)] == ["merge", "model"]


def test_nothing_to_do_starts_nothing(project, monkeypatch):
    monkeypatch.setattr(job, "run_on_ray", None)
    assert carry_out(open_project(project), [], title="nothing").exit_status == 0


def test_autoscaling_is_passed_on(project, asked):
    assert merge(change(project, hardware={"autoscaling": True, "ready_deadline": 5}), recipes=["exact"]) == 0
    assert asked[0][1] == {"autoscaling": True, "ready_deadline_s": 5}


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda")])
def test_a_model_worker_computes_where_the_plan_says(project, gpus, device):
    opened = open_project(change(project, hardware={"gpus_per_model": gpus}))
    merging, model = worker_kinds(opened.project, "base")
    assert model.arguments_on(gpus)["device"] == device
    assert "device" not in merging.arguments_on(0)
    assert merging.num_gpus == 0


class Killed(BaseException):
    pass


def test_times_are_noted_when_a_job_is_ended_in_the_middle(project, monkeypatch):
    opened = open_project(project, recipes=["exact"])
    done = []

    def runner(items, kinds, *, follow, **options):
        for item in items:
            follow(Outcome(item.id, {}, None, 1, 0.25, "here"))
            done.append(item.id)
            raise Killed

    monkeypatch.setattr(job, "run_local", runner)
    items = [Item(f"merge/exact/{name}", "merge", "merge", None) for name in ("p0", "p1")]
    with pytest.raises(Killed):
        carry_out(opened, items, local=True, title="ended")
    noted = read_timings(opened.project.run_folder("exact"))
    assert {item: timing.seconds for item, timing in noted.items()} == dict.fromkeys(done, 0.25)


def test_times_are_written_while_a_job_goes_on(project):
    opened = open_project(project)
    timings = Timings(opened.project, every_s=0)
    folder = opened.project.run_folder("exact")
    for number, id in enumerate(["merge/exact/p0", "merge/exact/p1"], start=1):
        timings.note(Outcome(id, {}, None, 1, number, "here"))
        assert len(read_timings(folder)) == number
    timings.note(Outcome("merge/exact/p2", {"skipped": True}, None, 1, 0.1, "here"))
    timings.note(Outcome("merge/exact/p3", None, "failed", 1, 0.1, "here"))
    timings.flush()
    assert len(storage.read_bytes(f"{folder}/timings.jsonl").splitlines()) == 2


def test_seconds_of_killed_workers_that_a_checkpoint_saved_count(project):
    opened = open_project(project)
    timings = Timings(opened.project)
    timings.note(Outcome("train/unified", {"skipped": False, "spared_s": 30.0}, None, 2, 12.0, "here"))
    timings.flush()
    assert read_timings(opened.project.shared_folder())["train/unified"].seconds == 42


def test_what_a_storage_refuses_is_written_later(project, monkeypatch):
    opened = open_project(project)
    timings = Timings(opened.project, every_s=0)
    with monkeypatch.context() as broken:

        def refuse(location, data):
            raise OSError("no room")

        broken.setattr(storage, "write_bytes", refuse)
        timings.note(Outcome("merge/exact/p0", {}, None, 1, 1.0, "here"))
    timings.flush()
    assert list(read_timings(opened.project.run_folder("exact"))) == ["merge/exact/p0"]


def test_costs_that_are_not_noted_in_full_are_unknown(project):
    change(project, adapters="new/{persona}")
    assert run(project, recipes=["small", "own"], local=True) == 0
    opened = load_project(project)
    before = read_scores(opened, "small").costs
    assert all(s is not None and s > 0 for s in (before.train_s, before.merge_s, before.evaluate_s))
    assert read_scores(opened, "own").costs.merge_s == 0  # nothing was merged, so nothing is unknown
    noted = Path(opened.run_folder("small"), "timings.jsonl")
    lines = noted.read_text().splitlines()
    noted.write_text("".join(line + "\n" for line in lines if "merge/small/cluster_01" not in line))
    assert read_scores(opened, "small").costs.merge_s is None
    assert read_scores(opened, "small").costs.evaluate_s == before.evaluate_s
    shared = Path(opened.shared_folder(), "timings.jsonl")
    records = [json.loads(line) for line in shared.read_text().splitlines()]
    for record in records:
        record["adapters"] = record.get("adapters", [])[1:]
    shared.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_scores(opened, "small").costs.train_s is None


def test_adapters_that_were_given_have_no_known_costs(project):
    assert run(project, recipes=["own"], local=True) == 0
    opened = load_project(project)
    costs = read_scores(opened, "own").costs
    assert (costs.train_s, costs.merge_s, costs.adapters) == (None, 0, 6)
    (Path(project).parent / "adapters" / "p0" / "manifest.json").unlink()
    assert read_scores(opened, "own").costs.bytes is None
