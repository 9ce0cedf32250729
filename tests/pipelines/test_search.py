"""`raymerge search` without Ray: figures are those of evaluated merges, and nothing is scored twice."""

import json
import pickle
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from raymerge import storage
from raymerge.adapters import save_adapter
from raymerge.cli import main
from raymerge.errors import AdapterError, EvaluationError, PersonaError, ProjectError, RaymergeError
from raymerge.manifest import write_artefact
from raymerge.pipelines.evaluate import evaluate
from raymerge.pipelines.merge import merge
from raymerge.pipelines.opening import open_project
from raymerge.pipelines.search import Sought, find, prepare, search, with_settings
from raymerge.pipelines.searching.aim import aim_of
from raymerge.pipelines.searching.chosen import Chosen, show
from raymerge.pipelines.searching.scorer import LABEL, order_of, portions, read_part, subset_sizes
from raymerge.runtime.held import HeldWorkers
from raymerge.runtime.tuning import TABLE
from raymerge.runtime.workers import ModelWorker
from raymerge.search.results import read_scores, read_summary, read_trials
from tests.pipelines.conftest import NAMES, make_adapter

NEIGHBOURS = {"k": {"min": 1, "max": 4}, "temperature": {"min": 0.02, "max": 1.0, "log": True}}
SMALL = {
    "recipe": {"strategy": "top_k", "rank": "exact"}, "space": {**NEIGHBOURS, "scale": {"min": 0.5, "max": 2.0}},
    "trials": 6, "smallest": 2, "reduction": 2, "ranks": ["exact"],
}  # fmt: skip
BY_CLUSTER = {
    "recipe": {"strategy": "cluster_average", "rank": "exact"}, "space": {"scale": {"min": 0.5, "max": 2.0}},
    "ranks": [4],
}  # fmt: skip


def change(project: str, **keys) -> str:
    value = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**value, **keys}))
    return project


def status(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(one) for one in arguments])
    return int(end.value.code or 0)


def prepared(project: str, section: dict, **keys) -> Sought:
    return prepare(open_project(change(project, search=section, **keys)), restart=False, local=True)


class Counted:
    """Workers that stay up, and how many items each call sent them."""

    def __init__(self, sought: Sought) -> None:
        self.held = HeldWorkers(sought.kinds, local=True)
        self.sent: list[int] = []

    def __call__(self, items):
        self.sent.append(len(items))
        return self.held.carry_out(items)


def folder_of(project: str) -> Path:
    return Path(project).parent / "runs" / "search"


def found(project: str, *, restart: bool = False, **settings) -> Chosen:
    """A search up to the choice, without test scores and their page."""
    opened = with_settings(open_project(project), settings)
    return find(prepare(opened, restart=restart, local=True), local=True)


def figures_of(project: str, *, answers: bool = True) -> list:
    """What is known of all trials but the seconds they took."""
    return [
        (t.number, t.values, t.state, t.error, t.last.personas, t.last.values, answers and t.last.answers)
        for t in read_trials(str(folder_of(project)))
    ]


# Scores


