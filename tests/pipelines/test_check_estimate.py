"""What a run is said to take, against what torch counts and what a real run writes."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from raymerge.adapters.peft import encode_adapter
from raymerge.models.answers import encode_rows
from raymerge.models.base import load_base
from raymerge.models.generation import GenerationSettings, generate, score_references
from raymerge.models.prefix import Prefix, encode_prefix
from raymerge.models.prefix_training import first_prefix
from raymerge.models.training import TrainingGroup, TrainingSettings, train
from raymerge.pipelines.check import checked
from raymerge.pipelines.checking import operations
from raymerge.pipelines.checking.base import describe_base
from raymerge.pipelines.checking.estimate import Estimate, Speeds, Step
from raymerge.pipelines.checking.operations import padded, rows_of
from raymerge.pipelines.checking.power import detectable
from raymerge.pipelines.opening import open_project
from raymerge.pipelines.placing import Placing, place
from raymerge.pipelines.planning import merges_of
from raymerge.pipelines.run import run


@pytest.fixture(scope="module")
def base(tiny_llama):
    return load_base(str(tiny_llama))


@pytest.fixture(scope="module")
def rows():
    """Rows of many lengths: (prompt, answer)."""
    random = np.random.default_rng(0)
    text = lambda most: " ".join(f"w{i}" for i in random.integers(0, 56, int(random.integers(1, most))))  # noqa: E731
    return [(text(20), text(12)) for _ in range(24)]


def counted(act) -> int:
    """Operations of products, as torch counts them; attention written out, since the fused one is not counted, and
    oneDNN's products (rows x, weight w) told."""
    products = {torch.ops.mkldnn._linear_pointwise: lambda x, w, *_, **__: 2 * math.prod(x) * w[0]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=products) as counter:
        act()
    return counter.get_total_flops()


def lengths(base, rows, end):
    encoded = encode_rows(base, [p for p, _ in rows], [a for _, a in rows], end=end)
    return np.array([len(row.prompt) for row in encoded]), np.array([len(row.answer) for row in encoded])


def test_operations_of_training_are_those_that_torch_counts(base, rows):
    layers = operations.layers_of(base)
    prompt, answer = lengths(base, rows, end=True)
    widths = padded(prompt + answer, np.zeros_like(prompt), 6, together=False)
    adapted = operations.factors(layers.targets, 4)
    groups = [TrainingGroup("a", rows), TrainingGroup("b", rows)]
    settings = TrainingSettings(rank=4, epochs=2, batch_size=6)
    found = counted(lambda: train(base, groups, settings))
    said = operations.training_operations(layers, adapted, rows_of(widths, answer) * 4)
    assert said == pytest.approx(found, rel=0.2)


def test_operations_of_answers_and_likelihoods_are_those_that_torch_counts(base, rows):
    layers = operations.layers_of(base)
    prompt, answer = lengths(base, rows, end=False)
    owners, prompts = np.zeros_like(prompt), [p for p, _ in rows]
    found = counted(lambda: score_references(base, None, prompts, [a for _, a in rows], None))
    widths = padded(prompt + answer, owners, 64, together=True)
    assert operations.scoring_operations(layers, 0, rows_of(widths, answer)) == pytest.approx(found, rel=0.1)
    found = counted(lambda: generate(base, None, prompts, None, GenerationSettings(max_new_tokens=9)))
    said = operations.answering_operations(
        layers, 0, padded(prompt, owners, 64, together=True), np.full_like(prompt, 9)
    )
    assert said == pytest.approx(found, rel=0.1)


def test_a_base_without_weights_costs_what_the_loaded_one_does(base, tiny_llama):
    described = describe_base(str(tiny_llama), "base")
    assert next(described.model.parameters()).is_meta
    assert operations.layers_of(described) == operations.layers_of(base)
    assert (described.max_length, described.end_ids) == (base.max_length, base.end_ids)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "mlp.down_proj")])
