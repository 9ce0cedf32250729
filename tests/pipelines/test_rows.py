"""Rows that train, choose or ask something of their own, on a small project: what is planned, written and published."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from raymerge.adapters import read_adapter
from raymerge.config import load_project
from raymerge.errors import PersonaError, ProjectError, RecipeError
from raymerge.pipelines.demo import project_file
from raymerge.pipelines.evaluate import evaluate
from raymerge.pipelines.job import kinds_used
from raymerge.pipelines.merge import merge
from raymerge.pipelines.opening import open_project
from raymerge.pipelines.plan import Plan, Steps
from raymerge.pipelines.run import run
from raymerge.pipelines.train import train
from raymerge.recipes import parse_recipes
from raymerge.routing.strategies import STRATEGIES


def change(location: str, **keys) -> str:
    project = yaml.safe_load(Path(location).read_text())
    Path(location).write_text(yaml.safe_dump({**project, **keys}))
    return location


def runs(project: str) -> Path:
    return Path(project).parent / "runs"


def similarity(project: str, name: str, folder: str = "evaluation") -> float:
    return json.loads((runs(project) / name / folder / "summary.json").read_text())["mean"]["similarity"]


def assigned(project: str, name: str) -> dict[str, str | None]:
    rows = pq.read_table(runs(project) / name / "assignments.parquet").to_pylist()
    return {row["persona"]: row["location"] for row in rows}


def test_a_tuned_scale_is_the_best_of_the_grid_on_validation_examples_and_is_what_is_published(project):
    recipes = {"plain": {"strategy": "cluster_average"}, "tuned": {"strategy": "cluster_average", "scale": "tuned"}}
    change(project, recipes=recipes, evaluation={"scales": [0.5, 1, 3], "personas_per_item": 4, "batch_size": 4})
    assert merge(project, local=True) == 0
    told = json.loads((runs(project) / "tuned/tuning/tuning.json").read_text())
    assert [one["factor"] for one in told["tried"]] == [0.5, 1, 3]
    best = max(told["tried"], key=lambda one: one["similarity"])
    assert told["chosen"] == {"factor": best["factor"]}
    plain = read_adapter(str(runs(project) / "plain/adapters/cluster_00"), "x")
    tuned = read_adapter(str(runs(project) / "tuned/adapters/cluster_00"), "x")
    for path, module in plain.modules.items():
        expected = best["factor"] * (module.B @ module.A)
        assert np.allclose(tuned.modules[path].B @ tuned.modules[path].A, expected, atol=1e-6)
    manifest = json.loads((runs(project) / "tuned/adapters/cluster_00/manifest.json").read_text())
    assert manifest["merges"]["scale"] == ("match_norm" if best["factor"] == 1 else {"match_norm": best["factor"]})
    assert json.loads((runs(project) / "tuned/recipe.json").read_text())["scale"] == "tuned"


def test_what_is_tuned_is_scored_as_a_merge_of_that_scale_is(project):
    fixed = {f"at_{f}": {"strategy": "cluster_average", "scale": {"match_norm": f}} for f in (0.5, 3)}
    evaluation = {"scales": [0.5, 3], "personas_per_item": 4, "batch_size": 4, "split": "validation"}
    change(
        project, recipes={**fixed, "tuned": {"strategy": "cluster_average", "scale": "tuned"}}, evaluation=evaluation
    )
    assert run(project, local=True) == 0
    told = json.loads((runs(project) / "tuned/tuning/tuning.json").read_text())
    for one in told["tried"]:
        name = f"at_{one['factor']:g}"
        assert one["similarity"] == pytest.approx(100 * similarity(project, name), abs=1e-3)


def test_a_tuned_adapter_as_trained_is_scaled_or_used_as_it_is(project):
    change(project, recipes={"own": {"strategy": "own", "scale": "tuned"}})
    assert merge(project, local=True) == 0
    factor = json.loads((runs(project) / "own/tuning/tuning.json").read_text())["chosen"]["factor"]
    places = assigned(project, "own")
    if factor == 1:
        assert places["p0"] == "adapters/p0"
    else:
        assert places["p0"] == "runs/own/adapters/p0"


def test_again_nothing_is_done(project, capsys):
    recipes = {
        "own": {"strategy": "own", "scale": "tuned"},
        "base": {"strategy": "base"},
        "best": {"strategy": "selective"},
    }
    change(project, recipes=recipes)
    assert run(project, local=True) == 0
    capsys.readouterr()
    assert run(project, local=True) == 0
    last = next(line for line in capsys.readouterr().out.splitlines() if "items done" in line)
    done, skipped = last.split(" items done, ")[0], last.split(" items done, ")[1].split(" ")[0]
    assert done == skipped


def test_hybrid_is_the_sum_of_unified_and_own_at_the_chosen_weight(project):
    recipes = {"hybrid": {"strategy": "hybrid", "rank": "exact", "scale": 1}}
    change(project, adapters="new/{persona}", recipes=recipes)
    assert run(project, local=True) == 0
    weight = json.loads((runs(project) / "hybrid/tuning/tuning.json").read_text())["chosen"]["own_weight"]
    merged = read_adapter(str(runs(project) / "hybrid/adapters/p3"), "x")
    own = read_adapter(str(Path(project).parent / "new/p3"), "x")
    unified = read_adapter(str(Path(project).parent / "unified"), "x")
    for path, module in merged.modules.items():
        expected = sum(
            w * a.modules[path].scaling * (a.modules[path].B @ a.modules[path].A).float()
            for w, a in ((weight, own), (1 - weight, unified))
            if path in a.modules
        )
        assert np.allclose(module.scaling * (module.B @ module.A), expected, atol=1e-5)


def test_selective_gives_each_persona_one_of_the_rows_it_chooses_among(project):
    recipes = {name: {"strategy": name} for name in ("base", "own", "unified", "cluster_trained")}
    change(project, recipes={**recipes, "best": {"strategy": "selective"}})
    assert run(project, recipes=["best"], local=True) == 0
    for persona, place in assigned(project, "best").items():
        assert place in (None, f"adapters/{persona}", "unified", "clusters/cluster_00", "clusters/cluster_01")
    means = {name: similarity(project, name, "validation") for name in recipes}
    info = json.loads((runs(project) / "best/routing_info.json").read_text())
    best = max(sorted(means), key=lambda name: means[name])
    assert any(f"{best} is best for the population" in note for note in info["notes"])


def test_selective_in_memory_chooses_the_same(project):
    recipes = {"base": {"strategy": "base"}, "own": {"strategy": "own"}, "best": {"strategy": "selective"}}
    change(project, recipes=recipes)
    assert run(project, local=True) == 0
    assert evaluate(project, recipes=["best"], local=True) == 0
    assert similarity(project, "best", "evaluation_in_memory") == pytest.approx(similarity(project, "best"), abs=1e-6)


def test_neighbours_trained_trains_on_the_rows_of_the_experts(project):
    recipes = {
        "moe": {"strategy": "cluster_average"},
        "trained": {"strategy": "neighbours_trained", "of": "moe", "epochs": 2},
    }
    change(project, recipes=recipes)
    assert run(project, local=True) == 0
    place = runs(project) / "trained/trained/cluster_00"
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["personas"] == ["p0", "p1", "p2"]
    assert manifest["grouping"] == "neighbours"
    assert manifest["training"]["epochs"] == 2
    assert assigned(project, "trained")["p1"] == "runs/trained/trained/cluster_00"
    assert (runs(project) / "trained/evaluation/summary.json").exists()


def test_epochs_are_tried_and_the_best_on_validation_examples_is_trained(project):
    change(project, training={"rank": 2, "batch_size": 2, "epochs": [1, 3]}, adapters="new/{persona}")
    for grouping in ("persona", "cluster"):
        assert train(project, group_by=grouping, local=True) == 0
        tries = {n: runs(project) / f"_shared/tries/{grouping}-{n}/evaluation/summary.json" for n in (1, 3)}
        tried = {str(n): json.loads(p.read_text())["mean"]["similarity"] for n, p in tries.items()}
        place = {"persona": "new/p0", "cluster": "clusters/cluster_00"}[grouping]
        manifest = json.loads((Path(project).parent / place / "manifest.json").read_text())
        assert manifest["epochs_chosen"]["tried"] == pytest.approx(tried, abs=1e-3)
        best = max(tried, key=lambda n: (tried[n], -int(n)))
        assert manifest["epochs_chosen"]["chosen"] == int(best)
        assert manifest["training"]["epochs"] == int(best)


def test_what_trains_its_own_needs_a_name_of_its_own(project):
    with pytest.raises(RecipeError, match="the name is taken by what is trained"):
        run(change(project, recipes={"persona": {"strategy": "prefix"}}), local=True)


def test_retrieval_changes_the_prompt_of_a_row_alone(project):
    change(project, recipes={"base": {"strategy": "base"}, "rag": {"strategy": "base", "retrieval": 1}})
    assert run(project, local=True) == 0
    plain, rag = (pq.read_table(runs(project) / n / "evaluation/generations.parquet") for n in ("base", "rag"))
    assert plain["prompt"].to_pylist() == rag["prompt"].to_pylist()
    nll = [pq.read_table(runs(project) / n / "evaluation/metrics.parquet")["nll"].to_pylist() for n in ("base", "rag")]
    assert nll[0] != nll[1]


def test_prefixes_are_trained_and_answer(project):
    change(project, recipes={"prefix": {"strategy": "prefix", "tokens": 2, "epochs": 1}})
    assert run(project, local=True) == 0
    config = json.loads((runs(project) / "prefix/trained/p0/adapter_config.json").read_text())
    assert config["peft_type"] == "PREFIX_TUNING"
    assert json.loads((runs(project) / "prefix/evaluation/summary.json").read_text())["personas"] == 6


def test_seeds_train_everything_again_in_places_of_their_own(project):
    change(project, adapters="new/{persona}", recipes={"own": {"strategy": "own"}, "unified": {"strategy": "unified"}})
    assert run(project, seeds=2, local=True) == 0
    first = read_adapter(str(Path(project).parent / "new/p0"), "x")
    second = read_adapter(str(runs(project) / "_seeds/1/_trained/adapters/p0"), "x")
    path = next(iter(first.modules))
    assert not np.allclose(first.modules[path].A, second.modules[path].A)
    assert (runs(project) / "_seeds/1/own/evaluation/summary.json").exists()
    row = next(r for r in json.loads((runs(project) / "comparison.json").read_text())["rows"] if r["name"] == "own")
    assert row["over_seeds"]["seeds"] == 2


def test_adapters_of_others_cannot_be_trained_with_other_seeds(project):
    with pytest.raises(ProjectError, match="was not trained by raymerge"):
        run(project, recipes=["own"], seeds=2, local=True)


def test_without_validation_examples_nothing_can_be_tuned(project):
    rows = [json.loads(line) for line in (Path(project).parent / "personas.jsonl").read_text().splitlines()]
    kept = "".join(json.dumps(row) + "\n" for row in rows if row["split"] != "validation")
    (Path(project).parent / "personas.jsonl").write_text(kept)
    for recipe in ({"strategy": "own", "scale": "tuned"}, {"strategy": "hybrid"}):
        with pytest.raises(PersonaError, match="chosen on validation examples, and nobody has any"):
            merge(change(project, recipes={"x": recipe}), local=True)


def test_a_recipe_whose_values_nobody_can_choose_is_given_up_with_what_waits_for_it(project, capsys):
    folder = Path(project).parent
    recipes = {
        "clusters": {"strategy": "cluster_trained", "scale": "tuned"},
        "base": {"strategy": "base"},
        "best": {"strategy": "selective", "among": ["clusters", "base"]},
    }
    change(project, recipes=recipes, embedding={"source": "deltas"}, clusters={"count": 2})
    for name in ("p1", "p2", "p3", "p4", "p5"):
        without(project, name, "validation")
    for name in ("cluster_00", "cluster_01"):
        shutil.copytree(folder / "adapters/p1", folder / "clusters" / name)
    weights = folder / "adapters/p0/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])  # so that the only one with validation examples is not routed
    assert merge(project, local=True) == 1
    told = capsys.readouterr().err
    assert "plan/clusters: clusters: factor is to be chosen on validation examples, and nobody who has a row" in told
    assert "plan/best: best: of what it chooses among, 1 could be scored" in told
    assert (runs(project) / "base/assignments.parquet").exists()


def test_one_cluster_can_be_trained_with_settings_given_here(project, capsys):
    assert train(project, group_by="cluster", cluster="0", settings={"rank": 3}, local=True) == 0
    folder = Path(project).parent / "clusters"
    assert [p.name for p in folder.iterdir()] == ["cluster_00"]
    assert read_adapter(str(folder / "cluster_00"), "x").modules.popitem()[1].rank == 3
    info = json.loads((folder / "cluster_00/cluster_info.json").read_text())
    assert info["members"] == ["p0", "p1", "p2"]
    assert "trained with rank 3 as given here" in capsys.readouterr().err
    with pytest.raises(ProjectError, match="unknown cluster 'cluster_07'"):
        train(project, group_by="cluster", cluster="7", local=True)
    with pytest.raises(ProjectError, match="--rank"):
        train(project, group_by="cluster", settings={"rank": 0}, local=True)
    with pytest.raises(ProjectError, match="goes with --group-by cluster"):
        train(project, group_by="persona", cluster="0", local=True)


def test_selective_serves_the_adapters_that_were_scored_also_where_they_began_from_another(project):
    recipes = {
        "base": {"strategy": "base"},
        "own": {"strategy": "own", "scale": "tuned"},
        "best": {"strategy": "selective"},
    }
    change(project, adapters="new/{persona}", recipes=recipes, evaluation={"scales": [3.0], "personas_per_item": 4})
    assert train(project, group_by="unified", local=True) == 0
    assert train(project, group_by="persona", start_from="unified", local=True) == 0
    assert run(project, local=True) == 0
    for persona, place in assigned(project, "best").items():
        assert place in (None, f"runs/own/adapters/{persona}")
    assert evaluate(project, recipes=["best"], local=True) == 0
    assert similarity(project, "best", "evaluation_in_memory") == pytest.approx(similarity(project, "best"), abs=1e-3)


def test_what_cannot_be_scored_fails_its_own_rows_alone(project, capsys):
    recipes = {
        "own": {"strategy": "own", "scale": "tuned"},
        "base": {"strategy": "base"},
        "average": {"strategy": "cluster_average"},
        "best": {"strategy": "selective", "among": ["own", "base"]},
    }
    change(project, recipes=recipes)
    for name in ("p0", "p1", "p2", "p3", "p4", "p5"):
        weights = Path(project).parent / "adapters" / name / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
    assert run(project, local=True) == 1
    told = capsys.readouterr().err
    assert "plan/own: own: nothing could be scored, so factor is not chosen." in told
    assert "plan/best: best: of what it chooses among, 1 could be scored." in told
    assert (runs(project) / "base/evaluation/summary.json").exists()


def test_a_plan_says_how_many_candidates_are_tried_on_whom(project, capsys):
    recipes = {
        "own": {"strategy": "own", "scale": "tuned"},
        "base": {"strategy": "base"},
        "mixed": {"strategy": "hybrid", "scale": "tuned"},
        "best": {"strategy": "selective", "among": ["own", "base"]},
    }
    change(project, recipes=recipes, evaluation={"scales": [0.5, 1, 2], "tuning_personas": 4, "tuning_examples": 2})
    without(project, "p0", "validation")
    shutil.copytree(Path(project).parent / "adapters/p1", Path(project).parent / "unified")
    assert merge(project, plan=True) == 0
    told = capsys.readouterr().out.splitlines()
    assert "own: 3 candidates of factor are tried first, on up to 2 validation examples of 4 personas" in told
    assert "best: its adapters are chosen among own, base first, by their scores for 5 personas" in told
    assert any(line.startswith("mixed: 12 candidates of factor and own_weight are tried first") for line in told)


def test_a_changed_grid_is_tried_anew(project):
    change(project, recipes={"own": {"strategy": "own", "scale": "tuned"}}, evaluation={"scales": [0.5]})
    assert merge(project, local=True) == 0
    change(project, evaluation={"scales": [2.0]})
    assert merge(project, local=True) == 0
    told = json.loads((runs(project) / "own/tuning/tuning.json").read_text())
    assert told["chosen"] == {"factor": 2.0}


def test_neighbours_are_trained_on_without_training_their_own_adapters(project):
    recipes = {"top": {"strategy": "cluster_average"}, "trained": {"strategy": "neighbours_trained", "of": "top"}}
    change(project, adapters="new/{persona}", recipes=recipes)
    assert run(project, recipes=["trained"], local=True) == 0
    assert not (Path(project).parent / "new").exists()
    change(project, recipes={"u": {"strategy": "unified"}, "t": {"strategy": "neighbours_trained", "of": "u"}})
    with pytest.raises(RecipeError, match="which asks no neighbours"):
        run(project, local=True)


def without(project: str, persona: str, split: str) -> None:
    location = Path(project).parent / "personas.jsonl"
    rows = [json.loads(line) for line in location.read_text().splitlines()]
    kept = [row for row in rows if (row["persona"], row["split"]) != (persona, split) and persona != "*"]
    kept = [row for row in rows if row["split"] != split] if persona == "*" else kept
    location.write_text("".join(json.dumps(row) + "\n" for row in kept))


def test_a_persona_without_training_examples_gets_the_base_instead_of_a_prefix(project):
    change(project, recipes={"prefix": {"strategy": "prefix", "tokens": 2, "epochs": 1}})
    without(project, "p2", "train")
    assert run(project, local=True) == 0
    assert assigned(project, "prefix")["p2"] is None


def test_several_epochs_and_patience_need_validation_examples(project):
    without(project, "p2", "validation")
    change(project, adapters="new/{persona}", training={"epochs": 1, "patience": 1})
    with pytest.raises(PersonaError, match="has `patience`, and p2 has no validation examples"):
        train(project, group_by="persona", local=True)
    without(project, "*", "validation")
    change(project, training={"epochs": [1, 2]})
    with pytest.raises(PersonaError, match="several numbers of epochs to choose from, and nobody has validation"):
        train(project, group_by="cluster", local=True)


def test_only_those_who_will_be_trained_need_validation_examples(project):
    shutil.rmtree(Path(project).parent / "adapters/p0")  # all the others were made elsewhere
    without(project, "p2", "validation")
    change(project, training={"epochs": 1, "rank": 2, "batch_size": 2, "patience": 1})
    assert train(project, group_by="persona", local=True) == 0
    assert (Path(project).parent / "adapters/p0/manifest.json").exists()
    without(project, "p0", "validation")
    with pytest.raises(PersonaError, match="has `patience`, and nobody who is to be trained has validation examples"):
        train(project, group_by="persona", local=True)
    shutil.rmtree(Path(project).parent / "adapters/p1")
    with pytest.raises(PersonaError, match=r"p0 has no validation examples \(1 such personas\)"):
        train(project, group_by="persona", local=True)


def test_a_cluster_of_one_is_refused_where_it_was_given(project):
    labels = {f"p{i}": "cluster_00" if i else "cluster_01" for i in range(6)}
    (Path(project).parent / "clusters.json").write_text(json.dumps(labels))
    with pytest.raises(ProjectError, match="cluster cluster_01 has p0 as its only member"):
        train(project, group_by="cluster", local=True)


def test_epochs_of_found_clusters_are_tried_where_no_recipe_merges(project):
    training = {"rank": 2, "batch_size": 2, "epochs": [1, 2]}
    change(project, clusters={"count": 2}, training=training, recipes={}, hardware={"cpus_per_model": 0.5})
    plan = Plan(open_project(project), Steps(train=("cluster",)))
    assert kinds_used(plan.opened, plan.first()) == {"merge", "model"}
    assert train(project, group_by="cluster", local=True) == 0


def test_other_seeds_begin_where_the_first_did(project):
    change(project, adapters="new/{persona}", recipes={"own": {"strategy": "own"}})
    assert train(project, group_by="unified", local=True) == 0
    assert train(project, group_by="persona", start_from="unified", local=True) == 0
    assert run(project, seeds=2, local=True) == 0
    manifest = json.loads((runs(project) / "_seeds/1/_trained/adapters/p0/manifest.json").read_text())
    assert manifest["training"]["start_from"].endswith("_seeds/1/_trained/unified")


@pytest.mark.parametrize("quick", [False, True])
def test_the_demo_of_all_rows_is_a_project_of_every_strategy(quick, tmp_path):
    (tmp_path / "raymerge.yaml").write_bytes(project_file(quick, 3, all_rows=True))
    loaded = load_project(str(tmp_path / "raymerge.yaml"))
    recipes = parse_recipes(loaded.recipes)
    assert loaded.training.of("persona").tries_neighbours
    left_out = {"named", "learned_router"}  # one takes a choice, the other a router that was trained
    assert {recipe.strategy for recipe in recipes.values()} == set(STRATEGIES) - left_out
    assert {n for n, r in recipes.items() if not r.tuned} == {"base", "rag", "prefix", "selective"}
    assert sum(r.retrieval is not None for r in recipes.values()) == 3