@pytest.mark.parametrize(
    "recipe",
    [
        {"strategy": "cluster_average", "rank": "exact"},
        {"strategy": "cluster_average", "rank": 4},
        {"strategy": "cluster_average", "rank": 4, "method": "ties", "density": 0.3},
        {"strategy": "own", "rank": "keep"},
        {"strategy": "named", "weights": {"p0": 1.2, "p4": -0.4}, "rank": "exact"},
    ],
)
def test_figures_of_a_trial_are_those_of_the_merged_and_evaluated_recipe(project, recipe):
    sought = prepared(project, {"recipe": recipe, "space": {"scale": {"min": 0.5, "max": 2.0}}, "smallest": 4})
    scorer = sought.scorer
    values = {"scale": 1.3}
    last = len(scorer.rungs) - 1
    figures = scorer.score(values, last, Counted(sought))
    change(project, recipes={"it": scorer.space.written(values)}, evaluation={"split": "validation"})
    assert merge(project, local=True) == 0
    assert evaluate(project, runs=["it"], local=True) == 0
    run = Path(project).parent / "runs/it"
    assert figures.values["similarity"] == pytest.approx(
        100 * json.loads((run / "evaluation/summary.json").read_text())["mean"]["similarity"], abs=1e-3
    )
    metrics = pq.read_table(run / "evaluation/metrics.parquet")
    evaluated = dict(zip(metrics["persona"].to_pylist(), metrics["similarity"].to_pylist(), strict=True))
    found = scorer.scores(scorer.space.recipe(values))
    assert found == pytest.approx([100 * evaluated[name] for name in scorer.names], abs=1e-3)
    assigned = pq.read_table(run / "assignments.parquet").to_pylist()
    places = [run.parents[1] / row["location"] for row in assigned]
    sizes = [sum(m.A.nbytes + m.B.nbytes for m in load(place).modules.values()) for place in places]
    if recipe == {"strategy": "cluster_average", "rank": "exact"}:  # of adapters whose factors depend on each other
        assert figures.values["bytes"] > np.mean(sizes)
    else:
        assert figures.values["bytes"] == pytest.approx(np.mean(sizes))
    routed = pq.read_table(run / "routing.parquet")
    assert figures.values["experts"] == pytest.approx(len(routed) / len(NAMES))


def load(place: Path):
    from raymerge.adapters import load_adapter

    return load_adapter(str(place))


def test_a_larger_part_of_the_personas_re_uses_the_smaller_and_a_repeated_point_costs_nothing(project):
    sought = prepared(project, {**BY_CLUSTER, "smallest": 2, "reduction": 2})
    scorer, workers, values = sought.scorer, Counted(sought), {"scale": 1.2}
    assert scorer.rungs == (2, 4, 6)
    steps = [scorer.score(values, rung, workers) for rung in range(3)]
    assert [one.personas for one in steps] == [2, 4, 6]
    assert [one.answers for one in steps] == [2, 2, 2]
    assert workers.sent == [1, 1, 1]
    by_persona = scorer.scores(scorer.space.recipe(values))
    assert [one.values["similarity"] for one in steps] == pytest.approx([by_persona[:n].mean() for n in (2, 4, 6)])
    again = scorer.score(values, 2, workers)
    assert (again.answers, again.seconds, again.values) == (0, 0.0, steps[2].values)
    assert workers.sent == [1, 1, 1]
    elsewhere = pickle.loads(pickle.dumps(scorer))  # another process knows what is on disk
    found = elsewhere.score(values, 2, workers)
    assert (found.answers, found.values) == (0, steps[2].values)
    at_once = scorer.score({"scale": 1.1}, 2, workers)  # a point whose first part is never asked alone
    assert at_once.answers == 6


def test_an_adapter_that_changed_is_scored_again_and_the_search_refused(project):
    sought = prepared(project, {**BY_CLUSTER, "smallest": 6})
    before = sought.scorer.score({"scale": 1.0}, 0, Counted(sought))
    place = Path(project).parent / "adapters/p1"
    shutil.rmtree(place)
    save_adapter(make_adapter("p1", 99), str(place))
    later = pickle.loads(pickle.dumps(sought.scorer)).score({"scale": 1.0}, 0, Counted(sought))
    assert later.answers == 6
    assert later.values["similarity"] != before.values["similarity"]
    with pytest.raises(ProjectError, match=r"differs in inputs|inputs \(scores|what scores depend on"):
        prepare(open_project(project), restart=False, local=True)
    assert prepare(open_project(project), restart=True, local=True).study.trials == []


def test_points_that_are_scored_at_the_same_time_share_what_they_have_in_common(project):
    """The second waits for the first, whose items are held back until it does."""
    sought = prepared(project, {**BY_CLUSTER, "smallest": 6})
    workers, begun, go_on = Counted(sought), threading.Event(), threading.Event()
    scored = {}

    def held_back(items):
        begun.set()
        assert go_on.wait(30)
        return workers(items)

    def score(name, carry_out):
        scored[name] = sought.scorer.score({"scale": 1.0}, 0, carry_out)

    threads = [threading.Thread(target=score, args=("first", held_back))]
    threads[0].start()
    assert begun.wait(30)
    threads.append(threading.Thread(target=score, args=("second", workers)))
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert workers.sent == [2]
    assert (scored["first"].answers, scored["second"].answers) == (6, 0)
    assert scored["first"].values == scored["second"].values