def test_bytes_of_an_adapter_are_those_of_its_files(base, rows, targets):
    shapes = operations.layers_of(base, targets).targets
    (trained,) = train(base, [TrainingGroup("a", rows)], TrainingSettings(rank=8, epochs=1, target_modules=targets))
    assert set(shapes) == set(trained.adapter.modules)
    files = sum(len(data) for data in encode_adapter(trained.adapter).values())
    assert operations.adapter_bytes(shapes, 8) == pytest.approx(files + 1_300, rel=0.1)  # with a manifest


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), max_size=40), st.integers(1, 9), st.booleans())
def test_a_padded_row_is_as_wide_as_the_longest_of_its_batch(pairs, batch, together):
    length = np.array([pair[0] for pair in pairs], np.int64)
    owner = np.array([pair[1] for pair in pairs], np.int64)
    widths = padded(length, owner, batch, together=together)
    assert (widths >= length).all()
    parts = [sorted(length[owner == who]) for who in sorted(set(owner))]
    parts = [[one for part in parts for one in part]] if together else parts
    batches = [part[i : i + batch] for part in parts for i in range(0, len(part), batch)]
    assert sorted(widths) == sorted(max(one) for one in batches for _ in one)


def folder_bytes(*folders: Path) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


def test_a_real_run_makes_what_was_said_and_leaves_nothing_to_do(project):
    """The training, the merges and the evaluation of a small world, before and after."""
    folder = Path(project).parent
    shutil.rmtree(folder / "adapters")
    told = yaml.safe_load(Path(project).read_text())
    told["training"] = {"epochs": 4, "rank": 8, "batch_size": 2}
    told["recipes"] = {"own": {"strategy": "own"}, "unified": {"strategy": "unified"}}
    told["recipes"]["small"] = {"strategy": "cluster_average", "rank": 3}
    Path(project).write_text(yaml.safe_dump(told))
    before = {step.name: step for step in checked(project).estimate.steps}
    assert {name: step.makes for name, step in before.items()} == {
        "train persona": 6, "train unified": 1, "merge": 2, "evaluate": 3, "compare": 1
    }  # fmt: skip
    assert run(project, local=True) == 0
    for name, places in {
        "train persona": [folder / "adapters"],
        "train unified": [folder / "unified"],
        "merge": [folder / "runs" / "small" / "adapters"],
    }.items():
        assert before[name].nbytes == pytest.approx(folder_bytes(*places), rel=0.1), name
        assert not before[name].bound
    after = checked(project)
    assert {step.name for step in after.estimate.steps if step.items} == {"compare"}
    (power,) = (section for section in after.sections if section.name == "power")
    assert power.facts["measured"]


def test_adapters_that_are_there_are_not_trained_again_and_earlier_times_are_taken(project):
    steps = {step.name: step for step in checked(project).estimate.steps}
    assert (steps["train persona"].items, steps["train persona"].there) == (0, 6)
    assert run(project, recipes=["own"], local=True) == 0
    found = checked(project).estimate
    (evaluating,) = (step for step in found.steps if step.name == "evaluate")
    assert found.source(evaluating) == "measured"
    assert evaluating.there == 1
    assert evaluating.measured_s > 0


EACH = {"p0": {"p1": 0.5, "p2": 0.5}, "p1": {"p2": 1}, "p3": {"p1": 0.5, "p2": 0.5}, "p4": {"p5": 1.2}}


@pytest.mark.parametrize(
    "recipe",
    [
        {"strategy": "named", "weights": {"p0": 0.5, "p1": 0.7, "p2": 0}},
        {"strategy": "named", "weights": {"p0": 1}, "rank": "exact", "scale": 1},
        {"strategy": "named", "weights": EACH, "rank": "exact", "scale": 1},
        {"strategy": "named", "weights": EACH, "rank": 2},
        {"strategy": "random_k", "of": {"strategy": "named", "weights": {"p0": 0.5, "p1": 0.7}}},
        {"strategy": "own"},
        {"strategy": "own", "scale": 1.5},
        {"strategy": "unified", "scale": 1.5},
        {"strategy": "unified", "scale_offsets": {"clusters": {"cluster_01": 0.2}}},
        {"strategy": "simple_average", "scale_offsets": {"clusters": {"cluster_00": 0.1, "cluster_01": 0.2}}},
        {"strategy": "cluster_average", "scale_offsets": {"clusters": {"cluster_01": 0.2}}},
    ],
)
def test_merges_are_counted_as_they_are_planned(project, recipe):
    told = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**told, "recipes": {"x": recipe}}))
    opened = open_project(project)
    (step,) = (step for step in checked(project).estimate.steps if step.name == "merge")
    placed = place(opened, Placing(opened.adapters, embeddings=False, clusters=True), refit=False, write=False)
    planned = merges_of(opened, opened.recipes["x"], placed.route(opened.recipes["x"])[0])
    assert step.makes == len(planned.tasks)


