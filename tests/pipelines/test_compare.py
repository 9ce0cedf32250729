"""What a comparison reads of a run's folder: costs, steps, epochs, tuning, seeds, losses. No model is needed."""

import json
from pathlib import Path

import pytest

from raymerge import storage
from raymerge.config import Project, load_project
from raymerge.pipelines import compare
from raymerge.pipelines.artefacts import Artefacts
from raymerge.pipelines.compare import compare_runs, read_scores

PERSONAS = ("p0", "p1", "p2")


def write(location: Path, value: object) -> None:
    location.parent.mkdir(parents=True, exist_ok=True)
    location.write_text(json.dumps(value))


def write_adapter(folder: Path, **manifest) -> None:
    write(folder / "manifest.json", {"files": {"a": {"bytes": 1000, "digest": "x"}}, "key": "k", **manifest})


def trained(folder: Path, grouping: str, steps: int, epochs: int = 8, **more) -> None:
    losses = [2.0 - i / steps for i in range(steps)]
    write_adapter(
        folder, name=folder.name, grouping=grouping, losses=losses, steps=steps, training={"epochs": epochs}, **more
    )


def write_run(
    root: Path,
    name: str,
    recipe: dict,
    routing: dict[str, list[str]],
    assigned: dict[str, tuple[str, str] | None],
    similarity: float = 0.5,
) -> Path:
    """routing: persona -> experts. assigned: persona -> adapter and where it lies, None for the base."""
    folder = root / "runs" / name
    write(folder / "recipe.json", {"name": name, "strategy_parameters": {}, "scale": 1.0, **recipe})
    rows = [(p, e) for p, experts in routing.items() for e in experts]
    table = {"persona": [p for p, _ in rows], "expert": [e for _, e in rows], "weight": [1.0] * len(rows)}
    storage.write_bytes(str(folder / "routing.parquet"), storage.encode_parquet(as_table(table)))
    names = {"adapter": [a and a[0] for a in assigned.values()], "location": [a and a[1] for a in assigned.values()]}
    storage.write_bytes(
        str(folder / "assignments.parquet"), storage.encode_parquet(as_table({"persona": list(assigned), **names}))
    )
    write_scores(folder / "evaluation", similarity)
    return folder


def write_scores(folder: Path, similarity: float) -> None:
    metrics = {"persona": list(PERSONAS), "example": [0, 0, 0], "similarity": [similarity] * 3}
    said = {**metrics, "prompt": ["q"] * 3, "reference": ["r"] * 3, "generated": ["g"] * 3}
    write(folder / "summary.json", {"failed": {}, "mean": {"similarity": similarity}})
    storage.write_bytes(str(folder / "metrics.parquet"), storage.encode_parquet(as_table(metrics)))
    storage.write_bytes(str(folder / "generations.parquet"), storage.encode_parquet(as_table(said)))
    write(folder / "parts" / "0000" / "manifest.json", {"files": {}})
    write_adapter(folder)


def as_table(columns: dict) -> object:
    import pyarrow as pa

    texts = ("persona", "expert", "adapter", "location")
    return pa.table({k: pa.array(v, pa.string()) if k in texts else pa.array(v) for k, v in columns.items()})