def test_somebody_who_cannot_be_answered_fails_the_trial_by_name_and_only_until_it_can(project):
    sought = prepared(project, {**BY_CLUSTER, "smallest": 6})
    weights = Path(project).parent / "adapters/p4/adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    workers = Counted(sought)
    with pytest.raises(EvaluationError, match=r"cluster_average, linear: cannot be scored: p\d: .*p4"):
        sought.scorer.score({"scale": 1.0}, 0, workers)
    weights.write_bytes(whole)
    known = 2  # of the portion without p4
    assert sought.scorer.score({"scale": 1.0}, 0, workers).answers == 6 - known


def test_a_score_that_is_no_number_is_refused(tmp_path):
    table = pa.table(
        {"persona": ["a", "b", "b"], "candidate": [LABEL] * 3,
         "similarity": pa.array([0.5, 0.2, float("nan")], pa.float32())}
    )  # fmt: skip
    manifest = {"bytes": {LABEL: 8.0}, "experts": {LABEL: 1.0}}
    write_artefact(str(tmp_path), {TABLE: storage.encode_parquet(table)}, manifest, "key")
    with pytest.raises(EvaluationError, match="the similarity of b is nan"):
        read_part(str(tmp_path))
    with pytest.raises(EvaluationError, match="was not scored to the end"):
        read_part(str(tmp_path / "absent"))


# Who is scored


def test_personas_are_nested_and_drawn_from_the_seed(project):
    opened = open_project(change(project, search=SMALL))
    section = opened.project.search
    assert sorted(order_of(opened, section)) == list(NAMES)
    other = {order_of(opened, section.model_copy(update={"seed": seed})) for seed in range(10)}
    assert len(other) > 1
    assert subset_sizes(section, 6, "p") == (2, 4, 6)
    assert subset_sizes(section.model_copy(update={"stop_early": False}), 6, "p") == (6,)
    assert subset_sizes(section.model_copy(update={"objectives": ("similarity", "bytes")}), 6, "p") == (6,)
    with pytest.raises(PersonaError, match=r"`search.smallest` is 2, and 1 personas"):
        subset_sizes(section, 1, "p")
    assert subset_sizes(type(section)(), 6, "p") == (6,)  # 20 is a default, not what somebody asked for
    assert [list(part) for part in portions("abcdefg", (2, 7), 3)] == [list("ab"), list("cde"), list("fg")]


def test_only_those_with_validation_examples_are_scored(project):
    examples = Path(project).parent / "personas.jsonl"
    lines = [json.loads(line) for line in examples.read_text().splitlines()]

    def keep(wanted) -> None:
        examples.write_text("".join(json.dumps(line) + "\n" for line in lines if wanted(line)))

    keep(lambda line: line["split"] != "validation" or line["persona"] in ("p1", "p3"))
    opened = open_project(change(project, search=BY_CLUSTER))
    assert sorted(order_of(opened, opened.project.search)) == ["p1", "p3"]
    keep(lambda line: line["split"] != "validation")
    with pytest.raises(PersonaError, match=r"nobody has validation examples"):
        search(project, local=True)


# The command


@pytest.fixture
def with_unified(project) -> str:
    save_adapter(make_adapter("unified", 50), str(Path(project).parent / "unified"))
    return change(project, search=SMALL)


