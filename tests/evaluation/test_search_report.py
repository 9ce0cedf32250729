"""A search in the report: what it found, its figures, and what its winner is worth on test examples."""

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from raymerge.config import Project
from raymerge.errors import EvaluationError
from raymerge.evaluation import drawing
from raymerge.evaluation.comparison import Comparison, compare
from raymerge.evaluation.report import render_report, terminal_table
from raymerge.evaluation.search_panel import Searched, against, choices, read_searched, score
from raymerge.evaluation.search_plots import (
    PANELS,
    POINTS,
    drawn,
    history_figure,
    parallel_figure,
    scale_of,
    slice_figure,
)
from raymerge.pipelines.compare import compare as compare_project
from raymerge.search.choice import pareto_front
from raymerge.search.records import Figures, Trial
from raymerge.search.results import Summary, write_summary, write_trials
from raymerge.search.space import Parameter, Space

from ..pipelines.test_compare import project  # noqa: F401
from .conftest import SOFT, recipe, run
from .test_report import HOSTILE, Page

FIGURES = {"search.png", "search_slices.png", "search_parallel.png", "search_front.png"}
SPACE = Space(
    {"strategy": "top_k"},
    (
        Parameter("k", "int", 2, 30, True, None, (), {}),
        Parameter("scale", "float", 0.5, 3, True, None, (), {}),
        Parameter("centred", "choice", None, None, False, None, (True, False), {}),
        Parameter("method", "choice", None, None, False, None, ("linear", "ties"), {}),
        Parameter("rank", "choice", None, None, False, None, (8, 16, "exact"), {}),
        Parameter("density", "float", 0.1, 1, False, None, (), {"method": ("ties",)}),
    ),
)


def make_trials(count: int = 30, ties: str = "ties") -> tuple[Trial, ...]:
    """Trials of which every fifth was stopped on 8 of 24 personas and every eleventh failed; `density` counts only
    where the method is ties."""
    generator = np.random.default_rng(0)
    found = []
    for number in range(count):
        k, scale, by_sign = int(generator.integers(2, 30)), float(0.5 * 6 ** generator.random()), number % 2 == 1
        values = {"k": k, "scale": scale, "centred": number % 3 == 0, "method": ties if by_sign else "linear"}
        values["rank"] = (8, 16, "exact")[number % 3]
        if by_sign:
            values["density"] = float(0.1 + 0.9 * generator.random())
        reached = 70 - 3 * abs(np.log(scale / 1.4)) - 0.1 * abs(k - 12) - 2 * by_sign
        figures = {"similarity": float(reached), "bytes": 4096.0 * (8 + k), "experts": float(k)}
        state = "failed" if number % 11 == 10 else "stopped" if number % 5 == 4 else "complete"
        personas = {"failed": (), "stopped": (8,), "complete": (8, 24)}[state]
        found.append(Trial(number, values, state, [Figures(n, figures, 0.2, 3 * n, 1.0) for n in personas]))
    return tuple(found)


def make_search(trials: tuple[Trial, ...] | None = None, **changed) -> Searched:
    trials = make_trials() if trials is None else trials
    complete = [trial for trial in trials if trial.state == "complete"]
    reached = [[trial.last.values["similarity"], trial.last.values["bytes"]] for trial in complete]
    best = max(complete, key=score).number
    front = tuple(complete[i].number for i in pareto_front(np.array(reached), [True, False]))
    ranks = tuple(
        {"rank": rank, "similarity": similarity, "bytes": size}
        for rank, similarity, size in ((8, 66.1, 3e4), (16, 67.9, 6e4), (32, 68.6, 12e4), ("exact", 69.3, 9e5))
    )
    beside = tuple(
        {"name": name, "similarity": 68.2 - difference, "difference": difference, "low": low, "high": high}
        for name, difference, low, high in (
            ("searched_random_k", 0.3, -0.4, 1.0),
            ("unified", 2.0, 1.0, 3.0),
            ("own", 2.2, 1.1, 3.1),
        )
    )
    summary = Summary(
        best, best, 69.0, run="searched", test=68.2, beside=beside, optimism=0.42, front=front,
        ranks=ranks, objectives=("similarity", "bytes"), log=("scale",), notes=("a note",),
        importances={"scale": 0.6, "k": 0.25, "method": 0.1, "rank": 0.04, "centred": 0.01, "density": 0.3},
    )  # fmt: skip
    return Searched(trials, dataclasses.replace(summary, **changed))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """As little as there can be beside a search, since what else the page holds takes time."""
    generator = np.random.default_rng(0)
    runs = [
        run(name, recipe(name, name, **(SOFT if name == "soft" else {})), level + 0.1 * generator.random((12, 2)))
        for name, level in (("unified", 0.6), ("soft", 0.7))
    ]
    return compare(runs, resamples=200)


