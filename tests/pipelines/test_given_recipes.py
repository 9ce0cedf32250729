"""Recipes from the command line: read as the project file would give them, and evaluated like any other run."""

import json
from pathlib import Path

import pytest
import yaml

from raymerge.errors import EvaluationError, RaymergeError, RecipeError
from raymerge.pipelines.compare import compare
from raymerge.pipelines.evaluate import evaluate
from raymerge.pipelines.merge import merge


def recorded(project: str, run: str) -> dict:
    return json.loads((Path(project).parent / "runs" / run / "recipe.json").read_text())


def test_a_run_made_from_the_command_line_is_evaluated_and_compared(project, capsys):
    given = {"strategy": "cluster_average", "name": "2024", "rank": "0.5", "scale": "1e-1"}
    assert merge(project, extra=given, local=True) == 0
    assert (recorded(project, "2024")["rank"], recorded(project, "2024")["scale"]) == ({"energy": 0.5}, 0.1)
    before = recorded(project, "2024")
    assert evaluate(project, runs=["2024"], local=True) == 0
    assert recorded(project, "2024") == before
    assert merge(project, recipes=["small"], local=True) == 0
    assert evaluate(project, local=True) == 0  # all that were merged, from wherever
    capsys.readouterr()
    assert compare(project, as_json=True) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"2024", "small"}


def test_any_method_can_be_given_with_its_parameters(project):
    given = {"strategy": "top_k", "k": 3, "method": "dare_ties"}
    assert merge(project, extra=given, parameters=["density=0.4", "seed=7"], local=True) == 0
    assert recorded(project, "top_k_k3_dare_ties")["method_parameters"] == {
        "density": 0.4, "seed": 7, "majority_sign": "total",
    }  # fmt: skip
    assert evaluate(project, runs=["top_k_k3_dare_ties"], local=True) == 0
    for wrong in ("density", "=3", "density=[", "k=4"):
        with pytest.raises(RecipeError, match="--param"):
            merge(project, extra=given, parameters=[wrong], local=True)
    with pytest.raises(RecipeError, match="parameter 'x'"):
        merge(project, extra=given, parameters=["x="], local=True)


def test_parameters_are_read_as_fuse_reads_them(project):
    given = {"strategy": "top_k", "k": 3, "method": "dare_ties", "rank": "{energy: 9e-1, max: 3}"}
    with pytest.raises(RecipeError, match=r"^--param density=0.5: density is given twice"):
        merge(project, extra=given, parameters=["density=0.2", "density=0.5"], plan=True)
    assert merge(project, extra=given, parameters=["density=5e-1", "majority-sign=frequency"], local=True) == 0
    made = recorded(project, "top_k_k3_dare_ties")
    assert made["method_parameters"] == {"density": 0.5, "seed": 0, "majority_sign": "frequency"}
    assert made["rank"] == {"energy": 0.9, "max": 3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "../../evil"}, r"--name \.\./\.\./evil: cannot be the name of a folder"),
        ({"name": "plots"}, "--name plots: is taken by the report"),
        ({"name": "_shared"}, "--name _shared: cannot be"),
        ({"name": ""}, "--name : cannot be"),
        ({"rank": "["}, r"--rank \[: cannot be read\.\nExpected keep, exact"),
        ({"rank": "two"}, "rank 'two' is no rank"),
        ({"method": "tie"}, "unknown method 'tie'. Did you mean ties"),
        ({"method": "ties", "density": 1.5}, r"method ties: density 1.5 cannot be used.\nExpected a density above 0"),
        ({"scale": "nan"}, "scale is a number, match_norm"),
    ],
)
def test_what_cannot_be_given_is_refused_and_nothing_written(project, given, message):
    before = {p for p in Path(project).parents[1].rglob("*") if p.name != "runs"}
    with pytest.raises(RecipeError, match=message):
        merge(project, extra={"strategy": "own", **given}, local=True)
    assert {p for p in Path(project).parents[1].rglob("*") if p.name != "runs"} == before


def test_a_run_that_is_not_there_is_refused_with_those_that_are(project):
    assert merge(project, recipes=["own"], local=True) == 0
    with pytest.raises(EvaluationError, match=r"run ow has not been merged.\nDid you mean own\? Found: own"):
        evaluate(project, runs=["ow"], local=True)
    with pytest.raises(EvaluationError, match=r"run \.\./runs/own has not been merged"):
        evaluate(project, runs=["../runs/own"], local=True)


def test_a_recorded_recipe_of_another_version_is_refused(project):
    assert merge(project, extra={"strategy": "own", "name": "old"}, local=True) == 0
    record = Path(project).parent / "runs/old/recipe.json"
    for change in ({"strategy": "magic"}, {"knob": 1}):
        record.write_text(json.dumps({**recorded(project, "old"), **change}))
        with pytest.raises(RecipeError, match=r"old/recipe.json: is not a recipe that this version knows"):
            evaluate(project, runs=["old"], local=True)


def test_a_project_without_recipes_can_be_evaluated(project):
    value = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**value, "recipes": {}}))
    with pytest.raises(EvaluationError, match="a run has not been merged"):
        evaluate(project, local=True)
    assert merge(project, extra={"strategy": "base"}, local=True) == 0
    assert evaluate(project, local=True) == 0


def test_a_file_of_recipes_is_merged_like_recipes_of_the_project(project, monkeypatch):
    written = {
        "best": {"strategy": "cluster_average", "scale": {"match_norm": 1.2}, "rank": "exact"},
        "chance": {"strategy": "random_k", "of": "best"},
        "small": {"strategy": "own", "rank": 1},  # another one than the project's
    }
    folder = Path(project).parent
    (folder / "best_recipe.yaml").write_text(yaml.safe_dump(written))
    monkeypatch.chdir(folder)
    assert merge(project, recipes=["best_recipe.yaml", "own"], local=True) == 0
    assert {path.name for path in (folder / "runs").iterdir() if path.name[0] != "_"} == {*written, "own"}
    assert recorded(project, "best")["scale"] == {"match_norm": 1.2}
    assert recorded(project, "chance")["scale"] == {"match_norm": 1.2}
    assert recorded(project, "small")["strategy"] == "own"
    assert evaluate(project, recipes=[str(folder / "best_recipe.yaml")], local=True) == 0
    assert evaluate(project, runs=["best"], local=True) == 0
    means = [
        json.loads((folder / "runs/best" / name / "summary.json").read_text())["mean"]
        for name in ("evaluation", "evaluation_in_memory")
    ]
    assert means[0] == pytest.approx(means[1], abs=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"x\.yaml: there is no such file of recipes"),
        ("a: [", r"x\.yaml: is not YAML"),
        ("strategy: own", r"x\.yaml: is not a file of recipes\.\nExpected names with a recipe each, such as `best"),
        ("", r"x\.yaml: is not a file of recipes"),
        ("../evil: {strategy: own}", r"x\.yaml: '\.\./evil' cannot be the name of a folder"),
        ("a: {strategy: top_k, kk: 3}", r"recipe a: unknown parameter 'kk'"),
    ],
)
def test_a_file_that_holds_no_recipes_is_refused(project, text, message):
    location = Path(project).parent / "x.yaml"
    if text is not None:
        location.write_text(text)
    with pytest.raises(RaymergeError, match=message):
        merge(project, recipes=[str(location)], local=True)
