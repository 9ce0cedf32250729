"""Scales per cluster and per group of layers: what is merged is what one would have written by hand."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from raymerge.adapters import load_adapter
from raymerge.errors import RaymergeError, RecipeError
from raymerge.merging.merge import merge as merge_adapters
from raymerge.merging.scale import scaled
from raymerge.pipelines.evaluate import evaluate
from raymerge.pipelines.merge import merge
from raymerge.pipelines.opening import open_project
from raymerge.pipelines.placing import Placing, place
from raymerge.pipelines.planning import Merges, merges_of
from raymerge.pipelines.scoring import Answering, answering_of
from tests.pipelines.conftest import NAMES

CLUSTERS = {"cluster_00": 0.4, "cluster_01": -0.2}
LAYERS = [0.3, -0.1]


def change(project: str, **recipes) -> str:
    value = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**value, "recipes": recipes}))
    return project


def planned(project: str, name: str) -> tuple[Merges, dict[str, Answering]]:
    opened = open_project(project)
    placed = place(opened, Placing(opened.adapters, embeddings=False, clusters=True), refit=False, write=False)
    recipe = opened.recipes[name]
    table, _ = placed.route(recipe)
    merges = merges_of(opened, recipe, table)
    return merges, answering_of(opened, recipe, table, merges, {}, in_memory=True)


def adapter(project: str, run: str, name: str):
    return load_adapter(str(Path(project).parent / "runs" / run / "adapters" / name))


@pytest.mark.parametrize("scale", [1.3, "match_norm", {"match_norm": 0.7}])
def test_a_cluster_is_merged_at_its_own_scale(project, scale):
    like = {"strategy": "cluster_average", "rank": "exact"}
    recipes = {"offset": {**like, "scale": scale, "scale_offsets": {"clusters": {"cluster_01": -0.2}}}}
    recipes |= {
        label: {**like, "scale": scaled(scale, math.exp(d))} for label, d in {**CLUSTERS, "cluster_00": 0}.items()
    }
    change(project, **recipes)
    assert merge(project, local=True) == 0
    for label in CLUSTERS:
        found, wanted = adapter(project, "offset", label), adapter(project, label, label)
        for path, module in wanted.modules.items():
            torch.testing.assert_close(found.modules[path].B @ found.modules[path].A, module.B @ module.A)
    tasks = [planned(project, name)[0].tasks["cluster_00"] for name in ("offset", "cluster_00")]
    assert tasks[0].merges == tasks[1].merges  # so that results made without offsets stay valid


@pytest.mark.parametrize("scale", [0.8, "match_norm"])
def test_weights_vary_with_the_depth(project, scale):
    offsets = {"layers": LAYERS, "clusters": CLUSTERS}
    change(project, x={"strategy": "cluster_average", "rank": "exact", "scale": scale, "scale_offsets": offsets})
    assert merge(project, local=True) == 0
    own = [load_adapter(str(Path(project).parent / "adapters" / name)) for name in NAMES[:3]]
    weights = [[math.exp(d) / 3 for d in LAYERS]] * 3
    wanted = merge_adapters(own, weights, rank="exact", scale=scaled(scale, math.exp(0.4)))
    found = adapter(project, "x", "cluster_00")
    for path, module in wanted.modules.items():
        torch.testing.assert_close(found.modules[path].B @ found.modules[path].A, module.B @ module.A)
    plain = merge_adapters(own, rank="exact", scale=scale)
    ratios = {
        path: float((module.B @ module.A).norm() / (plain.modules[path].B @ plain.modules[path].A).norm())
        for path, module in wanted.modules.items()
    }
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    assert ratios[first] / ratios[last] == pytest.approx(math.exp(0.4), rel=1e-4)


def test_one_offset_for_all_layers_is_a_scale(project):
    like = {"strategy": "cluster_average", "rank": 2, "method": "ties", "density": 0.5}
    change(project, a={**like, "scale_offsets": {"layers": [0.3]}}, b={**like, "scale": {"match_norm": math.exp(0.3)}})
    assert merge(project, local=True) == 0
    found, wanted = adapter(project, "a", "cluster_00"), adapter(project, "b", "cluster_00")
    for path, module in wanted.modules.items():
        torch.testing.assert_close(found.modules[path].B @ found.modules[path].A, module.B @ module.A)


def test_a_mixture_serves_clusters_and_a_merge_layers_and_both_score_as_what_is_written(project):
    like = {"strategy": "cluster_average", "rank": "exact"}
    change(
        project, by_cluster={**like, "scale_offsets": {"clusters": CLUSTERS}},
        by_layer={**like, "scale_offsets": {"layers": LAYERS}},
    )  # fmt: skip
    kinds = {name: {a.source.kind for a in planned(project, name)[1].values()} for name in ("by_cluster", "by_layer")}
    assert kinds == {"by_cluster": {"mixture"}, "by_layer": {"merge"}}
    assert merge(project, local=True) == 0
    assert evaluate(project, local=True) == 0
    assert evaluate(project, recipes=["by_cluster", "by_layer"], local=True) == 0
    for name in kinds:
        run = Path(project).parent / "runs" / name
        means = [
            json.loads((run / f / "summary.json").read_text())["mean"] for f in ("evaluation", "evaluation_in_memory")
        ]
        assert means[0] == pytest.approx(means[1], abs=1e-3)


def test_a_tuned_scale_is_that_of_which_offsets_are_measured(project):
    recipe = {"strategy": "cluster_average", "scale": "tuned", "rank": "exact", "scale_offsets": {"clusters": CLUSTERS}}
    change(project, x=recipe, control={"strategy": "random_k", "of": "x"})
    assert open_project(project).recipes["control"].scale_offsets == {"clusters": CLUSTERS}
    assert merge(project, local=True) == 0
    run = Path(project).parent / "runs" / "x"
    factor = json.loads((run / "tuning/tuning.json").read_text())["chosen"]["factor"]
    for label, d in CLUSTERS.items():
        written = json.loads((run / "adapters" / label / "manifest.json").read_text())["merges"]["scale"]
        assert written == {"match_norm": pytest.approx(factor * math.exp(d))}


def norm(found) -> float:
    return math.sqrt(sum(float((m.scaling * m.B @ m.A).square().sum()) for m in found.modules.values()))


def test_neighbours_that_clusters_have_in_common_are_merged_for_each(project):
    """Of three alike at least two have the same nearest one, and lie in different clusters here."""
    labels = {name: f"cluster_{number % 3:02d}" for number, name in enumerate(NAMES)}
    (Path(project).parent / "clusters.json").write_text(json.dumps(labels))
    offsets = {"cluster_00": 0.4, "cluster_01": -0.2, "cluster_02": 0.1}
    like = {"strategy": "top_k", "k": 1, "scale": 1.5, "rank": "exact"}
    told = yaml.safe_load(Path(project).read_text()) | {"embedding": {"source": "deltas"}}
    Path(project).write_text(yaml.safe_dump(told))
    change(project, plain=like, x={**like, "scale_offsets": {"clusters": offsets}})
    assert merge(project, local=True) == 0
    given = {run: planned_adapters(project, run) for run in ("plain", "x")}
    assert len(set(given["plain"].values())) < len(NAMES)
    for name in NAMES:
        found, plain = (norm(adapter(project, run, given[run][name])) for run in ("x", "plain"))
        assert found / plain == pytest.approx(math.exp(offsets[labels[name]]), rel=1e-4)
    assert evaluate(project, local=True) == 0


def planned_adapters(project: str, run: str) -> dict[str, str]:
    """Persona -> name of its adapter, as a run says."""
    info = json.loads((Path(project).parent / "runs" / run / "routing_info.json").read_text())
    return {name: told["adapter"] for name, told in info["personas"].items()}


def test_one_adapter_for_all_is_one_for_each_cluster_whose_scale_is_set_apart(project):
    like = {"strategy": "simple_average", "rank": "exact"}
    change(project, plain=like, x={**like, "scale_offsets": {"clusters": {"cluster_01": -0.2}}})
    assert merge(project, local=True) == 0
    adapters = Path(project).parent / "runs/x/adapters"
    assert sorted(path.name for path in adapters.iterdir()) == ["all", "all_cluster_01"]
    assert planned_adapters(project, "x") == {n: "all" if i < 3 else "all_cluster_01" for i, n in enumerate(NAMES)}
    norms = {name: norm(adapter(project, "x", name)) for name in ("all", "all_cluster_01")}
    assert norms["all"] == pytest.approx(norm(adapter(project, "plain", "all")))
    assert norms["all_cluster_01"] / norms["all"] == pytest.approx(math.exp(-0.2), rel=1e-4)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"strategy": "cluster_average", "scale_offsets": {"clusters": {"cluster_1": 0.1}}},
         "recipe x: scale_offsets: unknown cluster 'cluster_1'. Did you mean cluster_01?"),
        ({"strategy": "simple_average", "scale_offsets": {"clusters": {"cluster_1": 0.1}}},
         "recipe x: scale_offsets: unknown cluster 'cluster_1'. Did you mean cluster_01?"),
    ],
)  # fmt: skip
def test_offsets_that_fit_no_adapter_are_refused_before_anything_is_merged(project, recipe, message):
    change(project, x=recipe)
    with pytest.raises(RecipeError, match=re.escape(message)):
        planned(project, "x")
    with pytest.raises(RaymergeError, match=re.escape(message)):
        merge(project, local=True)
