"""Figures of a search. To be called, and the figures written, inside `drawing.styled()`.

A trial's score is its validation similarity in percent, less the penalty of its offsets: what trials compete by.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from raymerge.evaluation.drawing import INK, KIND_COLOURS, LINE, MUTED, PAPER, bare
from raymerge.evaluation.search_panel import Searched, adapter_bytes, choices, is_number, score, similarity, value_text
from raymerge.evaluation.wording import short, size
from raymerge.search.records import Trial

POINTS = 300  # trials drawn
PANELS = 12  # parameters drawn
ABSENT = -0.14  # where lines pass that a condition leaves a parameter out of
COLOUR = KIND_COLOURS["recipe"]
_GOLDEN = 0.618  # multiples of it, without their whole part, lie evenly


def drawn(searched: Searched) -> list[Trial]:
    """The trials that figures show: all, or the winner and the best one with an even choice of the others."""
    trials = searched.trials
    even = np.linspace(0, len(trials) - 1, min(len(trials), POINTS)).astype(int).tolist()
    chosen = {trials[i].number for i in even} | {searched.winner.number, searched.best.number}
    return [trial for trial in trials if trial.number in chosen]


@dataclass(frozen=True)
class Scale:
    """How a parameter's values are laid out: texts of a choice, or a range of numbers.

    categories: empty for numbers. log: whether the numbers are spread by their logarithms.
    """

    name: str
    categories: tuple[str, ...]
    low: float
    high: float
    log: bool

    def at(self, trial: Trial) -> float:
        """Where a trial that has the parameter lies: its number, or the place of its choice, a little to one side so
        that trials of one choice can be told apart."""
        value = trial.values[self.name]
        if not self.categories:
            return float(value)
        return self.categories.index(value_text(value)) + 0.5 * (trial.number * _GOLDEN % 1 - 0.5)

    def share(self, trial: Trial) -> float:
        """The same from 0 to 1."""
        if self.categories:
            return (self.at(trial) + 0.5) / len(self.categories)
        low, at, high = (np.log(x) if self.log else x for x in (self.low, self.at(trial), self.high))
        return float((at - low) / (high - low)) if high > low else 0.5

    @property
    def ends(self) -> tuple[str, str]:
        """The least and the largest number in words."""
        return f"{self.low:.3g}", f"{self.high:.3g}"


def scale_of(searched: Searched, name: str) -> Scale:
    """The scale of a parameter, from the values that were tried; logarithmic as it was searched."""
    values = [trial.values[name] for trial in searched.trials if name in trial.values]
    if all(is_number(value) for value in values):
        return Scale(name, (), min(values), max(values), name in searched.summary.log and min(values) > 0)
    return Scale(name, tuple(choices(values)), 0, 1, False)


def history_figure(searched: Searched) -> Figure:
    """What each trial scored, in their order, and the best so far; stopped ones pale, failed ones at the bottom."""
    figure = Figure(figsize=(7.6, 3.3), layout="constrained")
    axes = figure.subplots()
    complete = [trial for trial in searched.trials if trial.state == "complete"]
    best = np.maximum.accumulate([score(trial) for trial in complete]).tolist()
    places = [trial.number for trial in complete]
    axes.step([*places, searched.trials[-1].number], [*best, best[-1]], where="post", color=MUTED, linewidth=1.2)
    _points(axes, searched, drawn(searched), lambda trial: float(trial.number))
    for trial in drawn(searched):
        if trial.state == "failed":
            bottom = axes.get_xaxis_transform()
            axes.plot(trial.number, 0.02, "x", color=MUTED, markersize=5, transform=bottom, clip_on=False)
    axes.set(xlabel="trial", ylabel="validation similarity × 100")
    axes.margins(x=0.02)
    bare(axes)
    return figure


def slice_figure(searched: Searched, parameters: Sequence[str], columns: int = 4) -> Figure:
    """A panel for each parameter: its values across, what the trials that have it scored upwards."""
    lines = -(-len(parameters) // columns)
    figure = Figure(figsize=(2.45 * columns, 2.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    known = [score(trial) for trial in searched.trials if trial.last]
    margin = 0.06 * (max(known) - min(known)) + 0.05
    for axes, name in zip(panels, parameters, strict=False):
        _slice(axes, searched, scale_of(searched, name))
        axes.set_ylim(min(known) - margin, max(known) + margin)  # panels drawn apart can be compared
    for axes in panels[len(parameters) :]:
        axes.set_visible(False)
    return figure


def _slice(axes: Axes, searched: Searched, scale: Scale) -> None:
    axes.locator_params(nbins=5)
    if scale.categories:
        axes.set_xticks(range(len(scale.categories)), [short(text, 12) for text in scale.categories])
        axes.set_xlim(-0.6, len(scale.categories) - 0.4)
    elif scale.log:
        ladder = [step * 10.0**power for power in range(-9, 9) for step in (1, 2, 3, 5, 7)]
        ticks = [tick for tick in ladder if scale.low <= tick <= scale.high] or [scale.low]
        ticks = ticks[:: -(-len(ticks) // 6)]
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    _points(axes, searched, [trial for trial in drawn(searched) if scale.name in trial.values], scale.at)
    axes.set_title(short(scale.name, 30), fontsize=9.5)
    bare(axes)


def _points(axes: Axes, searched: Searched, trials: Sequence[Trial], across: Callable[[Trial], float]) -> None:
    styles: dict[str, dict[str, Any]] = {
        "stopped": {"facecolors": "none", "edgecolors": COLOUR, "alpha": 0.45, "linewidths": 0.8},
        "complete": {"color": COLOUR, "alpha": 0.8, "linewidths": 0},
    }
    for state, style in styles.items():
        those = [trial for trial in trials if trial.state == state and trial.last]
        axes.scatter([across(trial) for trial in those], [score(trial) for trial in those], s=17, **style)
    for trial in trials:
        if trial.number == searched.summary.winner:
            axes.plot(across(trial), score(trial), "*", color=INK, markersize=12, markeredgecolor=PAPER)


def parallel_figure(searched: Searched, parameters: Sequence[str]) -> Figure:
    """A line for each complete trial through its values of all parameters to its score; the better, the stronger.

    Where a condition leaves a parameter out, the line passes below its axis.
    """
    figure = Figure(figsize=(max(5.0, 1.15 * (len(parameters) + 1)), 3.6), layout="constrained")
    axes = figure.subplots()
    trials = sorted((trial for trial in drawn(searched) if trial.state == "complete"), key=score)
    scales = [scale_of(searched, name) for name in parameters]
    low, high = score(trials[0]), score(trials[-1])
    for place, trial in enumerate(trials):
        heights = [scale.share(trial) if scale.name in trial.values else ABSENT for scale in scales]
        heights.append((score(trial) - low) / (high - low) if high > low else 0.5)
        strength = (place + 1) / len(trials)
        style: dict[str, Any] = {"color": COLOUR, "alpha": 0.08 + 0.6 * strength**4, "linewidth": 0.7 + strength**4}
        if trial.number == searched.summary.winner:
            style = {"color": INK, "linewidth": 2.2, "zorder": 4}
        axes.plot(heights, **style)
    for place, scale in enumerate(scales):
        _axis(axes, place, scale, any(scale.name not in trial.values for trial in trials))
    _axis(axes, len(scales), Scale("similarity", (), low, high, False), False)
    names = [short(name, 16) for name in parameters]
    axes.set_xticks(range(len(scales) + 1), [*names, "similarity"], color=INK, fontweight="bold")
    axes.set(xlim=(-0.35, len(scales) + 0.45), ylim=(-0.22, 1.1), yticks=[])
    axes.grid(visible=False)
    bare(axes, "left", "bottom")
    return figure


def _axis(axes: Axes, place: int, scale: Scale, may_lack: bool) -> None:
    axes.plot([place, place], [0, 1], color=LINE, linewidth=1.2, zorder=3)
    said = [((i + 0.5) / len(scale.categories), short(text, 11)) for i, text in enumerate(scale.categories)]
    said = said or list(zip((0.0, 1.0), scale.ends, strict=True))
    if may_lack:
        axes.annotate(
            "left out", (place, ABSENT), (0, -9), textcoords="offset points", ha="center", va="center", fontsize=7.5,
            color=MUTED,
        )  # fmt: skip
    for height, text in said:
        axes.annotate(
            text, (place, height), (4, 0), textcoords="offset points", va="center", fontsize=7.5, color=MUTED, zorder=5
        )


def front_figure(searched: Searched) -> Figure | None:
    """Similarity against the bytes of an adapter: complete trials as points, and the winner at each rank as a line;
    None where no bytes are known."""
    trials = [trial for trial in drawn(searched) if trial.state == "complete" and adapter_bytes(trial)]
    ranks = sorted((rank for rank in searched.summary.ranks if rank["bytes"]), key=lambda rank: float(rank["bytes"]))
    if not trials and not ranks:
        return None
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    for trial in trials:
        strong = len(searched.summary.front) > 1 and trial.number in searched.summary.front
        size_of, strength = (6.5, 1.0) if strong else (4.2, 0.4)
        axes.plot(
            adapter_bytes(trial) or 0, similarity(trial), "o", color=COLOUR, alpha=strength, markersize=size_of,
            markeredgewidth=0,
        )  # fmt: skip
    if ranks:
        across, upwards = [rank["bytes"] for rank in ranks], [rank["similarity"] for rank in ranks]
        axes.plot(across, upwards, "*-", color=INK, linewidth=1.2, markersize=11, markeredgecolor=PAPER)
    for rank in ranks:
        place = (rank["bytes"], rank["similarity"])
        axes.annotate(str(rank["rank"]), place, (0, 9), textcoords="offset points", ha="center", fontsize=8.5)
    every = [*(adapter_bytes(trial) or 0 for trial in trials), *(rank["bytes"] for rank in ranks)]
    low, high = min(every) / 1.3, max(every) * 1.3
    powers = [power for power in range(60) if low <= 2.0**power <= high]
    ticks = [2.0**power for power in powers[:: max(1, -(-len(powers) // 7))]]
    axes.set_xlim(low, high)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [size(tick) for tick in ticks])
    axes.margins(y=0.15)
    axes.set(xlabel="bytes of an adapter", ylabel="validation similarity × 100")
    bare(axes)
    return figure


def search_figures(searched: Searched) -> dict[str, Figure]:
    """All figures of a search by name, those left out that have nothing to show."""
    parameters = searched.parameters[:PANELS]
    found = {"search": history_figure(searched)}
    if parameters:
        found["search_slices"] = slice_figure(searched, parameters)
        found["search_parallel"] = parallel_figure(searched, parameters)
    front = front_figure(searched)
    return found if front is None else {**found, "search_front": front}
