"""The learned router in the report: its weights beside those of similarity, whom it asks, and what changes."""

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

from raymerge import storage
from raymerge.config import Project
from raymerge.errors import EvaluationError
from raymerge.evaluation import drawing
from raymerge.evaluation.comparison import Comparison, compare
from raymerge.evaluation.report import render_report, terminal_table
from raymerge.evaluation.router_differences import contrasts, most_asked, moved
from raymerge.evaluation.router_panel import against, changes
from raymerge.evaluation.router_plots import POINTS, figure, panels
from raymerge.evaluation.router_weights import Learned, effective, in_common, read_learned, shares
from raymerge.manifest import invalidate, write_artefact
from raymerge.pipelines.compare import compare as compare_project
from raymerge.routing.clusters import Clusters
from raymerge.routing.embeddings import make_embeddings
from raymerge.routing.inputs import RoutingInputs, make_space
from raymerge.routing.router import CONFIG, encode_router, find_candidates
from raymerge.routing.router_shape import TUNED
from raymerge.routing.strategies import route
from raymerge.runtime.router import candidate_table
from raymerge.search.results import write_summary, write_trials

from ..pipelines.test_compare import PERSONAS, project, write_run  # noqa: F401
from ..routing.routers import drawn_router
from .conftest import SOFT, recipe, run
from .test_report import HOSTILE, Page
from .test_search_report import SPACE, make_search

FIGURES = {"router_personas.png", "router_weights.png", "router_training.png"}
RUN = "learned_router"
HISTORY = [
    {"loss": 0.1012, "validation": 0.093, "entropy": 2.4},
    {"loss": 0.0954, "validation": 0.0897, "entropy": 2.2},
    {"loss": 0.0921, "validation": 0.0877, "entropy": 2.1},
    {"loss": 0.09, "validation": 0.0881, "entropy": None},
]


def make_inputs(people=24, clusters=2, held_out=3, hostile="", dimensions=8) -> RoutingInputs:
    """Personas around the centres of their clusters; the last ones are held out, without an adapter."""
    dice = np.random.default_rng(0)
    names = [f"persona_{i:05d}{hostile}" for i in range(people)]
    own = np.arange(people) % clusters
    vectors = 2.0 + dice.normal(size=(clusters, dimensions))[own] + dice.normal(size=(people, dimensions)) * 0.6
    labels = {name: f"cluster_{c:02d}{hostile}" for name, c in zip(names, own, strict=True)}
    experts = names[: people - held_out]
    return RoutingInputs(names, experts, make_embeddings(names, vectors), clusters=Clusters(labels))


def write_router(root: Path, inputs: RoutingInputs, spread=0.3, told=None, notes=(), **shape) -> tuple[str, str]:
    """A router and its run as training and merging write them. Returns the two folders."""
    folder, run_folder = str(root / "router"), str(root / RUN)
    router = drawn_router(inputs, 0, spread, **{"candidates": 12, "k": 5, "weighting": "entmax", **shape})
    space, _ = make_space(dataclasses.replace(inputs, mean=router.mean), centred=True)
    files = encode_router(router)
    held_out = sorted(set(inputs.personas) - set(inputs.experts))
    said = {"settings": {}, "held_out": held_out, "history": HISTORY, "best_epoch": 2, **(told or {})}
    files[CONFIG] = storage.encode_json({**json.loads(files[CONFIG]), **said})
    placed = SimpleNamespace(shape=router.shape, space=space)
    table = candidate_table(placed, find_candidates(space, router.shape), router)
    files["candidates.parquet"] = storage.encode_parquet(table)
    told_of = {"experts": dict.fromkeys(inputs.experts, "x"), "personas": list(inputs.experts), "notes": list(notes)}
    write_artefact(folder, files, told_of, "a key")
    parameters = {"k": router.shape.k, "temperature": 1.4, "self_weight": 0.24}
    merged, _ = route(RUN, parameters, dataclasses.replace(inputs, router=router))
    merged.write(storage.join(run_folder, "routing.parquet"))
    storage.write_bytes(storage.join(folder, TUNED), b"learned_router: {strategy: learned_router}\n")
    return folder, run_folder


def make_comparison(inputs: RoutingInputs, levels=None, examples=3, resamples=200) -> Comparison:
    """Rows of the personas: their mean similarity by name, the held-out ones 0.05 below."""
    levels = levels or {"unified": 0.6, "soft": 0.7, "top_k": 0.69, RUN: 0.72, f"{RUN}_random_k": 0.62}
    dice = np.random.default_rng(1)
    ability = dice.normal(0, 0.06, size=(len(inputs.personas), 1))
    ability[len(inputs.experts) :] -= 0.05
    runs = []
    for name, level in levels.items():
        strategy = "random_k" if name.endswith("random_k") else name
        similarity = np.clip(level + ability + dice.normal(0, 0.05, (len(inputs.personas), examples)), 0, 1)
        more = SOFT if strategy in ("soft", "top_k", RUN) else {}
        runs.append(run(name, recipe(name, strategy, **more), similarity, personas=inputs.personas))
    return compare(runs, clusters=inputs.clusters.labels, resamples=resamples)