def test_from_the_project_file_to_a_recipe_that_merges(with_unified, capsys):
    project, folder = with_unified, folder_of(with_unified)
    change(project, search={**SMALL, "ranks": [8, 16, "exact"]})
    assert status("search", project, "--local") == 0
    said = capsys.readouterr()
    trials, summary = read_trials(str(folder)), read_summary(str(folder))
    assert [trial.number for trial in trials] == list(range(6))
    assert {trial.state for trial in trials} == {"complete", "stopped"}
    complete = [trial.number for trial in trials if trial.state == "complete"]
    scores = read_scores(str(folder))
    assert list(scores.trials) == complete
    assert set(scores.personas) == set(NAMES)
    for trial in trials:
        if trial.state == "complete":
            assert scores.of([trial.number])[0].mean() == pytest.approx(trial.last.values["similarity"])
    assert summary.best == max(complete, key=lambda number: trials[number].last.values["similarity"])
    assert summary.winner in complete
    assert summary.similarity == trials[summary.winner].last.values["similarity"]
    assert [one["rank"] for one in summary.ranks] == [8, 16, "exact"]
    assert summary.ranks[-1]["similarity"] == pytest.approx(summary.similarity)
    assert {one["name"] for one in summary.beside} == {"searched_unified", "searched_random_k"}
    for begin in ("Winner: trial", "Validation similarity", "By rank: 8: ", "Test similarity", "Recipe: ", "Report: "):
        assert re.search(f"^{begin}", said.out, re.MULTILINE)
    assert said.err.count("search: trial ") == 6
    # what was written for `merge` is what was scored
    runs = folder.parent
    recipe = yaml.safe_load((folder / "best_recipe.yaml").read_text())
    assert list(recipe) == ["searched"]
    shutil.rmtree(runs / "searched")
    assert status("merge", project, "--recipe", folder / "best_recipe.yaml", "--local") == 0
    change(project, evaluation={"split": "validation"})
    assert evaluate(project, runs=["searched"], local=True) == 0
    evaluated = json.loads((runs / "searched/evaluation/summary.json").read_text())
    assert 100 * evaluated["mean"]["similarity"] == pytest.approx(summary.similarity, abs=1e-3)
    assert {row["name"] for row in json.loads((runs / "comparison.json").read_text())["rows"]} == {
        "searched", "searched_random_k", "searched_unified",
    }  # fmt: skip


def test_trials_and_ranks_are_scored_by_one_worker(project, monkeypatch, capsys):
    made = []
    init = ModelWorker.__init__
    monkeypatch.setattr(ModelWorker, "__init__", lambda self, *a, **k: made.append(self) or init(self, *a, **k))
    recipe = {"strategy": "cluster_average", "rank": "exact"}
    change(project, search={"recipe": recipe, "space": {"scale": {"min": 0.5, "max": 2.0}}, "smallest": 4})
    chosen = found(project, trials=3, ranks=[1, 2, "exact"])
    assert [one["rank"] for one in chosen.summary.ranks] == [1, 2, "exact"]
    assert len(made) == 1
    assert "search: 3 trials; the winner is scored at rank 1, 2, exact\n" in capsys.readouterr().err


def test_the_same_command_again_computes_nothing(with_unified, capsys):
    project, folder = with_unified, folder_of(with_unified)
    assert search(project, settings={"trials": 2}, local=True) == 0
    first = figures_of(project)
    made = {p: p.stat().st_mtime_ns for p in folder.parent.rglob("manifest.json")}
    capsys.readouterr()
    assert search(project, settings={"trials": 2}, local=True) == 0
    assert "search: trial" not in capsys.readouterr().err
    assert figures_of(project) == first
    assert {p: p.stat().st_mtime_ns for p in folder.parent.rglob("manifest.json")} == made


def test_more_trials_go_on_and_a_restart_knows_what_was_scored(with_unified):
    found(with_unified, trials=3)
    first = figures_of(with_unified)
    found(with_unified)
    at_once = figures_of(with_unified)
    assert at_once[:3] == first
    assert len(at_once) == 6
    found(with_unified, restart=True)
    assert figures_of(with_unified, answers=False) == [(*one[:-1], False) for one in at_once]
    assert sum(one[-1] for one in figures_of(with_unified)) == 0


