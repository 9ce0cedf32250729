"""What a person sees of a search while it runs, and when it ends."""

import io
import itertools
from types import SimpleNamespace

import pytest
from rich.console import Console

from raymerge.config import Search
from raymerge.pipelines.search import budget
from raymerge.pipelines.searching.live import Live
from raymerge.search.records import Figures, Trial

LONG = {"strategy": "sparse_moe", "k": 14, "temperature": 0.123456, "scale": 1.3149, "method": "breadcrumbs_ties"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Told:
    """A search with a clock of its own: each trial takes half a minute."""

    def __init__(self, stream: io.StringIO, **search) -> None:
        self.trials: list[Trial] = []
        self.now = 0.0
        self.live = Live(Search(**search), self.best, finished_before=2, stream=stream, clock=lambda: self.now)

    def best(self) -> Trial | None:
        complete = [trial for trial in self.trials if trial.state == "complete"]
        return max(complete, key=lambda trial: trial.last.values["similarity"], default=None)

    def run(self, number: int, similarity: float, state: str = "complete", **more) -> None:
        trial = Trial(number, LONG)
        self.trials.append(trial)
        self.live.begun(trial)
        if state != "failed":
            trial.rungs.append(Figures(20 if state == "stopped" else 200, {"similarity": similarity}))
            self.live.reported(trial)
        trial.state, trial.error = state, more.get("error")
        self.now += 30
        self.live.finished(trial)


def test_a_job_log_has_a_line_for_each_trial():
    stream = io.StringIO()
    told = Told(stream, trials=60)
    with told.live as live:
        told.run(2, 70.14)
        told.run(3, 66.0, "stopped")
        told.run(4, 0.0, "failed", error="p3: holds NaN\nRetrain it.")
        live.say("a worker was lost")
    lines = stream.getvalue().splitlines()
    assert lines == [
        "search: trial 2: 70.14 over 200 personas: strategy sparse_moe, k 14, temperature 0.123, scale 1.31, "
        "method breadcrumbs_ties; 3/60 trials, best 70.1 (trial 2), 120/h, 28:30 left",
        "search: trial 3: 66.00 stopped over 20 personas: strategy sparse_moe, k 14, temperature 0.123, scale 1.31, "
        "method breadcrumbs_ties; 4/60 trials, best 70.1 (trial 2), 120/h, 28:00 left",
        "search: trial 4 failed: p3: holds NaN; 5/60 trials, best 70.1 (trial 2), 120/h, 27:30 left",
        "search: a worker was lost",
        "search: 5/60 trials, best 70.1 (trial 2), 120/h, 27:30 left; finished",
    ]


def test_minutes_bound_the_time_that_is_left():
    told = Told(io.StringIO(), trials=60, minutes=2)
    with told.live as live:
        told.run(2, 1.0)
        assert live.status().endswith("1:30 left")
        told.now = 500.0
        assert live.status().endswith("0:00 left")


def test_the_table_fits_into_eighty_columns():
    told = Told(Terminal(), trials=60)
    with told.live as live:
        for number in range(2, 10):
            told.run(number, 80.0 - number, "stopped" if number % 3 == 0 else "complete")
        told.trials.append(Trial(10, LONG))
        live.begun(told.trials[-1])
        console = Console(file=io.StringIO(), width=80, record=True)
        console.print(live.get_renderable())
        lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("search: 10/60 trials, best 78.0 (trial 2), 120/h, 25:00 left")
    assert lines[1].split() == ["trial", "similarity", "personas", "recipe"]
    assert [line.split()[0] for line in lines[2:]] == ["2", "6", "7", "8", "9", "10"]  # the best, and the latest
    assert lines[2].split()[:5] == ["2", "78.00", "200", "strategy", "sparse_moe,"]
    assert lines[4].split()[1] == "73.00"
    assert lines[6].split()[1:4] == ["71.00", "stopped", "20"]
    assert all(line.endswith("…") for line in lines[2:])  # a recipe that is longer is cut, never wrapped


def test_what_is_shown_of_a_point_is_what_it_means():
    for stream in (io.StringIO(), Terminal()):
        told = Told(stream, trials=60)
        told.live = Live(Search(), told.best, told=lambda values: {"twice": 2 * values["k"]}, stream=stream)
        with told.live as live:
            told.run(2, 70.0)
            console = Console(file=io.StringIO(), width=80, record=True)
            console.print(live.get_renderable())
        assert "twice 28" in console.export_text()
        assert "over 200 personas: twice 28; " in stream.getvalue() or stream.isatty()


def test_a_terminal_is_left_with_one_line():
    stream = Terminal()
    told = Told(stream, trials=4)
    with told.live:
        told.run(2, 1.0)
    assert "trial 2: " not in stream.getvalue()
    assert stream.getvalue().splitlines()[-1].endswith("finished")


@pytest.mark.parametrize(
    ("section", "seconds", "answers", "goes_on"),
    [
        ({}, 1e6, 10**6, True), ({"minutes": 2}, 119, 0, True), ({"minutes": 2}, 120, 0, False),
        ({"evaluations": 100}, 0, 99, True), ({"evaluations": 100}, 0, 100, False),
        ({"evaluations": 100, "minutes": 2}, 130, 5, False),
    ],
)  # fmt: skip
def test_a_budget_is_spent_by_time_or_by_answers(section, seconds, answers, goes_on):
    rungs = [Figures(2, {}, answers=answers // 2), Figures(4, {}, answers=answers - answers // 2)]
    asked = SimpleNamespace(trials=[Trial(0, {}, rungs=rungs)])
    ticks = itertools.chain([50.0], itertools.repeat(50.0 + seconds))
    assert budget(Search(**section), asked, clock=lambda: next(ticks))() is goes_on