def note(location: Path, *items: dict) -> None:
    location.parent.mkdir(parents=True, exist_ok=True)
    location.write_text("".join(json.dumps(item) + "\n" for item in items))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Three personas of 10, 20 and 30 steps, a unified adapter of 100, and runs that are made of them."""
    for number, persona in enumerate(PERSONAS):
        trained(tmp_path / "adapters" / persona, "persona", 10 * (number + 1))
    chosen = {"tried": {"3": 40.0, "12": 39.0}, "chosen": 3}
    trained(tmp_path / "unified", "unified", 100, 3, epochs_chosen=chosen, validation=[[50, 1.4], [100, 1.6]])
    own = {p: (p, f"adapters/{p}") for p in PERSONAS}
    write_run(tmp_path, "own", {"strategy": "own"}, {p: [p] for p in PERSONAS}, own)
    write_run(tmp_path, "base", {"strategy": "base"}, {}, dict.fromkeys(PERSONAS))
    one = dict.fromkeys(PERSONAS, ("unified", "unified"))
    write_run(tmp_path, "unified", {"strategy": "unified"}, {p: ["unified"] for p in PERSONAS}, one)
    hybrid = {p: (p, f"runs/hybrid/adapters/{p}") for p in PERSONAS}
    folder = write_run(
        tmp_path, "hybrid", {"strategy": "hybrid", "scale": "tuned"}, {p: ["unified", p] for p in PERSONAS}, hybrid
    )
    for persona in PERSONAS:
        write_adapter(folder / "adapters" / persona, experts=[], error=0.25, merges={})
    note(
        tmp_path / "runs" / "_shared" / "timings.jsonl",
        {"item": "train/persona/0000", "seconds": 60, "adapters": ["p0", "p1", "p2"]},
        {"item": "train/unified", "seconds": 40, "adapters": ["unified"]},
    )
    merges = [{"item": f"merge/hybrid/{p}", "seconds": 2} for p in PERSONAS]
    note(
        folder / "timings.jsonl",
        *merges,
        {"item": "evaluate/hybrid/0000", "seconds": 5},
        {"item": "gather/hybrid/evaluation", "seconds": 1},
    )
    (tmp_path / "raymerge.yaml").write_text("workspace: .\n")
    return load_project(str(tmp_path / "raymerge.yaml"))


def test_costs_are_those_of_all_a_run_is_made_of(project: Project) -> None:
    costs = {name: read_scores(project, name).costs for name in ("own", "base", "unified", "hybrid")}
    assert {name: c.steps for name, c in costs.items()} == {"own": 60, "base": 0, "unified": 100, "hybrid": 160}
    assert {name: c.adapters for name, c in costs.items()} == {"own": 3, "base": 0, "unified": 1, "hybrid": 3}
    assert {name: c.bytes for name, c in costs.items()} == {"own": 3000, "base": 0, "unified": 1000, "hybrid": 3000}
    assert {name: c.train_s for name, c in costs.items()} == {"own": 60, "base": 0, "unified": 40, "hybrid": 100}
    assert costs["own"].epochs == "8"
    assert costs["unified"].epochs == "3 of 3, 12"
    assert costs["hybrid"].epochs == "3 of 3, 12 unified, 8 persona"
    assert costs["base"].epochs is None
    manifest = Path(project.adapter_location("unified")) / "manifest.json"
    known = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**known, "epochs_chosen": {**known["epochs_chosen"], "by": "neighbours"}}))
    assert read_scores(project, "unified").costs.epochs == "3 of 3, 12 (by neighbours)"
    assert (costs["hybrid"].merge_s, costs["hybrid"].evaluate_s) == (6, 6)
    assert costs["own"].evaluate_s is None  # its times are not noted
    assert read_scores(project, "hybrid").compression_error == 0.25


def test_an_adapter_from_elsewhere_leaves_the_whole_unknown(project: Project) -> None:
    (Path(project.adapter_location("p1")) / "manifest.json").unlink()
    costs = read_scores(project, "own").costs
    assert (costs.steps, costs.train_s, costs.bytes, costs.adapters) == (None, None, None, 3)
    assert costs.epochs == "8"


def test_adapters_that_a_run_trained_for_itself_are_its_steps_not_their_experts(project: Project) -> None:
    root = Path(project.workspace)
    places = {p: (p, f"runs/neighbours/trained/{p}") for p in PERSONAS}
    recipe = {"strategy": "neighbours_trained"}
    folder = write_run(root, "neighbours", recipe, {p: list(PERSONAS) for p in PERSONAS}, places)
    for persona in PERSONAS:
        trained(folder / "trained" / persona, "neighbours", 7, 5)
    shared = root / "runs" / "_shared" / "timings.jsonl"
    more = {"item": "train/neighbours/0000", "seconds": 300, "adapters": list(PERSONAS)}
    shared.write_text(shared.read_text() + json.dumps(more) + "\n")
    costs = read_scores(project, "neighbours").costs
    assert (costs.steps, costs.train_s, costs.merge_s, costs.epochs) == (21, 300, 0, "5")


def test_what_was_tuned_and_other_seeds_are_read(project: Project) -> None:
    root = Path(project.workspace) / "runs"
    tuned = {"chosen": {"factor": 1.4, "own_weight": 0.25}, "tried": [{"factor": 1.4, "similarity": 60.0}]}
    write(root / "hybrid" / "tuning" / "tuning.json", tuned)
    assert read_scores(project, "hybrid").tuned == tuned
    assert read_scores(project, "own").tuned is None


def at_seed(project: Project, seed: int, similarity: float, **changed) -> None:
    """The row `own` as another seed made it; changed: settings of its trainings, or its recipe's scale."""
    place = Path(project.workspace) / "runs" / "_seeds" / str(seed)
    write_scores(place / "own" / "evaluation", similarity)
    recipe = storage.read_json(str(Path(project.workspace) / "runs" / "own" / "recipe.json"))
    write(place / "own" / "recipe.json", {**recipe, "scale": changed.pop("scale", 1.0)})
    for number, persona in enumerate(PERSONAS):
        trained(place / "_trained" / "adapters" / persona, "persona", 10 * (number + 1), **changed)


