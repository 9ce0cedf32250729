"""Figures of a learned router. To be called, and the figures written, inside `drawing.styled()`.

Blue is what was learned, grey what similarity alone says.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from raymerge.evaluation.comparison import Comparison
from raymerge.evaluation.drawing import INK, KIND_COLOURS, MUTED, PAPER, bare
from raymerge.evaluation.router_panel import by_similarity, row_of_run
from raymerge.evaluation.router_weights import Learned, Numbers, Values, effective, in_common
from raymerge.evaluation.wording import short

POINTS = 500  # pairs, and personas, that are drawn
RANKS = 64  # places by similarity whose mean weight is drawn, as far as anybody gives them as much as
RANK_SHARE = 0.01
BINS = 24
LEARNED, OTHER, HELD_OUT = KIND_COLOURS["recipe"], MUTED, KIND_COLOURS["control"]


@dataclass(frozen=True)
class Panel:
    """A part of a figure. label: what a screen reader says of it."""

    label: str
    draw: Callable[[Axes], None]


def panels(learned: Learned, comparison: Comparison) -> dict[str, list[Panel]]:
    """The parts of each figure by the figure's name, those left out that have nothing to show."""
    found: dict[str, list[Panel]] = {}
    after, others = row_of_run(learned, comparison), by_similarity(comparison)
    if after is not None and others:
        before, name = comparison.scores[comparison.row(others[0].name)], short(others[0].name)
        shown = _Personas(learned, comparison, before, comparison.scores[after], name)
        found["personas"] = [
            Panel(f"Each persona's similarity in {learned.run} against {name}", shown.scatter),
            Panel(f"What each persona gains over {name} against how far its weights moved", shown.moved),
        ]
    if len(learned.nearest):
        found["weights"] = [
            Panel("Weight of each pair as learned against that by similarity", lambda axes: _pairs(axes, learned)),
            Panel("Mean weight of the most similar, the next similar.. expert", lambda axes: _ranks(axes, learned)),
            Panel("How many experts count for each persona", lambda axes: _effective(axes, learned)),
        ]
    epochs = learned.history
    if len(epochs) > 1:
        found["training"] = [Panel("Loss by epoch", lambda axes: _losses(axes, learned))]
        if any("entropy" in epoch for epoch in epochs):
            found["training"].append(Panel("Experts that count by epoch", lambda axes: _entropy(axes, learned)))
    return found


def figure(parts: Sequence[Panel]) -> Figure:
    """Parts side by side."""
    made = Figure(figsize=(3.6 * len(parts), 2.9), layout="constrained")
    for axes, part in zip(made.subplots(1, len(parts), squeeze=False).ravel(), parts, strict=True):
        part.draw(axes)
        bare(axes)
    return made


def router_figures(learned: Learned, comparison: Comparison) -> dict[str, Figure]:
    """All figures by the names of their files."""
    return {f"router_{name}": figure(parts) for name, parts in panels(learned, comparison).items()}


def _pairs(axes: Axes, learned: Learned) -> None:
    before, after = 100 * learned.near_similar, 100 * learned.near_learned
    there = np.flatnonzero((before > 0) | (after > 0))
    there = there[np.argsort(before[there] - after[there], kind="stable")]
    drawn = there[_even(len(there), POINTS)]  # of all sizes of change
    right, top = before[there].max(initial=1), after[there].max(initial=1)
    axes.plot([0, 100], [0, 100], color=MUTED, linewidth=0.9)
    axes.scatter(before[drawn], after[drawn], s=13, color=LEARNED, alpha=0.5, linewidths=0)
    axes.set_title("Each pair of persona and expert")
    axes.set(xlabel="weight by similarity", ylabel="weight as learned")
    axes.set(xlim=(-0.03 * right, 1.05 * right), ylim=(-0.03 * top, 1.05 * top))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(PercentFormatter(decimals=0))


def _ranks(axes: Axes, learned: Learned) -> None:
    given = np.maximum(learned.near_similar, learned.near_learned) >= RANK_SHARE
    count = min(RANKS, int(learned.nearest[given].max(initial=0)) + 2)
    place = np.arange(1, count + 1)
    for weight, weights, style in (
        (learned.near_similar, learned.similar, {"color": OTHER, "linestyle": (0, (4, 2)), "label": "by similarity"}),
        (learned.near_learned, learned.learned, {"color": LEARNED, "label": "as learned"}),
    ):
        total = np.bincount(learned.nearest, weights=weight, minlength=count)[:count]
        axes.plot(place, 100 * total / max(1, int(weights.routed.sum())), linewidth=1.8, **style)
    axes.set_title("From the most similar expert on")
    axes.set(xlabel="place by similarity", ylabel="mean weight", xlim=(0, count + 1))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend(frameon=False, loc="upper right", labelcolor=INK)


