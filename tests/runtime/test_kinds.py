"""How many workers fit: pure numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.errors import PoolError
from raymerge.runtime.kinds import WorkerKind, plan_autoscaling, plan_workers


def kind(name: str, cpus: float, gpus=0, count=None) -> WorkerKind:
    return WorkerKind(name, object, count=count, num_cpus=cpus, num_gpus=gpus)


def test_both_kinds_get_a_share_of_two_cores():
    plan = plan_workers([kind("model", 1), kind("merge", 1)], [{"CPU": 2.0, "memory": 1e9}])
    assert plan.counts == {"model": 1, "merge": 1}
    plan = plan_workers([kind("model", 0.5), kind("merge", 0.5)], [{"CPU": 2.0}])
    assert plan.counts == {"model": 2, "merge": 2}


def test_gpus_bound_model_workers_and_the_rest_of_the_cpus_goes_to_merges():
    nodes = [{"CPU": 0.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}]
    plan = plan_workers([kind("merge", 1), kind("model", 1, "auto")], nodes)
    assert plan.counts == {"model": 4, "merge": 12}
    assert plan.needs["model"].gpus == 1
    assert not plan.notes


def test_two_gpus_of_a_worker_are_of_one_machine():
    nodes = [{"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 4.0}]
    plan = plan_workers([kind("model", 1, 2)], nodes)
    assert plan.counts == {"model": 3}  # one GPU of the first machine and the second's only one stay idle
    with pytest.raises(PoolError, match=r"a model worker takes 1 CPU and 2 GPU.*\n.*1 GPU; 8 CPU and 1 GPU"):
        plan_workers([kind("model", 1, 2)], [{"CPU": 8.0, "GPU": 1.0}] * 2)


def test_auto_is_no_gpu_where_there_is_none():
    plan = plan_workers([kind("model", 1, "auto")], [{"CPU": 2.0}])
    assert plan.needs["model"].gpus == 0
    assert plan.counts == {"model": 2}


def test_fewer_than_asked_for_is_said():
    plan = plan_workers([kind("model", 1, count=5)], [{"CPU": 2.0}])
    assert plan.counts == {"model": 2}
    assert plan.notes == ("5 workers of kind model asked for, 2 started: the Ray cluster has 2 CPU, one takes 1 CPU",)


@pytest.mark.parametrize(
    ("kinds", "nodes", "says"),
    [
        ([kind("model", 4)], [{"CPU": 2.0}, {"CPU": 2.0}], "a model worker takes 4 CPU"),
        ([kind("model", 1, 1)], [{"CPU": 2.0}], "a model worker takes 1 CPU and 1 GPU"),
        ([kind("model", 2), kind("merge", 1)], [{"CPU": 2.0}], "workers of kind merge: not even one fits"),
        ([kind("model", 1)], [], "no machine"),
        ([kind("model", 0)], [{"CPU": 2.0}], "takes nothing"),
        ([kind("model", 1, count=0)], [{"CPU": 2.0}], "cannot have 0 workers"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_asked_and_what_is_there(kinds, nodes, says):
    with pytest.raises(PoolError, match=says):
        plan_workers(kinds, nodes)


@given(
    st.lists(st.tuples(st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), min_size=1, max_size=4),
)
def test_the_plan_never_takes_more_than_there_is_and_leaves_no_room_for_one_more(needs, machines):
    kinds = [kind(f"k{i}", cpus, gpus) for i, (cpus, gpus) in enumerate(needs)]
    nodes = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in machines]
    try:
        plan = plan_workers(kinds, nodes)
    except PoolError:
        return
    assert min(plan.counts.values()) >= 1
    for what, index in (("CPU", 0), ("GPU", 1)):
        used = sum(plan.counts[k.name] * need[index] for k, need in zip(kinds, needs, strict=True))
        assert used <= sum(node[what] for node in nodes) + 1e-6
    if len(kinds) == 1 and len(nodes) == 1:
        cpus, gpus = needs[0]
        n = plan.counts["k0"] + 1
        assert n * cpus > nodes[0]["CPU"] or n * gpus > nodes[0]["GPU"]


@pytest.mark.parametrize(("cpus", "threads", "count"), [(0.5, None, 1), (1, None, 1), (3.5, None, 3), (0.5, 2, 2)])
def test_threads_follow_the_cpus_unless_given(cpus, threads, count):
    assert WorkerKind("m", object, num_cpus=cpus, threads=threads).thread_count == count


def test_an_autoscaling_cluster_is_asked_for_all_that_is_counted():
    plan = plan_autoscaling([kind("merge", 1, count=16), kind("model", 2, 0.5, count=8)])
    assert plan.counts == {"merge": 16, "model": 8}
    assert (plan.needs["model"].cpus, plan.needs["model"].gpus) == (2, 0.5)


@pytest.mark.parametrize(
    ("one", "key"), [(kind("merge", 1), "max_merge_workers"), (kind("model", 1, "auto", 2), "gpus_per_model")]
)
def test_what_an_autoscaling_cluster_must_be_told_is_named(one, key):
    with pytest.raises(PoolError, match=rf"workers of kind {one.name}.*\nGive hardware\.{key} as a number"):
        plan_autoscaling([one])


@pytest.mark.parametrize(("gpus", "device"), [(1, "cuda"), (2, "cuda"), (0.25, "cuda"), (0, "cpu"), ("auto", "auto")])
def test_a_worker_is_told_where_to_compute(gpus, device):
    told = WorkerKind("m", object, {"base": "b"}, device_argument="device")
    assert told.arguments_on(gpus) == {"base": "b", "device": device}
    assert WorkerKind("m", object, {"base": "b"}).arguments_on(gpus) == {"base": "b"}
