"""Further adapters beside those of the personas, merged by name."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from raymerge.adapters import load_adapter, save_adapter
from raymerge.errors import AdapterError, ProjectError, RecipeError
from raymerge.pipelines.evaluate import evaluate
from raymerge.pipelines.merge import merge
from raymerge.pipelines.opening import open_project
from tests.pipelines.conftest import make_adapter


@pytest.fixture
def further(project: str) -> str:
    """The project with two more adapters, and recipes that name them."""
    folder = Path(project).parent
    for seed, name in ((70, "m"), (71, "p")):
        save_adapter(make_adapter(name, seed), str(folder / "elsewhere" / name))
    weights = {"maths": 0.8, "poems": -0.3, "p0": 0.5}
    return change(
        project, experts={"maths": "elsewhere/m", "poems": str(folder / "elsewhere" / "p")},
        recipes={
            "everybody": {"strategy": "named", "weights": weights, "rank": "exact", "scale": 1},
            "each": {"strategy": "named", "weights": {"p1": weights, "p2": {"poems": 1}}, "rank": "exact", "scale": 1},
        },
    )  # fmt: skip


def change(project: str, **keys) -> str:
    value = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**value, **keys}))
    return project


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    return {path: m.scaling * m.B @ m.A for path, m in load_adapter(str(folder)).modules.items()}


def test_named_experts_are_merged_at_their_weights_whoever_they_are(further):
    folder = Path(further).parent
    assert merge(further, local=True) == 0
    places = {"maths": "elsewhere/m", "poems": "elsewhere/p", "p0": "adapters/p0"}
    parts = {name: deltas(folder / place) for name, place in places.items()}
    for made in ("everybody/adapters/all", "each/adapters/p1"):
        for path, delta in deltas(folder / "runs" / made).items():
            wanted = 0.8 * parts["maths"][path] - 0.3 * parts["poems"][path] + 0.5 * parts["p0"][path]
            torch.testing.assert_close(delta, wanted, atol=1e-5, rtol=1e-5)
    said = json.loads((folder / "runs/each/routing_info.json").read_text())
    assert said["notes"] == ["p0: is given no weights and gets the base (4 such personas)"]
    assert [path.name for path in (folder / "runs/each/adapters").iterdir()] == ["p1"]  # p2 has an adapter as it is
    assert evaluate(further, local=True) == 0


def test_no_adapter_of_a_persona_is_needed_where_none_is_named(further):
    folder = Path(further).parent
    change(further, adapters="none/{persona}", recipes={"x": {"strategy": "named", "weights": {"maths": 1}}})
    assert merge(further, local=True) == 0
    assert (folder / "runs/x/adapters/all/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"experts": {"p1": "x"}}, ProjectError, "`experts` has p1, who is a persona"),
        ({"experts": {"unified": "x"}}, ProjectError, "experts: the name 'unified' is taken by"),
        ({"experts": {"maths": "nowhere", "poems": "x"}}, AdapterError, "maths: "),
        ({"experts": {"math": "elsewhere/m"}}, RecipeError,
         "recipe each: weights name 'maths', who is no expert. Did you mean math?\nExpected a persona with an"),
        ({"recipes": {"x": {"strategy": "named", "weights": {"p9": {"p1": 1}}}}}, RecipeError,
         "recipe x: weights are given for 'p9', who is no persona."),
        ({"recipes": {"x": {"strategy": "shuffled", "of": {"strategy": "named", "weights": {"zed": 1}}}}}, RecipeError,
         "recipe x: weights name 'zed', who is no expert.\nExpected"),
    ],
)  # fmt: skip
def test_names_that_mean_nothing_are_refused_before_anything_starts(further, keys, error, message):
    change(further, **keys)
    with pytest.raises(error, match=re.escape(message)):
        open_project(further)