def _effective(axes: Axes, learned: Learned) -> None:
    before, after = effective(learned.similar), effective(learned.learned)
    both = np.concatenate([before, after])
    known = both[np.isfinite(both)]
    low = float(known.min()) if len(known) else 1.0
    edges = np.linspace(low, max(low + 1, float(known.max(initial=0))) + 1e-6, BINS + 1).tolist()
    known_before, known_after = before[np.isfinite(before)], after[np.isfinite(after)]
    axes.hist(known_after, edges, color=LEARNED, alpha=0.55, label="as learned")
    axes.hist(known_before, edges, histtype="step", color=OTHER, linewidth=1.6, label="by similarity")
    axes.set_title("How many experts count")
    axes.set(xlabel="experts that count", ylabel="personas")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(frameon=False, labelcolor=INK)


def _losses(axes: Axes, learned: Learned) -> None:
    for name, style in (
        ("loss", {"color": LEARNED, "label": "training rows"}),
        ("validation", {"color": HELD_OUT, "linestyle": (0, (4, 2)), "label": "validation"}),
    ):
        known = [(epoch, figures[name]) for epoch, figures in enumerate(learned.history) if name in figures]
        if known:
            axes.plot(*zip(*known, strict=True), linewidth=1.8, marker="o", markersize=3.5, **style)
    axes.axvline(learned.best_epoch, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    axes.annotate(
        "kept", (learned.best_epoch, 1), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
        va="top", fontsize=8, color=MUTED,
    )  # fmt: skip
    axes.set_title("Loss")
    axes.set(xlabel="epoch", ylabel="nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend(frameon=False, labelcolor=INK)


def _entropy(axes: Axes, learned: Learned) -> None:
    known = [(epoch, np.exp(one["entropy"])) for epoch, one in enumerate(learned.history) if "entropy" in one]
    axes.plot(*zip(*known, strict=True), linewidth=1.8, marker="o", markersize=3.5, color=LEARNED)
    axes.axvline(learned.best_epoch, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    axes.set_title("Experts that count")
    axes.set(xlabel="epoch", ylabel="exp of the mean entropy")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


@dataclass(frozen=True, eq=False)
class _Personas:
    """Similarity of each persona by the best row by similarity, called `name`, and by the router, in points."""

    learned: Learned
    comparison: Comparison
    before: Values
    after: Values
    name: str

    @property
    def groups(self) -> list[tuple[Numbers, dict[str, Any]]]:
        """Personas that are drawn, by their places, and their marks: those seen, and those held out."""
        unseen = np.array([name in self.learned.held_out for name in self.comparison.personas], dtype=np.bool_)
        seen = {"color": LEARNED, "marker": "o", "s": 13, "alpha": 0.55, "linewidths": 0}
        new = {"color": HELD_OUT, "marker": "D", "s": 20, "edgecolors": PAPER, "linewidths": 0.5}
        pairs = ((np.flatnonzero(~unseen), seen), (np.flatnonzero(unseen), new))
        return [(those[_even(len(those), POINTS)], style) for those, style in pairs]

    def scatter(self, axes: Axes) -> None:
        every = np.concatenate([self.before, self.after])
        low = np.floor(every.min() / 10) * 10
        high = max(low + 10, np.ceil(every.max() / 10 - 1e-3) * 10)  # 100 has a rounding error
        axes.plot([low, high], [low, high], color=MUTED, linewidth=0.9)
        for those, style in self.groups:
            axes.scatter(self.before[those], self.after[those], **style)
        axes.set_title("Similarity of each persona")
        axes.set(xlabel=self.name, ylabel=short(self.learned.run), xlim=(low, high), ylim=(low, high))

    def moved(self, axes: Axes) -> None:
        place = {name: i for i, name in enumerate(self.learned.personas)}
        share = np.append(100 * (1 - in_common(self.learned.learned, self.learned.similar)), np.nan)
        across = share[[place.get(name, -1) for name in self.comparison.personas]]
        axes.axhline(0, color=MUTED, linewidth=0.9)
        for those, style in self.groups:
            axes.scatter(across[those], (self.after - self.before)[those], **style)
        axes.set_title("Does it pay to differ?")
        axes.set(xlabel="weight moved to other experts", ylabel=f"points over {self.name}")
        axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
        axes.margins(0.06)


def _even(count: int, most: int) -> Numbers:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