def test_other_seeds_of_the_same_recipe_and_training_are_read(project: Project) -> None:
    at_seed(project, 1, 0.61)
    at_seed(project, 2, 0.64, scale=2.0)
    at_seed(project, 3, 0.65, epochs=9)
    scores = read_scores(project, "own")
    assert set(scores.by_seed) == {1}
    assert scores.by_seed[1].column("similarity").to_pylist() == [0.61] * 3
    assert any("seed 2 is left out: its recipe was another one then (scale)" in note for note in scores.notes)
    assert any("seed 3 is left out: p0 was trained with other settings then (epochs)" in n for n in scores.notes)
    assert read_scores(project, "unified").by_seed == {}


def test_a_choice_costs_the_training_of_all_it_chose_from(project: Project) -> None:
    root = Path(project.workspace)
    one = dict.fromkeys(PERSONAS, ("unified", "unified"))
    among = {"own": "own", "unified": "unified", "base": "base"}
    recipe = {"strategy": "selective", "strategy_parameters": {"among": among}}
    write_run(root, "selective", recipe, {p: ["unified"] for p in PERSONAS}, one)
    costs = read_scores(project, "selective").costs
    assert (costs.steps, costs.train_s) == (160, 100)
    recipe["strategy_parameters"] = {"among": {**among, "hybrid_2": "hybrid"}}
    write_run(root, "selective", recipe, {p: ["unified"] for p in PERSONAS}, one)
    costs = read_scores(project, "selective").costs
    assert (costs.steps, costs.train_s, costs.seconds) == (None, None, None)


def test_curves_are_of_every_training_that_was_read_once(project: Project) -> None:
    artefacts = Artefacts()
    for name in ("own", "unified", "hybrid"):
        read_scores(project, name, artefacts)
    unified, persona = artefacts.curves()
    assert (unified.grouping, unified.adapters, unified.steps) == ("unified", 1, (100, 100))
    assert (persona.grouping, persona.adapters, persona.steps) == ("persona", 3, (10, 30))
    assert unified.validation[-1] == pytest.approx(1.6, abs=0.01)
    assert persona.validation is None
    assert persona.mean[0] == pytest.approx(2, abs=0.05)


def test_runs_of_other_seeds_are_no_rows(project: Project) -> None:
    root = Path(project.workspace) / "runs"
    write_scores(root / "_seeds" / "1" / "own" / "evaluation", 0.9)
    write_scores(root / "_seeds" / "evaluation", 0.9)
    compared = compare_runs(project.location)
    assert {row.name for row in compared.comparison.rows} == {"own", "base", "unified", "hybrid"}
    assert "raymerge.yaml" in compared.comparison.guide.steps[0].command
    assert str(root) not in compared.comparison.guide.steps[0].command


def test_json_begins_with_the_criteria(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.compare(project.location, as_json=True) == 0
    printed = capsys.readouterr().out
    assert next(iter(json.loads(printed))) == "criteria"
    assert printed == (Path(project.workspace) / "runs" / "comparison.json").read_text()