def words(data: bytes) -> str:
    page = Page(data.decode())
    assert page.open == []
    return " ".join("".join(page.words).split())


def test_the_section_says_what_was_found_and_its_figures_are_there(comparison: Comparison) -> None:
    plain, files = render_report(comparison), render_report(comparison, searched=make_search())
    assert set(files) - set(plain) == FIGURES
    for name in FIGURES:
        assert np.asarray(Image.open(io.BytesIO(files[name])).convert("L")).std() > 3  # something is drawn
    assert 'id="search"' not in plain["report.html"].decode()
    assert files["comparison.json"] == plain["comparison.json"]
    said = words(files["report.html"])
    for part in ("30 recipes were tried", "6 stopped early", "2 failed", "The winner is trial", "a note",
                 "flatters itself by about 0.4", "On test examples it has 68.2", "60 %",
                 "over unified", "That of density is among the trials that", "false, true", "exact"):  # fmt: skip
        assert part in said
    panels = re.findall(r'aria-label="Score of trials by (\w+)"', files["report.html"].decode())
    assert panels == ["scale", "density", "k", "method", "rank", "centred"]  # the most important first
    assert render_report(comparison, searched=make_search()) == files


def test_a_simpler_winner_and_an_unknown_test_score_are_said(comparison: Comparison) -> None:
    best = make_search().summary.best
    said = words(render_report(comparison, searched=make_search(test=None, winner=0, optimism=None))["report.html"])
    assert f"the simplest within one standard error of the best, trial {best} with" in said
    assert "It was not scored on test examples." in said
    assert "flatters itself" not in said


def test_the_winner_stands_beside_unified_and_the_runs_made_for_it(comparison: Comparison) -> None:
    made = make_search()
    assert [one["name"] for one in against(made, "unified")] == ["searched_random_k", "unified"]
    assert [one["name"] for one in against(made, None)] == ["searched_random_k"]
    assert [one["name"] for one in against(make_search(run=None, beside=()), "unified")] == []
    said = words(render_report(comparison, searched=made)["report.html"])
    assert (
        "On test examples it has 68.2: +0.3 (−0.4 to +1.0) over searched_random_k; +2.0 (+1.0 to +3.0) over unified."
        in said
    )
    assert "own66.0" in said.replace(" ", "")  # every other run is in the table beside


def test_best_so_far_and_scales_are_those_of_the_trials() -> None:
    searched = make_search()
    with drawing.styled():
        axes = slice_figure(searched, ["density"], columns=1).axes[0]
        heights = np.concatenate([np.asarray(group.get_offsets()) for group in axes.collections])
        lines = parallel_figure(searched, ["density", "method"]).axes[0].lines
        best = history_figure(searched).axes[0].lines[0]
    having = [trial for trial in searched.trials if "density" in trial.values and trial.last]
    assert sorted(heights[:, 0]) == pytest.approx(sorted(trial.values["density"] for trial in having))
    assert all(axes.get_ylim()[0] < height < axes.get_ylim()[1] for height in heights[:, 1])
    complete = [trial for trial in searched.trials if trial.state == "complete"]
    for trial, height in zip(complete, np.asarray(best.get_ydata()), strict=False):
        assert height == max(score(one) for one in complete if one.number <= trial.number)
    through = [line for line in lines if len(line.get_ydata()) == 3]
    assert len(through) == len(complete)
    assert sum(line.get_ydata()[0] < 0 for line in through) == sum("density" not in t.values for t in complete)
    scale = scale_of(searched, "scale")
    assert scale.log
    middle = Trial(99, {"scale": float(np.sqrt(scale.low * scale.high))})
    assert scale.share(middle) == pytest.approx(0.5)
    assert scale_of(searched, "rank").categories == ("8", "16", "exact")
    assert choices([True, False, True]) == ["false", "true"]