def test_interrupted_in_the_middle_it_ends_as_an_undisturbed_one(with_unified, monkeypatch):
    project, folder = with_unified, folder_of(with_unified)
    found(project)
    undisturbed, recipe = figures_of(project), (folder / "best_recipe.yaml").read_bytes()
    shutil.rmtree(folder)
    stops_at, scored, tune = 0, [], ModelWorker.tune

    def interrupted(worker, task):
        result = tune(worker, task) if len(scored) < stops_at else None
        if result is None:
            raise KeyboardInterrupt
        scored.extend([] if result["skipped"] else [Path(task.folder) / "manifest.json"])
        return result

    monkeypatch.setattr(ModelWorker, "tune", interrupted)
    for stops_at in (2, 5):  # noqa: B007 (it is what `interrupted` looks at)
        assert status("search", project, "--local") == 130
        assert not (folder / "search.json").exists()
    monkeypatch.undo()
    assert len(set(scored)) == len(scored) == 5
    made = {place: place.stat().st_mtime_ns for place in scored}
    found(project)
    assert {place: place.stat().st_mtime_ns for place in scored} == made
    assert figures_of(project) == undisturbed
    assert (folder / "best_recipe.yaml").read_bytes() == recipe


def test_another_space_is_refused_until_it_is_begun_anew(project, capsys):
    assert prepared(project, SMALL).study.ask().number == 0
    change(project, search={**SMALL, "space": {**SMALL["space"], "k": {"min": 1, "max": 3}}})
    assert status("search", project, "--local") == 2
    said = capsys.readouterr().err
    assert "differs in search.space.k" in said
    assert "--restart" in said
    assert prepare(open_project(project), restart=True, local=True).study.trials == []


def test_a_budget_of_answers_ends_it(with_unified):
    found(with_unified, evaluations=8)
    trials = read_trials(str(folder_of(with_unified)))
    spent = [trial.last.answers for trial in trials]
    assert sum(spent) >= 8 > sum(spent[:-1])
    assert read_summary(str(folder_of(with_unified))).budget["answers"] == sum(spent)


def test_a_front_of_two_objectives_without_stopping(with_unified):
    section = {**SMALL, "objectives": ["similarity", "experts"], "trials": 4}
    found(change(with_unified, search=section))
    trials, summary = read_trials(str(folder_of(with_unified))), read_summary(str(folder_of(with_unified)))
    assert [trial.state for trial in trials] == ["complete"] * 4
    of_trial = {t.number: (t.last.values["similarity"], t.last.values["experts"]) for t in trials}
    for trial in trials:
        own, others = of_trial[trial.number], of_trial.values()
        is_beaten = any(one[0] >= own[0] and one[1] <= own[1] and one != own for one in others)
        assert (trial.number in summary.front) != is_beaten


def test_a_grid_of_choices_with_conditions_and_a_point_that_fails(with_unified, capsys):
    """slerp takes two experts: of a cluster of three it cannot be made."""
    section = {
        "recipe": {"strategy": "cluster_average", "rank": 4}, "sampler": "grid",
        "space": {"method": ["linear", "ties", "slerp"], "density": [0.3, 1.0]},
    }  # fmt: skip
    show(found(change(with_unified, search=section)), aim_of(open_project(with_unified).project))
    trials = read_trials(str(folder_of(with_unified)))
    assert [(t.values["method"], t.values.get("density"), t.state) for t in trials] == [
        ("linear", None, "complete"), ("ties", 0.3, "complete"), ("ties", 1.0, "complete"), ("slerp", None, "failed"),
    ]  # fmt: skip
    assert "slerp" in trials[3].error
    said = capsys.readouterr()
    assert "4/4 trials" in said.err
    assert "note: 1 trials could not be carried out; trial 3: " in said.out


def test_nobody_with_test_examples_leaves_the_winner_without_a_test_score(project, capsys):
    examples = Path(project).parent / "personas.jsonl"
    lines = [line for line in examples.read_text().splitlines() if '"test"' not in line]
    examples.write_text("\n".join(lines))
    assert search(change(project, search={**BY_CLUSTER, "trials": 2}), local=True) == 0
    summary = read_summary(str(folder_of(project)))
    assert (summary.run, summary.test, list(summary.beside)) == (None, None, [])
    assert "nobody has examples of split test" in capsys.readouterr().err