@pytest.fixture(scope="module")
def inputs() -> RoutingInputs:
    return make_inputs()


@pytest.fixture(scope="module")
def folders(inputs: RoutingInputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return write_router(tmp_path_factory.mktemp("project"), inputs, notes=("a note of the training",))


@pytest.fixture(scope="module")
def learned(folders: tuple[str, str]) -> Learned:
    found = read_learned(*folders)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def comparison(inputs: RoutingInputs) -> Comparison:
    return make_comparison(inputs)


def words(files: dict[str, bytes]) -> str:
    page = Page(files["report.html"].decode())
    assert page.open == []
    return " ".join("".join(page.words).split())


def test_the_section_says_what_it_is_worth_and_its_figures_are_there(learned: Learned, comparison: Comparison) -> None:
    plain, files = render_report(comparison), render_report(comparison, learned=learned)
    assert set(files) - set(plain) == FIGURES
    for name in FIGURES:
        assert np.asarray(Image.open(io.BytesIO(files[name])).convert("L")).std() > 3  # something is drawn
    assert 'id="router"' not in plain["report.html"].decode()
    assert files["comparison.json"] == plain["comparison.json"]
    said = words(files)
    for part in ("Better than soft, the best row that goes by similarity:", "A bilinear network weighs the 12 experts",
                 "answers of 21 personas", "3 more were held out", "Epoch 2 of 3 is kept: validation loss 0.0877",
                 "before training 0.0930", "over unified", "over learned_router_random_k", "a note of the training",
                 "Personas it never saw", "Who is asked most", "soft is the best of 2 rows"):  # fmt: skip
        assert part in said
    assert render_report(comparison, learned=learned) == files


def test_a_router_that_gains_nothing_says_so_first(learned: Learned, inputs: RoutingInputs) -> None:
    level = make_comparison(inputs, {"unified": 0.6, "soft": 0.7, RUN: 0.7})
    [soft, unified] = against(learned, level, range(len(level.personas)))
    assert (soft.outcome, unified.outcome) == ("not better", "better")
    assert soft.low < 0 < soft.high
    first = dataclasses.replace(learned, said={**learned.said, "best_epoch": 0})
    said = words(render_report(level, learned=first))
    assert said.index("Not better than soft") < said.index("A small network reads")
    assert "it has learned nothing" in said
    below = make_comparison(inputs, {"unified": 0.6, "soft": 0.7, RUN: 0.6})
    assert against(learned, below, range(len(below.personas)))[0].outcome == "worse"


def test_differences_are_those_of_the_scores(learned: Learned, comparison: Comparison) -> None:
    own = comparison.scores[comparison.row(RUN)]
    for part in (range(24), range(21, 24)):
        found = against(learned, comparison, part)
        assert [one.name for one in found] == ["soft", "unified", f"{RUN}_random_k"]
        for one in found:
            theirs = comparison.scores[comparison.row(one.name)]
            assert one.difference == pytest.approx((own - theirs)[list(part)].mean())
            assert one.low < one.difference < one.high
    up, down = changes(learned, comparison)
    soft = comparison.scores[comparison.row("soft")]
    differences = dict(zip(comparison.personas, own - soft, strict=True))
    assert [c.persona for c in up] == sorted(differences, key=lambda p: -differences[p])[: len(up)]
    assert down[0].persona == min(differences, key=lambda p: differences[p])
    assert all(c.after - c.before == pytest.approx(differences[c.persona]) for c in (*up, *down))
    assert not {c.persona for c in up} & {c.persona for c in down}


def test_weights_are_those_that_were_written(learned: Learned, folders: tuple[str, str]) -> None:
    """Against a plain computation over the lines of the files."""
    lines = storage.read_parquet(storage.join(folders[0], "candidates.parquet")).to_pylist()
    counts = effective(learned.learned)
    for number, persona in enumerate(learned.personas):
        mine = [line for line in lines if line["persona"] == persona]
        shares_of = np.array([line["learned"] for line in mine if line["learned"] > 0], dtype=np.float64)
        assert counts[number] == pytest.approx(np.exp(-(shares_of * np.log(shares_of)).sum()), rel=1e-5)
        common = sum(min(line["learned"], line["similar"]) for line in mine)
        assert in_common(learned.learned, learned.similar)[number] == pytest.approx(common, abs=1e-5)
        change = {line["expert"]: line["learned"] - line["similar"] for line in mine}
        gained, lost = moved(learned, number)
        for name, by in (*gained, *lost):
            assert by == pytest.approx(change[name], abs=1e-5)
        assert gained[0][1] == pytest.approx(max(change.values()), abs=1e-5)
        assert lost[0][1] == pytest.approx(min(change.values()), abs=1e-5)
    merged = storage.read_parquet(storage.join(folders[1], "routing.parquet")).to_pylist()
    asked = most_asked(learned)
    assert [one.weight for one in asked] == sorted((one.weight for one in asked), reverse=True)
    for one in asked:
        served = [line["weight"] for line in merged if line["expert"] == one.expert and line["persona"] != one.expert]
        assert one.personas == len(served)
        assert one.weight == pytest.approx(sum(served))
        assert one.similar_personas == sum(line["expert"] == one.expert and line["similar"] > 0 for line in lines)


def test_weights_as_they_are_without_training_differ_in_nothing(inputs: RoutingInputs, tmp_path: Path) -> None:
    untrained = read_learned(*write_router(tmp_path, inputs, spread=0.0, weighting="softmax"))
    assert untrained is not None
    assert in_common(untrained.learned, untrained.similar) == pytest.approx(np.ones(24), abs=1e-6)
    assert moved(untrained, 0) == ((), ())
    assert effective(untrained.learned) == pytest.approx(effective(untrained.similar))


def test_equal_weights_count_as_many_as_there_are_and_nobody_counts_as_unknown() -> None:
    persona, expert = np.repeat([0, 1], [4, 1]), np.array([0, 1, 2, 3, 2])
    weights = shares(persona, expert, np.array([2.0, 2.0, 2.0, 2.0, 5.0]), 3, 4)
    assert effective(weights)[:2] == pytest.approx([4, 1])
    assert np.isnan(effective(weights)[2])
    other = shares(persona, expert, np.array([0.0, 0.0, 0.0, 1.0, 1.0]), 3, 4)
    assert in_common(weights, other)[:2] == pytest.approx([0.25, 1])
    assert np.isnan(in_common(weights, other)[2])


def test_the_own_adapter_and_clusters_are_told(learned: Learned, comparison: Comparison) -> None:
    said = {one.what: one for one in contrasts(learned, comparison)}
    own = said["weight of the own adapter"]
    assert (own.similar, own.learned, own.merged) == ("0 %", "0 %", "21 %")  # 0.24 of those who have one
    assert said["weight given as by similarity"].similar == "100 %"
    assert "weight inside the persona's cluster" in said
    without = dataclasses.replace(comparison, clusters=None)
    assert "weight inside the persona's cluster" not in {one.what for one in contrasts(learned, without)}


def test_figures_show_the_weights_and_the_losses(learned: Learned, comparison: Comparison) -> None:
    with drawing.styled():
        drawn = {
            name: [figure([part]).axes[0] for part in parts] for name, parts in panels(learned, comparison).items()
        }
    for line, weights in zip(drawn["weights"][1].lines, (learned.near_similar, learned.near_learned), strict=True):
        means = [100 * weights[learned.nearest == place].sum() / 24 for place in range(len(line.get_ydata()))]
        assert np.asarray(line.get_ydata()) == pytest.approx(np.array(means))
        assert sum(means) == pytest.approx(100, abs=1)
    loss, validation = drawn["training"][0].lines[:2]
    assert list(validation.get_ydata()) == [epoch["validation"] for epoch in HISTORY]
    assert list(loss.get_ydata()) == [epoch["loss"] for epoch in HISTORY]
    assert list(drawn["training"][1].lines[0].get_xdata()) == [0, 1, 2]  # the last entropy is not known
    seen, unseen = drawn["personas"][0].collections
    assert (len(seen.get_offsets()), len(unseen.get_offsets())) == (21, 3)


def test_hostile_texts_stay_texts_and_the_terminal_gets_one_line(tmp_path: Path) -> None:
    strange = make_inputs(hostile=HOSTILE)
    learned = read_learned(*write_router(tmp_path, strange, notes=(HOSTILE,)))
    comparison = make_comparison(strange)
    page = Page(render_report(comparison, learned=learned)["report.html"].decode())
    assert page.open == []
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert "{{ 7 * 7 }}" in "".join(page.words)
    console = Console(width=4000, file=io.StringIO(), color_system=None)
    console.print(terminal_table(comparison, 80, learned=learned))
    [line] = [line for line in console.file.getvalue().splitlines() if line.startswith("Router: ")]
    assert "bilinear, trained on 21 personas; validation loss 0.0930 before training, 0.0877 at its best; test " in line
    assert "; better than unified: +" in line
    assert "\x00" not in line


def test_the_least_there_can_be_makes_a_section(inputs: RoutingInputs, tmp_path: Path) -> None:
    """No history, nobody held out, no run; then a run that is not compared, and no row by similarity."""
    everybody = dataclasses.replace(inputs, experts=inputs.personas)
    told = {"held_out": [], "history": [], "best_epoch": 0}
    folder, run_folder = write_router(tmp_path, everybody, told=told, network="mlp", max_in_degree=1)
    storage.remove(run_folder)
    learned = read_learned(folder, run_folder)
    assert learned is not None
    assert learned.merged is None
    files = render_report(make_comparison(inputs, {"unified": 0.6}), learned=learned)
    assert {name for name in files if name.startswith("router")} == {"router_weights.png"}
    said = words(files)
    assert "It was not scored on test examples." in said
    assert "An mlp network" in said
    assert "an expert serves 1 personas at most" in said
    assert "personas have no expert left" in said
    assert "as merged" not in said.split("Who is asked most")[0]
    assert "Personas it never saw" not in said
    lone = words(render_report(make_comparison(inputs, {"unified": 0.6, RUN: 0.7}), learned=learned))
    assert "Better than unified:" in lone
    assert "What changes for each persona" not in lone


def test_thousands_of_personas_stay_a_page(tmp_path: Path) -> None:
    many = make_inputs(3000, 30, held_out=700, dimensions=16)
    learned = read_learned(*write_router(tmp_path, many, candidates=64, k=16))
    comparison = make_comparison(many, examples=1, resamples=20)
    assert learned is not None
    plain, files = render_report(comparison), render_report(comparison, learned=learned)
    assert len(files["report.html"]) - len(plain["report.html"]) < 600_000
    with drawing.styled():
        axes = figure(panels(learned, comparison)["personas"][:1]).axes[0]
    assert [len(group.get_offsets()) for group in axes.collections] == [POINTS, POINTS]
    assert "The first 15 of 2,300 experts" in words(files)


def test_until_a_router_is_tuned_the_run_there_is_not_shown_as_its_own(inputs: RoutingInputs, tmp_path: Path) -> None:
    folder, run_folder = write_router(tmp_path, inputs)
    tuned = read_learned(folder, run_folder)
    storage.remove(storage.join(folder, TUNED))
    untuned = read_learned(folder, run_folder)
    assert tuned is not None
    assert untuned is not None
    assert (tuned.merged is None, untuned.merged) == (False, None)


def test_no_router_is_none_and_a_spoilt_one_is_refused(inputs: RoutingInputs, tmp_path: Path) -> None:
    folder, run_folder = write_router(tmp_path, inputs)
    where = storage.join(folder, "candidates.parquet")
    table = storage.read_parquet(where)
    for column, match in (("learned", "the learned weight of .* for .* is nan"), ("similar", "is -1.0")):
        values = table[column].to_pylist()
        values[3] = float("nan") if column == "learned" else -1.0
        spoilt = table.set_column(table.column_names.index(column), column, pa.array(values, pa.float32()))
        storage.write_bytes(where, storage.encode_parquet(spoilt))
        with pytest.raises(EvaluationError, match=match):
            read_learned(folder, run_folder)
    storage.write_bytes(where, storage.encode_parquet(table.drop_columns(["similar"])))
    with pytest.raises(EvaluationError, match="there is no column 'similar'"):
        read_learned(folder, run_folder)
    invalidate(folder)
    assert read_learned(folder, run_folder) is None
    assert read_learned(str(tmp_path / "nowhere"), run_folder) is None


def test_compare_shows_the_router_of_its_project(project: Project, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    compare_project(project.location)
    assert "Router: " not in capsys.readouterr().out
    output = Path(project.path(project.output))
    names = make_inputs(3, 1, held_out=0)
    vectors = make_embeddings(PERSONAS, names.embeddings.vectors)
    small = RoutingInputs(PERSONAS, PERSONAS, vectors, clusters=Clusters(dict.fromkeys(PERSONAS, "c")))
    folder, _ = write_router(output, small, candidates=2, k=2)
    made = make_search()
    write_trials(storage.join(folder, "tuning"), made.trials, SPACE)
    write_summary(storage.join(folder, "tuning"), made.summary)
    one = dict.fromkeys(PERSONAS, ("unified", "unified"))
    routing = {p: [other for other in PERSONAS if other != p] for p in PERSONAS}
    write_run(Path(project.workspace), RUN, {"strategy": RUN}, routing, one, 0.6)
    compare_project(project.location)
    assert "Router: bilinear, trained on 3 personas; validation loss" in capsys.readouterr().out
    page = (output / "report.html").read_text()
    assert '<section id="router">' in page
    assert "30 trials then tuned how it is used: k " in page
    assert {file.name for file in (output / "plots").iterdir()} >= FIGURES - {"router_personas.png"}