def test_hostile_texts_stay_texts_and_the_terminal_gets_one_line(comparison: Comparison) -> None:
    searched = make_search(make_trials(ties=HOSTILE), notes=(HOSTILE,))
    number = next(t.number for t in searched.trials if t.state == "complete" and t.values["method"] == HOSTILE)
    searched = dataclasses.replace(searched, summary=dataclasses.replace(searched.summary, winner=number))
    page = Page(render_report(comparison, searched=searched)["report.html"].decode())
    assert page.open == []
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert "{{ 7 * 7 }}" in "".join(page.words)
    console = Console(width=4000, file=io.StringIO(), color_system=None)
    console.print(terminal_table(comparison, 80, searched))
    [line] = [line for line in console.file.getvalue().splitlines() if line.startswith("Search: ")]
    assert f"30 trials; winner {number}: k " in line
    assert "(optimism 0.4), test 68.2, +0.3 [−0.4 +1.0] over searched_random_k" in line
    assert "\x00" not in line


@pytest.mark.parametrize("states", [("complete",), ("complete", "failed"), ("stopped", "complete")])
def test_the_smallest_searches_make_a_section(comparison: Comparison, states: tuple[str, ...]) -> None:
    """One complete trial, nothing else known: no importances, ranks, bytes, or parameters."""
    rungs = {"failed": []}
    trials = tuple(
        Trial(i, {}, state, rungs.get(state, [Figures(4, {"similarity": 50.0 + i})])) for i, state in enumerate(states)
    )
    last = next(trial.number for trial in trials if trial.state == "complete")
    files = render_report(comparison, searched=Searched(trials, Summary(last, last, 50.0)))
    assert {name for name in files if name.startswith("search")} == {"search.png"}
    one = dataclasses.replace(trials[last], values={"k": 3, "scale": 1.0}, number=0)
    files = render_report(comparison, searched=Searched((one,), Summary(0, 0, 50.0, log=("scale", "k"))))
    assert {"search_slices.png", "search_parallel.png"} <= set(files)


def test_many_trials_of_many_parameters_stay_a_page(comparison: Comparison) -> None:
    more = {f"weights.expert_{i:02d}": 0.01 * i for i in range(20)}
    trials = tuple(dataclasses.replace(trial, values={**trial.values, **more}) for trial in make_trials(5000))
    searched = make_search(trials)
    assert POINTS <= len(drawn(searched)) <= POINTS + 2
    assert searched.winner in drawn(searched)
    page = render_report(comparison, searched=searched)["report.html"]
    assert len(page) < 3_000_000
    said = words(page)
    assert f"The {PANELS} most important parameters are drawn" in said
    assert "of 5,000 trials are drawn" in said


def test_a_search_is_read_from_its_folder(tmp_path: Path) -> None:
    written = make_search()
    assert read_searched(str(tmp_path)) is None
    write_trials(str(tmp_path), written.trials, SPACE)
    write_summary(str(tmp_path), written.summary)
    read = read_searched(str(tmp_path))
    assert read is not None
    assert read.summary == written.summary
    for one, other in zip(read.trials, written.trials, strict=True):
        assert (one.number, one.state, one.values) == (other.number, other.state, other.values)
        assert score(one) == pytest.approx(score(other), nan_ok=True)
    failed = next(trial.number for trial in written.trials if trial.state == "failed")
    write_summary(str(tmp_path), dataclasses.replace(written.summary, winner=failed))
    with pytest.raises(EvaluationError, match=f"chose trial {failed}, which is not complete"):
        read_searched(str(tmp_path))


def test_compare_shows_the_search_of_its_project(project: Project, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    written, folder = make_search(), project.search_folder()
    compare_project(project.location)
    assert "Search: " not in capsys.readouterr().out
    write_trials(folder, written.trials, SPACE)
    write_summary(folder, written.summary)
    compare_project(project.location)
    assert f"Search: 30 trials; winner {written.summary.winner}: k " in capsys.readouterr().out
    output = Path(folder).parent
    assert b'<section id="search">' in (output / "report.html").read_bytes()
    assert {file.name for file in (output / "plots").iterdir()} >= FIGURES
