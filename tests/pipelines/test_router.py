"""`raymerge router` without Ray: trained, tuned, merged and scored; goes on from anywhere; refused before it starts."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from raymerge.adapters import load_adapter, save_adapter
from raymerge.cli import main
from raymerge.errors import AdapterError, PersonaError, ProjectError, RoutingError
from raymerge.pipelines.merge import merge
from raymerge.pipelines.opening import Opened, open_project
from raymerge.pipelines.placing import Placing
from raymerge.pipelines.router import aim_of_tuning, check, headline, held_out_from, router, train
from raymerge.pipelines.run import run
from raymerge.pipelines.search import find, placed_for, prepare, search, with_settings
from raymerge.recipes import parse_recipes
from raymerge.runtime.held import HeldWorkers
from raymerge.runtime.workers import ModelWorker
from raymerge.search.results import Summary, read_scores, read_summary, read_trials
from tests.pipelines.conftest import NAMES, make_adapter

SMALL = {"epochs": 2, "k": 3, "trials": 3, "personas_per_step": 4, "rows_per_persona": 2, "rank": 4}


def change(project: str, **keys) -> str:
    value = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**value, **keys}))
    return project


def status(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(one) for one in arguments])
    return int(end.value.code or 0)


def runs_of(project: str) -> Path:
    return Path(project).parent / "runs"


@pytest.fixture
def routed(project) -> str:
    """Six personas of four validation examples each, a unified adapter, and a small router to be trained."""
    save_adapter(make_adapter("unified", 50), str(Path(project).parent / "unified"))
    examples = Path(project).parent / "personas.jsonl"
    more = [
        {"persona": name, "prompt": f"w{i} w{j}?", "response": f"w{j + 1} w{i + 2}.", "split": "validation"}
        for i, name in enumerate(NAMES)
        for j in (7, 8, 9)
    ]
    examples.write_text(examples.read_text() + "".join(json.dumps(line) + "\n" for line in more))
    return change(project, router=SMALL, search={"ranks": [4, "exact"]})


def bytes_of(project: str, *, tuned: bool = True) -> dict[str, bytes]:
    """What a router and its tuning come to, without the seconds that they took."""
    folder = runs_of(project) / "router"
    names = ["router.safetensors", "router.json", "candidates.parquet"]
    names += ["recipe.yaml", "tuning/scores.parquet"] if tuned else []
    found = {name: (folder / name).read_bytes() for name in names}
    return {**found, "routing": (runs_of(project) / "learned_router/routing.parquet").read_bytes()} if tuned else found


def trained(project: str, **settings) -> Opened:
    """The project with a router that was trained, and not yet tuned."""
    opened = with_settings(open_project(project), settings, "router")
    assert train(opened, check(opened), local=True).failed == {}
    return opened


def tuned(project: str) -> None:
    """A router up to the choice, without test scores and their page."""
    opened = trained(project)
    find(prepare(opened, aim_of_tuning(opened, check(opened)), restart=False, local=True), local=True)


def trials_of(project: str) -> list:
    trials = read_trials(str(runs_of(project) / "router/tuning"))
    return [(t.number, t.values, t.state, t.last.values if t.last else None) for t in trials]


# The command


def test_from_training_rows_to_a_row_of_the_comparison(routed, capsys):
    assert status("router", routed, "--local") == 0
    runs, said = runs_of(routed), capsys.readouterr()
    folder = runs / "router"
    record = json.loads((folder / "router.json").read_text())
    assert record["shape"]["k"] == 3
    assert len(record["history"]) == 1 + SMALL["epochs"]
    trials, summary = read_trials(str(folder / "tuning")), read_summary(str(folder / "tuning"))
    assert len(trials) == SMALL["trials"]
    as_trained = {"temperature": 1.0, "scale": record["scale"], "self_weight": 0.0}
    assert trials[0].values == {**as_trained, **{f"scale_offsets.layers.{group}": 0.0 for group in range(3)}}
    assert set(read_scores(str(folder / "tuning")).personas) == set(NAMES)
    assert (summary.run, [one["rank"] for one in summary.ranks]) == ("learned_router", [4, "exact"])
    assert {one["name"] for one in summary.beside} == {"learned_router_random_k", "learned_router_unified"}
    routing = pq.read_table(runs / "learned_router/routing.parquet").to_pylist()
    own = {row["persona"] for row in routing if row["persona"] == row["expert"]}
    assert bool(own) == (trials[summary.winner].values["self_weight"] > 0)
    assert {row["persona"] for row in routing} == set(NAMES)
    rows = {row["name"] for row in json.loads((runs / "comparison.json").read_text())["rows"]}
    assert rows == {"learned_router", "learned_router_random_k", "learned_router_unified"}
    first = said.out.splitlines()[0]
    assert first == headline(summary)
    assert re.match(r"(Better|Not better)", first)
    for begin in ("Winner: trial", "Validation similarity", "By rank: 4: ", "Test similarity", "Recipe: ", "Report: "):
        assert re.search(f"^{begin}", said.out, re.MULTILINE)
    assert said.err.count("router: trial ") == SMALL["trials"]


def test_validation_examples_are_dealt_to_tuning_and_stopping_by_halves(routed):
    """Four each: the first two tune, the last two stop; changing one of either half changes what that half decides."""
    opened = open_project(routed)
    assert check(opened).tuning_examples == 2
    tuned(routed)
    before, scored = bytes_of(routed, tuned=False), trials_of(routed)
    examples = Path(routed).parent / "personas.jsonl"
    lines = [json.loads(line) for line in examples.read_text().splitlines()]
    of_p0 = [line for line in lines if (line["persona"], line["split"]) == ("p0", "validation")]
    of_p0[0]["response"] = "w50 w51 w52."
    examples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tuned(routed)
    assert bytes_of(routed, tuned=False) == before
    assert [one[-1] for one in trials_of(routed)] != [one[-1] for one in scored]
    of_p0[3]["response"] = "w50 w51 w52."
    examples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained(routed)
    assert bytes_of(routed, tuned=False)["router.json"] != before["router.json"]  # its validation losses


def test_its_recipe_merges_and_scores_as_any_other(routed):
    assert router(routed, local=True) == 0
    runs = runs_of(routed)
    recipe = runs / "router/recipe.yaml"
    written = yaml.safe_load(recipe.read_text())
    assert list(written) == ["learned_router"]
    assert written["learned_router"]["strategy"] == "learned_router"
    before = {p.relative_to(runs): p.read_bytes() for p in (runs / "learned_router").rglob("*.safetensors")}
    assert before
    shutil.rmtree(runs / "learned_router")
    assert status("merge", routed, "--recipe", recipe, "--local") == 0
    assert {p.relative_to(runs): p.read_bytes() for p in (runs / "learned_router").rglob("*.safetensors")} == before
    assert status("evaluate", routed, "--run", "learned_router", "--local") == 0
    change(routed, recipes={"mine": {**written["learned_router"], "router": "runs/router"}})
    assert merge(routed, recipes=["mine"], local=True) == 0
    mine, theirs = (pq.read_table(runs / name / "routing.parquet") for name in ("mine", "learned_router"))
    assert mine.equals(theirs)


def test_the_same_command_again_computes_nothing(routed, capsys):
    assert router(routed, local=True) == 0
    made = {p: p.stat().st_mtime_ns for p in runs_of(routed).rglob("manifest.json")}
    found = bytes_of(routed), trials_of(routed)
    capsys.readouterr()
    assert router(routed, local=True) == 0
    assert "router: trial" not in capsys.readouterr().err
    assert (bytes_of(routed), trials_of(routed)) == found
    assert {p: p.stat().st_mtime_ns for p in runs_of(routed).rglob("manifest.json")} == made


def test_interrupted_anywhere_it_ends_as_an_undisturbed_one(routed, monkeypatch):
    assert router(routed, local=True) == 0
    undisturbed = bytes_of(routed), trials_of(routed)
    for name in ("router", "learned_router"):
        shutil.rmtree(runs_of(routed) / name)
    done, stops_at = [], ""
    calls = ("train_router", "tune", "evaluate")

    def until(name):
        real = getattr(ModelWorker, name)

        def interrupted(worker, task):
            if name == stops_at and done.count(name):
                raise KeyboardInterrupt
            result = real(worker, task)
            done.extend([] if result.get("skipped") else [name])
            return result

        monkeypatch.setattr(ModelWorker, name, interrupted)

    for name in calls:
        until(name)
    for stops_at in ("tune", "evaluate"):  # noqa: B007 (it is what `interrupted` looks at)
        assert status("router", routed, "--local") == 130
    assert done.count("train_router") == 1
    monkeypatch.undo()
    assert router(routed, local=True) == 0
    assert (bytes_of(routed), trials_of(routed)) == undisturbed


def test_a_router_of_other_settings_is_tuned_anew_without_being_asked(routed):
    assert router(routed, local=True) == 0
    before, recipe = bytes_of(routed), json.loads((runs_of(routed) / "learned_router/recipe.json").read_text())
    assert status("router", routed, "--network", "mlp", "--epochs", "1", "--k", "2", "--trials", "2", "--local") == 0
    record = json.loads((runs_of(routed) / "router/router.json").read_text())
    assert record["shape"]["network"] == "mlp"
    assert record["shape"]["experts"] == list(NAMES)
    assert len(trials_of(routed)) == 2
    assert json.loads((runs_of(routed) / "learned_router/recipe.json").read_text()) != recipe
    assert router(routed, restart=True, local=True) == 0
    assert bytes_of(routed) == before


def test_more_trials_go_on_with_the_router_there_is(routed):
    assert router(routed, settings={"trials": 2}, local=True) == 0
    before, known = bytes_of(routed, tuned=False), trials_of(routed)
    made = (runs_of(routed) / "router/manifest.json").stat().st_mtime_ns
    assert router(routed, local=True) == 0
    assert trials_of(routed)[:2] == known
    assert len(trials_of(routed)) == SMALL["trials"]
    assert bytes_of(routed, tuned=False) == before
    assert (runs_of(routed) / "router/manifest.json").stat().st_mtime_ns == made


def test_what_is_tuned_is_what_is_published_where_experts_serve_only_so_many(routed):
    opened = trained(routed, max_in_degree=1)
    sought = prepare(opened, aim_of_tuning(opened, check(opened)), restart=False, local=True)
    recipe = sought.scorer.space.recipe(sought.study.ask().values)
    few, everybody = ({}, {})
    for found, rungs in ((few, (2, len(NAMES))), (everybody, (len(NAMES),))):
        for task in replace(sought.scorer, rungs=rungs).parts(recipe, 0).values():
            found |= {source.persona: source for candidate in task.candidates for source in candidate.sources}
    assert len(few) == 2
    assert len(everybody) == len(NAMES)
    assert few == {name: everybody[name] for name in few}
    alone = replace(sought.scorer.placed, inputs=replace(sought.scorer.placed.inputs, personas=sorted(few)), routed={})
    others, _ = sought.scorer.placed.route(recipe)
    assert any(alone.route(recipe)[0].row(name) != others.row(name) for name in few)  # for two alone it would not bind


def test_a_recipe_without_k_asks_as_many_as_the_router_was_trained_with(routed):
    opened = trained(routed, k=2)
    recipes = parse_recipes({"learned": {"strategy": "learned_router"}, "one": {"strategy": "learned_router", "k": 1}})
    placed = placed_for(opened, Placing(opened.adapters, embeddings=True, clusters=True), title="test", local=True)
    for name, count in (("learned", 2), ("one", 1)):
        table, _ = placed.route(recipes[name])
        assert {len(table.row(persona)) for persona in table.personas} == {count}


def test_a_router_of_other_embeddings_is_refused(routed):
    trained(routed)
    shutil.rmtree(runs_of(routed) / "_shared/clusters")  # as --refit fits them anew
    opened = open_project(change(routed, embedding={"source": "deltas"}, recipes={}))
    placed = placed_for(opened, Placing(opened.adapters, embeddings=True, clusters=True), title="test", local=True)
    with pytest.raises(RoutingError, match=r"trained on other embeddings\.\nExpected texts by .*; found deltas"):
        placed.route(parse_recipes({"learned": {"strategy": "learned_router"}})["learned"])


def test_experts_of_several_starts_are_measured_from_the_base_by_its_merges_too(routed, capsys):
    folder = Path(routed).parent
    save_adapter(make_adapter("start", 60), str(folder / "start"))
    started = load_adapter(str(folder / "adapters/p0"))
    save_adapter(replace(started, started_from="start"), str(folder / "adapters/p0"))
    assert router(routed, local=True) == 0
    assert "experts were started from different adapters" in capsys.readouterr().out
    recipe = yaml.safe_load((runs_of(routed) / "router/recipe.yaml").read_text())["learned_router"]
    assert recipe["anchor"] == "none"


# Cold start


def test_who_is_held_out_neither_teaches_nor_serves_and_is_routed(routed):
    change(routed, router={**SMALL, "held_out": ["p1", "p4"]})
    assert router(routed, local=True) == 0
    runs = runs_of(routed)
    record = json.loads((runs / "router/router.json").read_text())
    assert record["held_out"] == ["p1", "p4"]
    assert set(read_scores(str(runs / "router/tuning")).personas) == set(NAMES) - {"p1", "p4"}
    routing = pq.read_table(runs / "learned_router/routing.parquet").to_pylist()
    assert {row["expert"] for row in routing} <= set(NAMES) - {"p1", "p4"}
    assert {row["persona"] for row in routing if row["weight"] > 0} == set(NAMES)
    scored = json.loads((runs / "learned_router/evaluation/summary.json").read_text())
    assert scored["personas"] == len(NAMES)
    lines = (Path(routed).parent / "personas.jsonl").read_text().splitlines()
    taught = bytes_of(routed, tuned=False)
    kept = [  # without all that they could have taught but for where they lie
        {**one, "response": "w9."} if one["persona"] == "p4" and one["split"] == "validation" else one
        for one in map(json.loads, lines)
    ]
    (Path(routed).parent / "personas.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept))
    scored = trials_of(routed)
    tuned(routed)
    assert (bytes_of(routed, tuned=False), trials_of(routed)) == (taught, scored)


def test_so_many_are_drawn_by_the_seed_among_those_with_an_adapter(routed):
    shutil.rmtree(Path(routed).parent / "adapters/p0")
    drawn = set()
    for seed in range(12):
        opened = with_settings(open_project(routed), {"held_out": 2, "seed": seed}, "router")
        found = held_out_from(opened)
        assert len(set(found)) == 2
        assert list(found) == sorted(found)
        assert held_out_from(opened) == found
        drawn |= set(found)
    assert drawn == set(NAMES) - {"p0"}


# Bad input


def test_a_recipe_that_asks_a_router_is_refused_before_anything_starts(routed, capsys):
    recipes = {"learned": {"strategy": "learned_router", "k": 2}, "spoilt": {"strategy": "random_k", "of": "learned"}}
    change(routed, recipes=recipes)
    for command in (merge, run):
        for recipe in recipes:
            with pytest.raises(ProjectError, match=f"{recipe}: there is no trained router in .*runs/router") as no:
                command(routed, recipes=[recipe], local=True)
            assert f"`raymerge router {routed}` trains one" in str(no.value)
    searched = {"recipe": {"strategy": "learned_router"}, "space": {"k": {"min": 1, "max": 3}}}
    with pytest.raises(ProjectError, match="search: there is no trained router"):
        search(change(routed, search=searched), local=True)
    assert status("merge", routed, "--recipe", "learned", "--plan") == 2
    assert "raymerge router" in capsys.readouterr().err
    assert not list(runs_of(routed).glob("*"))


def test_a_search_over_routers_and_neighbours_knows_which_router_it_asked(routed):
    trained(routed)
    searched = {
        "recipe": {"strategy": "top_k", "rank": "exact"}, "sampler": "grid",
        "space": {"strategy": ["top_k", "learned_router"], "k": [2]},
    }  # fmt: skip
    change(routed, search=searched)
    sought = prepare(open_project(routed), restart=False, local=True)
    with HeldWorkers(sought.kinds, local=True) as held:
        scored = [sought.scorer.score(values, 0, held.carry_out) for values in sought.scorer.space.grid()]
    assert scored[0].values["experts"] == 2
    assert scored[1].values["experts"] == 2
    assert scored[0].values["similarity"] != scored[1].values["similarity"]
    prepare(open_project(routed), restart=False, local=True)
    trained(routed, seed=1)
    with pytest.raises(ProjectError, match=r"differs in what scores depend on"):
        prepare(open_project(routed), restart=False, local=True)


def test_other_seeds_have_no_router(routed):
    change(routed, recipes={"learned": {"strategy": "learned_router"}})
    with pytest.raises(ProjectError, match="recipe learned: asks the router, which was trained on the adapters of one"):
        run(routed, seeds=2, local=True)


def without_split(project: str, split: str) -> None:
    examples = Path(project).parent / "personas.jsonl"
    kept = [line for line in examples.read_text().splitlines() if f'"{split}"' not in line]
    examples.write_text("\n".join(kept))


def test_nobody_to_learn_from_or_to_ask_is_refused(routed):
    whole = (Path(routed).parent / "personas.jsonl").read_text()
    for split, message in (("validation", "nobody has validation examples"), ("train", "nobody has training examples")):
        without_split(routed, split)
        with pytest.raises(PersonaError, match=message):
            router(routed, local=True)
        (Path(routed).parent / "personas.jsonl").write_text(whole)
    one_each = [line for line in whole.splitlines() if '"w7' not in line and '"w8' not in line and '"w9' not in line]
    one_each = [line for line in one_each if '"validation"' not in line or "w2?" in line]
    (Path(routed).parent / "personas.jsonl").write_text("\n".join(one_each) + "\n")
    with pytest.raises(PersonaError, match=r"nobody has more than 1 validation .*\nrouter\.patience, which is 2"):
        router(routed, settings={"patience": 2}, local=True)
    (Path(routed).parent / "personas.jsonl").write_text(whole)
    with pytest.raises(AdapterError, match=r"there are 1 adapters for a router to choose among\.\n.*beside those held"):
        router(routed, settings={"held_out": 5}, local=True)
    for name in NAMES[1:]:
        shutil.rmtree(Path(routed).parent / "adapters" / name)
    with pytest.raises(AdapterError, match="there are 1 adapters for a router to choose among"):
        router(routed, local=True)
    assert not list(runs_of(routed).glob("*"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"router": {"held_out": ["p9"]}}, r"router\.held_out: unknown persona 'p9'"),
        ({"router": {"held_out": 7}}, r"router\.held_out: 7 of 6 personas with an adapter cannot be held out"),
        ({"router": {"merge_rank": "all"}}, r"router\.merge_rank: rank 'all' is no rank"),
        ({"router": {"netwrk": "mlp"}}, r"unknown key `router\.netwrk`"),
        ({"base_model": None}, "router needs `base_model`"),
        ({"personas": None}, "router needs `personas`"),
        ({"recipes": {"learned_router": {"strategy": "own"}}}, "the name learned_router of a recipe is that of a run"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(routed, keys, message):
    with pytest.raises(ProjectError, match=message):
        router(change(routed, **keys), local=True)
    assert not list(runs_of(routed).glob("*"))


def test_bad_options_are_refused(routed, capsys):
    assert status("router", routed, "--network", "deep", "--local") == 2
    assert "--network deep: Input should be 'bilinear'" in capsys.readouterr().err
    assert status("router", routed, "--held-out", "-1", "--local") == 2


# What is said of it


def beside(name: str, similarity: float, difference: float, low: float, high: float) -> dict:
    return {"name": name, "similarity": similarity, "difference": difference, "low": low, "high": high}


@pytest.mark.parametrize(
    ("test", "rows", "said"),
    [
        (71.0, [beside("a", 70.0, 1.0, 0.2, 1.8), beside("b", 60.0, 11.0, 9.0, 13.0)],
         "Better than each of 2 other rows: learned_router 71.00 on test examples; next is a 70.00, a difference of "
         "+1.00 (+0.20 to +1.80)."),
        (71.0, [beside("a", 70.5, 0.5, -0.2, 1.2), beside("b", 60.0, 11.0, 9.0, 13.0)],
         "Not better: learned_router 71.00 on test examples, a 70.50, a difference of +0.50 (-0.20 to +1.20)."),
        (71.0, [beside("c", 72.0, -1.0, -2.0, -0.1), beside("a", 70.5, 0.5, -0.2, 1.2)],
         "Not better: learned_router 71.00 on test examples, c 72.00, a difference of -1.00 (-2.00 to -0.10) "
         "(2 such rows)."),
        (71.0, [], "Not known to be better: learned_router 71.00 on test examples, and no other row to compare with."),
        (None, [], "Not known to be better: learned_router has no score on test examples."),
    ],
)  # fmt: skip
def test_the_headline_says_not_better_where_it_is_so(test, rows, said):
    assert headline(Summary(winner=0, best=0, similarity=70.0, test=test, beside=rows)) == said


def test_at_most_eight_numbers_are_tuned_and_learned_offsets_stay(routed):
    opened = trained(routed)
    usual = aim_of_tuning(opened, check(opened))
    assert prepare(opened, usual, restart=False, local=True).scorer.space.free == 6
    assert usual.section.recipe["rank"] == 32
    opened = trained(routed, layers=2, merge_rank="exact")
    aim = aim_of_tuning(opened, check(opened))
    assert set(aim.section.space) == {"temperature", "scale", "self_weight"}
    assert aim.section.recipe["rank"] == "exact"
    record = json.loads((runs_of(routed) / "router/router.json").read_text())
    assert len(record["layers"]) == 2
    sought = prepare(opened, aim, restart=False, local=True)
    assert sought.study.ask().values == {"temperature": 1.0, "scale": record["scale"], "self_weight": 0.0}
    assert sought.scorer.space.written(sought.study.trials[0].values)["scale_offsets"] == {"layers": record["layers"]}
