"""Figures of the best row of each persona, and of training. To be called, and the figures written, inside
`drawing.styled()`."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from raymerge.evaluation.best import Best
from raymerge.evaluation.comparison import Comparison
from raymerge.evaluation.curves import TrainingCurve
from raymerge.evaluation.drawing import INK, KIND_COLOURS, MUTED, bare
from raymerge.evaluation.plots import largest_clusters
from raymerge.evaluation.statistics import Values
from raymerge.evaluation.wording import short

CELLS = 600  # squares of the map; each stands for several personas where there are more
ACROSS = 50  # squares in a line
STRENGTHS = (1.0, 0.66, 0.46, 0.32)  # of the first, second.. row of a kind
NAMES = {
    "unified": "unified", "cluster": "clusters", "persona": "own adapters", "neighbours": "rows of neighbours",
    "prefix": "prefixes",
}  # fmt: skip
_SQUARE = 0.126  # inches


def personas_per_square(comparison: Comparison) -> float:
    """How many personas a square of the map stands for."""
    drawn = set(largest_clusters(comparison))
    shown = [label for label in comparison.clusters if label in drawn] if comparison.clusters else comparison.personas
    return max(1.0, len(shown) / CELLS)


def strengths(comparison: Comparison, best: Best) -> dict[str, float]:
    """How strongly each row's colour is laid on: rows of one kind share a colour, the most frequent one is full."""
    seen: dict[str, int] = {}
    found = {}
    for count in best.counts:
        kind = comparison.rows[comparison.row(count.row)].kind
        found[count.row] = STRENGTHS[min(seen.get(kind, 0), len(STRENGTHS) - 1)]
        seen[kind] = seen.get(kind, 0) + 1
    return found


def best_figure(comparison: Comparison, best: Best) -> Figure:
    """A square for each persona, in the colour of the kind of row that is best for it, cluster by cluster; the larger,
    the more that row gains over the reference."""
    labels = np.array(comparison.clusters or ("",) * len(comparison.personas), dtype=object)
    names = largest_clusters(comparison) or [""]
    sides = _sides(best)
    each = personas_per_square(comparison)
    strips = [_personas(comparison, best, np.flatnonzero(labels == name), each) for name in names]
    lines = [-(-len(strip) // ACROSS) for strip in strips]
    height = (sum(lines) + 0.6 * (len(lines) - 1)) * _SQUARE
    left, right, below = (1.45 if comparison.clusters else 0.1), 0.1, 0.06
    width = left + ACROSS * _SQUARE + right
    figure = Figure(figsize=(width, height + 2 * below))
    axes = figure.add_axes(
        (left / width, below / (height + 2 * below), ACROSS * _SQUARE / width, height / (height + 2 * below))
    )
    middles, top = [], 0.0
    for strip, count in zip(strips, lines, strict=True):
        _draw(axes, comparison, best, strip, sides[strip], top)
        middles.append(top + count / 2)
        top += count + 0.6
    axes.set(xlim=(0, ACROSS), ylim=(top - 0.6, 0))
    counts = [int((labels == name).sum()) for name in names]
    ticks = [f"{short(name, 14)} ({count:,})" if name else "" for name, count in zip(names, counts, strict=True)]
    axes.set_yticks(middles, ticks, color=INK)
    axes.set_xticks([])
    axes.grid(visible=False)
    bare(axes, "left", "bottom")
    return figure


def _personas(comparison: Comparison, best: Best, members: NDArray[np.int64], each: float) -> NDArray[np.int64]:
    """A cluster's personas in the order that they are drawn: by kind, row, and gain; thinned evenly."""
    kinds = list(KIND_COLOURS)
    order = {count.row: place for place, count in enumerate(best.counts)}
    key = np.array([kinds.index(row.kind) * 10_000 + order.get(row.name, 0) for row in comparison.rows])
    rows = key[np.array(best.row, dtype=np.int64)[members]]
    gain = np.array(best.gain)[members] if best.gain else np.zeros(len(members))
    ordered = members[np.lexsort((-gain, rows))]
    count = max(1, round(len(ordered) / each))
    return ordered if count >= len(ordered) else ordered[np.linspace(0, len(ordered) - 1, count).round().astype(int)]


def _sides(best: Best) -> Values:
    """Side of each persona's square, as a share of the largest: the square's area grows with the gain."""
    if not best.gain:
        return np.ones(len(best.row))
    gain = np.clip(np.array(best.gain), 0, None)
    return np.asarray(0.35 + 0.65 * np.sqrt(np.clip(gain / max(1e-9, float(np.quantile(gain, 0.9))), 0, 1)))


def _draw(axes: Axes, comparison: Comparison, best: Best, strip: NDArray[np.int64], sides: Values, top: float) -> None:
    place = np.arange(len(strip))
    across, down = place % ACROSS + 0.5, top + place // ACROSS + 0.5
    rows = np.array(best.row, dtype=np.int64)[strip]
    strength = strengths(comparison, best)
    for row in dict.fromkeys(rows.tolist()):
        mine = rows == row
        axes.scatter(
            across[mine], down[mine], s=(0.88 * 72 * _SQUARE * sides[mine]) ** 2, marker="s", linewidths=0,
            clip_on=False, color=KIND_COLOURS[comparison.rows[row].kind], alpha=strength[comparison.rows[row].name],
        )  # fmt: skip


def training_figure(curves: Sequence[TrainingCurve], top: float, columns: int = 3) -> Figure:
    """Loss against the share of training done: mean over adapters, the middle 80 % of them, and validation.

    top: the loss that panels reach up to.
    """
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.5 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, curve in zip(panels, curves, strict=False):
        _curve(axes, curve)
        axes.set_ylim(0, 1.05 * top)
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    return figure


def highest_loss(curves: Sequence[TrainingCurve]) -> float:
    """The highest loss of several curves, so that panels drawn apart can be compared."""
    return max(_top(curve) for curve in curves)


def _top(curve: TrainingCurve) -> float:
    drawn = [curve.mean, curve.high, *([] if curve.validation is None else [curve.validation])]
    values = np.concatenate(drawn)
    known = values[np.isfinite(values)]
    return float(known.max()) if len(known) else 1.0


def _curve(axes: Axes, curve: TrainingCurve) -> None:
    share = 100 * curve.share
    axes.fill_between(share, curve.low, curve.high, color=KIND_COLOURS["recipe"], alpha=0.2, linewidth=0)
    axes.plot(share, curve.mean, color=KIND_COLOURS["recipe"], linewidth=1.8)
    if curve.validation is not None:
        axes.plot(share, curve.validation, color=KIND_COLOURS["control"], linewidth=1.8, linestyle=(0, (4, 2)))
    many = f"{curve.adapters:,} adapters" if curve.adapters > 1 else "1 adapter"
    few, most = curve.steps
    steps = f"{few:,}" if few == most else f"{few:,} to {most:,}"
    axes.set_title(NAMES.get(curve.grouping, short(curve.grouping)), fontsize=9.5)
    axes.set_xlabel(f"% of training ({many}, {steps} steps)", fontsize=8, color=MUTED)
    axes.set_ylabel("nats per token", fontsize=8, color=MUTED)
    axes.set_xlim(0, 100)
    bare(axes)
