"""The figures of the report. Each function takes a comparison and returns a figure; drawing.py makes bytes of it.

All are to be called, and their figures written, inside `drawing.styled()`.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from raymerge.evaluation.comparison import Comparison
from raymerge.evaluation.drawing import INK, KIND_COLOURS, KIND_MARKERS, LINE, MUTED, PAPER, bare
from raymerge.evaluation.exhibits import RoutingMap
from raymerge.evaluation.rows import REGRESSION, Row
from raymerge.evaluation.wording import duration, short

POINTS = 400  # personas drawn in a scatter panel; an even choice of the sorted names where there are more
CLUSTERS = 12  # clusters drawn as boxes: the largest ones
TIME_TICKS = [0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 10800, 36000, 86400, 259200, 864000]  # seconds
BLUE = (0.0, 0.447, 0.698)


def similarity_figure(comparison: Comparison) -> Figure:
    """Mean similarity of every row with its bootstrap interval, best first, the reference as a line."""
    rows = comparison.rows
    figure = Figure(figsize=(7.6, 0.9 + 0.29 * len(rows)), layout="constrained")
    axes = figure.subplots()
    if comparison.reference:
        place = comparison.row(comparison.reference)
        axes.axvline(rows[place].similarity, color=KIND_COLOURS["reference"], linewidth=1, linestyle=(0, (4, 3)))
    for height, row in enumerate(rows):
        colour = KIND_COLOURS[row.kind]
        if np.isfinite(row.low):
            axes.plot([row.low, row.high], [height, height], color=colour, linewidth=2.4, solid_capstyle="round")
        axes.plot(row.similarity, height, KIND_MARKERS[row.kind], color=colour, markersize=7, markeredgecolor=PAPER)
        edge = row.high if np.isfinite(row.high) else row.similarity
        axes.annotate(
            f"{row.similarity:.1f}", (edge, height), (7, 0), textcoords="offset points", va="center", color=colour,
            fontsize=8.5,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [short(row.name) for row in rows], color=INK, fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.09)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("similarity × 100, mean over personas, 95 % interval")
    bare(axes, "left")
    return figure


def scatter_panels(comparison: Comparison) -> list[Row]:
    """The rows that have a scatter panel: at most twelve, best first, without the reference."""
    return [row for row in comparison.rows if row.name != comparison.reference][:12]


def scatter_figure(comparison: Comparison, rows: Sequence[Row], columns: int = 4) -> Figure:
    """Each persona's similarity in some rows against the reference: above the diagonal it gained."""
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(2.45 * columns, 2.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, row in zip(panels, rows, strict=False):
        _scatter(axes, comparison, row)
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    return figure


def _scatter(axes: Axes, comparison: Comparison, row: Row) -> None:
    assert comparison.reference
    personas = _even_choice(len(comparison.personas), POINTS)
    reference = comparison.scores[comparison.row(comparison.reference), personas]
    mine = comparison.scores[comparison.row(row.name), personas]
    fallen = mine - reference < -REGRESSION
    low = np.floor(comparison.scores.min() / 10) * 10
    high = max(low + 10, np.ceil(comparison.scores.max() / 10) * 10)  # all scores may be one and the same
    axes.plot([low, high], [low, high], color=MUTED, linewidth=0.9)
    axes.plot([low + REGRESSION, high], [low, high - REGRESSION], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
    colour = KIND_COLOURS[row.kind]
    axes.scatter(reference[~fallen], mine[~fallen], s=11, color=colour, alpha=0.55, linewidths=0)
    axes.scatter(reference[fallen], mine[fallen], s=20, marker="x", color=INK, linewidths=0.9)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set_title(short(row.name), fontsize=9.5, color=colour)
    axes.set_xlabel(short(comparison.reference), fontsize=8)
    axes.locator_params(nbins=5)
    bare(axes)


def box_rows(comparison: Comparison) -> list[Row]:
    """The rows whose clusters are drawn: the verdict's own recipe, others up to five without controls and
    ceilings, and the best control."""
    others = [row for row in comparison.rows if row.name != comparison.reference and row.kind != "ceiling"]
    controls = [row for row in others if row.kind == "control"][:1]
    best = [row for row in others if row.kind != "control"]
    own = [row for row in best[5:] if row.name == comparison.verdict.row]
    return best[: 5 - len(own)] + own + controls


def box_figure(comparison: Comparison, rows: Sequence[Row], columns: int = 3) -> Figure:
    """Differences of personas to the reference, a box per cluster: quartiles, median, and 5th to 95th percentile."""
    lines = -(-len(rows) // columns)
    names = largest_clusters(comparison)
    figure = Figure(figsize=(3.3 * columns, (0.95 + 0.27 * len(names)) * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes, row in zip(panels.ravel(), rows, strict=False):
        _boxes(axes, comparison, row, names)
    for axes in panels.ravel()[len(rows) :]:
        axes.set_visible(False)
    return figure


def _boxes(axes: Axes, comparison: Comparison, row: Row, names: Sequence[str]) -> None:
    assert comparison.reference
    assert comparison.clusters
    difference = comparison.scores[comparison.row(row.name)] - comparison.scores[comparison.row(comparison.reference)]
    labels = np.array(comparison.clusters, dtype=object)
    colour = KIND_COLOURS[row.kind]
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.boxplot(
        [difference[labels == name] for name in names], orientation="horizontal", widths=0.58, whis=(5, 95),
        showfliers=False, patch_artist=True, boxprops={"facecolor": colour, "alpha": 0.35, "edgecolor": "none"},
        whiskerprops={"color": colour, "linewidth": 1.2}, capprops={"visible": False},
        medianprops={"color": colour, "linewidth": 2.2},
    )  # fmt: skip
    counts = [int((labels == name).sum()) for name in names]
    ticks = [f"{short(name, 14)} ({count})" for name, count in zip(names, counts, strict=True)]
    axes.set_yticks(range(1, len(names) + 1), ticks, color=INK)
    axes.set_ylim(len(names) + 0.6, 0.4)
    axes.set_xlim(*_box_range(comparison, names))
    axes.grid(visible=False, axis="y")
    axes.set_title(short(row.name), fontsize=9.5, color=colour)
    axes.set_xlabel(f"points over {short(comparison.reference)}", fontsize=8)
    bare(axes, "left")


def _box_range(comparison: Comparison, names: Sequence[str]) -> tuple[float, float]:
    """Range of all whiskers of all panels, so that panels drawn apart can be compared."""
    labels = np.array(comparison.clusters, dtype=object)
    reference = comparison.scores[comparison.row(comparison.reference or "")]
    shown = [comparison.scores[comparison.row(row.name)] - reference for row in box_rows(comparison)]
    ends = [float(np.quantile(d[labels == name], q)) for d in shown for name in names for q in (0.05, 0.95)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    return low - 0.04 * (high - low) - 0.1, high + 0.04 * (high - low) + 0.1


def largest_clusters(comparison: Comparison) -> list[str]:
    """Labels of the clusters that are drawn: the largest ones, in the order of their names."""
    labels, counts = np.unique(np.array(comparison.clusters or (), dtype=object).astype(str), return_counts=True)
    return sorted(str(labels[i]) for i in np.argsort(-counts, kind="stable")[:CLUSTERS])


def routing_figure(maps: Sequence[RoutingMap], columns: int = 2) -> Figure:
    """Who contributes to whom: personas down, experts across, both by cluster; darker is more weight."""
    lines = -(-len(maps) // columns)
    figure = Figure(figsize=(4.7 * columns, 4.25 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, shown in zip(panels, maps, strict=False):
        _heat_map(axes, shown)
    for axes in panels[len(maps) :]:
        axes.set_visible(False)
    return figure


def _heat_map(axes: Axes, shown: RoutingMap) -> None:
    strength = np.abs(shown.weights)
    top = np.quantile(strength[strength > 0], 0.98) if (strength > 0).any() else 1.0
    image = np.empty((*strength.shape, 4))
    image[..., :3] = BLUE
    image[..., 3] = np.sqrt(np.clip(strength / top, 0, 1))  # the root keeps small weights in sight
    axes.imshow(image, interpolation="none", extent=(0, 1, 1, 0), aspect="equal")
    for _, _, end in shown.bounds[:-1] if len(shown.bounds) <= CLUSTERS else ():
        axes.axvline(end, color=LINE, linewidth=0.8)
        axes.axhline(end, color=LINE, linewidth=0.8)
    named = shown.bounds if len(shown.bounds) <= CLUSTERS else ()
    axes.set_yticks([(begin + end) / 2 for _, begin, end in named], [short(label, 12) for label, _, _ in named])
    axes.set_xticks([])
    axes.set(xlabel="experts", ylabel="personas")
    axes.grid(visible=False)
    axes.set_title(short(shown.run, 30), fontsize=9.5)
    for spine in axes.spines.values():
        spine.set_visible(True)
    bare(axes)


def cost_figure(comparison: Comparison) -> Figure | None:
    """Similarity against the seconds a row took, training of its experts included; rows of which a
    part of the time is not known are left out; None where all are."""
    timed = [(row, seconds) for row in comparison.rows if (seconds := row.costs.seconds)]
    if not timed:
        return None
    figure = Figure(figsize=(7.6, max(4.2, 1.0 + 0.17 * len(timed))), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    for row, seconds in timed:
        colour = KIND_COLOURS[row.kind]
        axes.plot(seconds, row.similarity, KIND_MARKERS[row.kind], color=colour, markersize=7, markeredgecolor=PAPER)
    low, high = min(s for _, s in timed), max(s for _, s in timed)
    span = max(high / low, 4.0)
    axes.set_xlim(low / 1.15, high * span**0.5)  # room for the names at the right
    ticks = [t for t in TIME_TICKS if low / 1.25 <= t <= high * 1.3]
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [duration(t) for t in ticks])
    axes.set_xlabel("time of training, merging and evaluating")
    axes.set_ylabel("similarity × 100")
    axes.margins(y=0.08)
    bare(axes)
    _name_points(axes, timed, high * span**0.08)
    return figure


def _name_points(axes: Axes, timed: Sequence[tuple[Row, float]], across: float) -> None:
    """Names in a column at the right, in the order of their points and apart, each with a line to its point."""
    ordered = sorted(timed, key=lambda pair: -pair[0].similarity)
    low, high = axes.get_ylim()
    line = (high - low) / max(22.0, len(ordered) + 1.0)  # height of a label in points of similarity
    heights = _apart([row.similarity for row, _ in ordered], line, low + line / 2)
    for (row, seconds), height in zip(ordered, heights, strict=True):
        axes.annotate(
            short(row.name), (seconds, row.similarity), (across, height), color=KIND_COLOURS[row.kind], va="center",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": LINE, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip


def _apart(heights: Sequence[float], least: float, floor: float) -> list[float]:
    """Falling heights moved down, and up again from the floor, until they are at least so far apart."""
    found: list[float] = []
    for height in heights:
        found.append(min(height, found[-1] - least) if found else height)
    for place in range(len(found) - 1, -1, -1):
        lowest = floor if place == len(found) - 1 else found[place + 1] + least
        if found[place] >= lowest:
            break
        found[place] = lowest
    return found


def _even_choice(count: int, most: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(np.int64)