def test_offsets_of_clusters_are_penalised_and_published(project):
    section = {
        "recipe": {"strategy": "cluster_average", "rank": "exact"}, "trials": 2,
        "space": {"scale_by_cluster": {"max": 0.5, "penalty": 2.0}},
    }  # fmt: skip
    found(change(project, search=section))
    trials = read_trials(str(folder_of(project)))
    for trial in trials:
        offsets = [trial.values[f"scale_offsets.clusters.cluster_0{i}"] for i in range(2)]
        assert trial.last.penalty == pytest.approx(2.0 * np.mean(np.square(offsets)))
    written = yaml.safe_load((folder_of(project) / "best_recipe.yaml").read_text())["searched"]
    assert set(written["scale_offsets"]["clusters"]) == {"cluster_00", "cluster_01"}


# Bad input


@pytest.mark.parametrize(
    ("section", "kind", "message"),
    [
        ({"space": {"kk": [1, 2]}}, ProjectError, r"search\.space: unknown parameter 'kk'"),
        ({"space": {"k": {"min": 4, "max": 2}}}, ProjectError, r"search\.space\.k: the range from 4 to 2 is empty"),
        ({"space": {"density": {"min": 0.1, "max": 1}}}, ProjectError, "density: counts for nothing that is tried"),
        ({"space": {"method": ["slerp"], "k": {"min": 4, "max": 6}}}, ProjectError, "holds no valid recipe"),
        ({"space": {"method": []}}, ProjectError, r"search\.space\.method: has no choices"),
        ({"recipe": "absent"}, ProjectError, r"search\.recipe: unknown recipe 'absent'"),
        ({"recipe": {"strategy": "random_k", "of": "own"}}, ProjectError, "merges nothing that could be searched"),
        ({"smallest": 7}, PersonaError, r"`search\.smallest` is 7, and 6 personas have validation examples"),
        ({"sampler": "cmaes", "space": {"k": [1, 2]}}, ProjectError, "cmaes cannot search this space"),
        ({"sampler": "grid"}, ProjectError, "a range without a step has no grid"),
        ({"ranks": [8, 0]}, ProjectError, r"search\.ranks: rank 0 is no rank"),
        ({"trial": 3}, ProjectError, r"unknown key `search\.trial`"),
        ({"trials": 0}, ProjectError, r"`search\.trials`"),
        ({"objectives": ["bytes"]}, ProjectError, "begin with similarity"),
        ({"recipe": {"strategy": "unified"}, "space": {"scale": {"min": 1, "max": 2}}}, AdapterError,
         r"unified: there is no adapter"),
        ({"recipe": {"strategy": "named"}, "space": {"weights": {"experts": ["p0", "p9"]}}}, ProjectError,
         r"search: weights: unknown expert 'p9'"),
        ({"recipe": {"strategy": "named"}, "space": {"weights": {"experts": ["p0", "p1"], "per": "persona"}}},
         ProjectError, r"fewer than 50 validation examples"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_the_first_trial(project, section, kind, message):
    with pytest.raises(kind, match=message):
        search(change(project, search=section), local=True)
    assert not (folder_of(project) / "journal.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sampler", "annealing"), "--sampler annealing: Input should be 'tpe'"),
        (("--minutes", "0"), "--minutes 0.0: Input should be greater than 0"),
        (("--prompts", "x.jsonl"), "--prompts, --base and --negative go with --fuse"),
        (("another.yaml",), "takes one project file; found 2"),
    ],
)
def test_bad_options_are_refused(project, options, message, capsys):
    assert status("search", project, *options, "--local") == 2
    assert message in capsys.readouterr().err


def test_a_recipe_may_not_have_the_name_of_a_search_s_own_run(project):
    with pytest.raises(ProjectError, match="the name searched of a recipe"):
        search(change(project, search=SMALL, recipes={"searched": {"strategy": "own"}}), local=True)


def test_where_no_trial_can_be_carried_out_the_first_reason_is_told(project):
    weights = Path(project).parent / "adapters/p0/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(EvaluationError, match=r"no trial of the search was carried out\.\nFirst: .*p0") as raised:
        search(change(project, search={**BY_CLUSTER, "trials": 2}), local=True)
    assert isinstance(raised.value, RaymergeError)
    assert re.search(r"cannot be scored", str(raised.value))
