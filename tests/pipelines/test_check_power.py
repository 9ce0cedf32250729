"""The smallest difference that `check` names, against the one that the comparison names on the same data."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from raymerge import storage
from raymerge.config import load_project
from raymerge.manifest import write_artefact
from raymerge.pipelines.check import checked
from raymerge.pipelines.compare import compare_runs
from raymerge.recipes import parse_recipe

NAMES = tuple(f"p{i}" for i in range(6))
RETRIEVAL = {"retrieval": {"examples": 1}}


def write_runs(project: str, recipes: dict, seed: int = 0) -> None:
    """The project's recipes, each with an evaluation of six personas' two test rows. Figures are random, those of rows
    with examples in their prompts widely so."""
    told = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump(told | {"recipes": recipes}))
    random = np.random.default_rng(seed)
    for name, written in recipes.items():
        folder = Path(load_project(project).run_folder(name))
        spread = 0.4 if "retrieval" in written else 0.05
        columns = {"persona": np.repeat(NAMES, 2), "example": np.tile([0, 1], 6),
                   "similarity": 0.5 + spread * random.uniform(-1, 1, 12)}  # fmt: skip
        texts = {key: ["w1"] * 12 for key in ("prompt", "reference", "generated")}
        metrics = storage.encode_parquet(pa.table(columns))
        files = {
            "metrics.parquet": metrics,
            "generations.parquet": storage.encode_parquet(pa.table(columns | texts)),
            "summary.json": storage.encode_json({"failed": {}, "mean": {"similarity": 0.5}}),
        }
        write_artefact(str(folder / "evaluation"), files, {}, "key")
        people, nothing = pa.array(NAMES), pa.nulls(6, pa.string())
        tables = {
            "routing": {"persona": people, "expert": nothing, "weight": pa.nulls(6, pa.float64())},
            "assignments": {"persona": people, "adapter": nothing, "location": nothing},
        }
        for table, content in tables.items():
            storage.write_bytes(str(folder / f"{table}.parquet"), storage.encode_parquet(pa.table(content)))
        recipe = parse_recipe(name, written).as_dict()
        storage.write_bytes(str(folder / "recipe.json"), storage.encode_json(recipe))


def power(project: str) -> dict:
    (found,) = (section for section in checked(project).sections if section.name == "power")
    return found.facts


@pytest.mark.parametrize(
    "tested",
    [
        {},
        {"small": {"strategy": "cluster_average"}},
        {f"merge{i}": {"strategy": "cluster_average", "scale": 1.0 + i} for i in range(5)},
    ],
)
def test_check_and_compare_name_the_same_smallest_difference(project, tested):
    before = {"rag+unified": {"strategy": "unified", **RETRIEVAL}}  # in the order of folders
    write_runs(project, {**before, "unified": {"strategy": "unified"}, "own": {"strategy": "own"}, **tested})
    facts = power(project)
    compared = compare_runs(project).comparison
    assert facts["measured"]
    assert facts["detectable"] == pytest.approx(compared.smallest_detectable)
    assert facts["hypotheses"] == len(tested)


def test_a_row_with_examples_in_its_prompts_is_no_reference(project):
    write_runs(project, {"a+unified": {"strategy": "unified", **RETRIEVAL}, "small": {"strategy": "cluster_average"}})
    assert not power(project)["measured"]


def test_more_recipes_need_a_larger_difference_before_anything_was_run(project):
    told = yaml.safe_load(Path(project).read_text())
    found = []
    for count in (1, 8):
        recipes = {f"m{i}": {"strategy": "cluster_average", "scale": 1.0 + i} for i in range(count)}
        Path(project).write_text(yaml.safe_dump(told | {"recipes": recipes | {"base": {"strategy": "base"}}}))
        found.append(power(project))
    assert [facts["hypotheses"] for facts in found] == [1, 8]
    assert found[1]["detectable"] > 1.1 * found[0]["detectable"]