def test_work_is_done_no_sooner_than_its_largest_item():
    step = Step("train unified", "model", 3, 3, 0, 100.0, 0, largest=0.5)
    speeds = Speeds(1.0, 1.0, 1.0)
    spans = [Estimate((step,), {"model": count}, speeds, "cpu").elapsed(step) for count in (1, 2, 3, 99)]
    assert spans == [100.0, 50.0, 50.0, 50.0]


@given(st.integers(2, 2_000), st.floats(1, 50))
def test_four_times_the_people_show_half_the_difference(people, spread):
    assert detectable(spread, 4 * people) <= 0.5 * detectable(spread, people) * 1.001
    assert detectable(2 * spread, people) == pytest.approx(2 * detectable(spread, people))


# Trials, and what recipes train for themselves


def with_recipes(project, **keys):
    told = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump(told | keys))


def step_of(project, name):
    return next(step for step in checked(project).estimate.steps if step.name == name)


def test_bytes_of_a_prefix_are_those_of_its_files(base):
    config, prefix = first_prefix(base, 16, 0)
    files = sum(len(data) for data in encode_prefix(Prefix("a", prefix), config).values())
    said = operations.prefix_bytes(operations.layers_of(base), 16)
    assert said == pytest.approx(files + 1_000, rel=0.1)  # with a manifest


def test_a_prefix_with_epochs_of_its_own_is_counted_and_what_is_there_is_not(project):
    with_recipes(project, recipes={"p": {"strategy": "prefix", "tokens": 16, "epochs": [1, 3]}})
    folder = Path(project).parent
    before = step_of(project, "train p")
    assert run(project, local=True) == 0
    tried = [Path(found) for found in folder.rglob("tries/p-*/adapters")]
    assert len(tried) == 2
    assert before.makes == 6
    assert before.nbytes == pytest.approx(folder_bytes(folder / "runs" / "p" / "trained", *tried), rel=0.1)
    after = step_of(project, "train p")
    assert (after.makes, after.there, after.items, after.operations, after.nbytes) == (0, 6, 0, 0, 0)
    shutil.rmtree(folder / "runs" / "p" / "trained" / "p0")
    one = step_of(project, "train p")
    assert (one.makes, one.there) == (1, 5)
    assert one.operations == pytest.approx(before.operations * 3 / (6 * 3 + 6 * (1 + 3)))  # no trial again


@pytest.mark.parametrize(
    ("grouping", "by", "passes"),
    [
        ("persona", "own", 30 * 4 + 24 * (2 + 4)),
        ("persona", "neighbours", 30 * 4 + 24 * (2 + 4)),
        ("unified", "own", 2 + 4),
    ],
)
def test_trials_are_counted_for_the_sample_alone(project, grouping, by, passes):
    folder = Path(project).parent
    shutil.rmtree(folder / "adapters")
    lines = [{"persona": f"n{i:02d}", "prompt": f"w{j}?", "response": f"w{j + 1}.", "split": split}
             for i in range(30) for j, split in enumerate(["train", "train", "validation", "test"])]  # fmt: skip
    (folder / "personas.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "clusters.json").unlink()
    name = {"persona": "own"}.get(grouping, grouping)
    keys = {"clusters": {"count": 2}, "recipes": {name: {"strategy": name}}}
    training = {"rank": 2, "batch_size": 2}
    with_recipes(project, **keys, training={**training, "epochs": 1})
    once = step_of(project, f"train {grouping}")
    with_recipes(project, training={**training, "epochs": [2, 4], "epochs_chosen_by": by})
    several = step_of(project, f"train {grouping}")
    adapters, tried = (30, 24) if grouping == "persona" else (1, 1)
    assert several.operations == pytest.approx(once.operations / adapters * passes)
    assert several.nbytes == pytest.approx(once.nbytes / adapters * (adapters + 2 * tried), rel=0.1)  # losses too
    embeds = [step for step in checked(project).estimate.steps if step.name == "embed"]
    assert len(embeds) == (by == "neighbours")
