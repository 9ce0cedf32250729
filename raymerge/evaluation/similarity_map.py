"""The heat map of a matrix of cosines. To be called, and the figure written, inside `drawing.styled()`."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from raymerge.evaluation.drawing import INK, KIND_COLOURS, LINE, PAPER, bare
from raymerge.evaluation.wording import short

NAMED = 60  # rows up to which each has its name
WRITTEN = 14  # rows up to which each cell has its number
_SMALLEST = 0.1  # the least that full colour stands for, so that noise does not look like structure


def similarity_map(names: Sequence[str], cosines: NDArray[np.float64]) -> Figure:
    """Cosines as colours: blue is alike, orange opposed, grey unknown (NaN). Full colour is the largest value off the
    diagonal, so that weak likeness is seen too."""
    count = len(names)
    others = np.abs(cosines[~np.eye(count, dtype=bool)])
    others = others[np.isfinite(others)]
    limit = min(1.0, max(_SMALLEST, float(others.max()) if others.size else 1.0))
    colours = LinearSegmentedColormap.from_list(
        "cosine", [KIND_COLOURS["control"], PAPER, KIND_COLOURS["recipe"]]
    ).with_extremes(bad=LINE)
    side = float(np.clip(0.34 * count, 3.4, 8.4)) if count <= NAMED else 8.4
    figure = Figure(figsize=(side + 2.4, side + 1.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(cosines), cmap=colours, vmin=-limit, vmax=limit, interpolation="none")
    axes.grid(visible=False)
    if count <= NAMED:
        size = 8.5 if count <= 30 else 6
        labels = [short(name) for name in names]
        axes.set_yticks(range(count), labels, color=INK, fontsize=size)
        axes.set_xticks(range(count), labels, color=INK, fontsize=size, rotation=90)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set(xlabel=f"{count} adapters, similar ones side by side")
    if count <= WRITTEN:
        _write(axes, cosines, limit)
    axes.set_title("Cosine of deltas")
    bare(axes, "left", "bottom")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=24)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    return figure


def _write(axes: object, cosines: NDArray[np.float64], limit: float) -> None:
    for (row, column), value in np.ndenumerate(cosines):
        if np.isfinite(value):
            ink = PAPER if abs(value) > 0.62 * limit else INK
            axes.text(column, row, brief(float(value)), ha="center", va="center", color=ink, fontsize=8)  # type: ignore[attr-defined]


def brief(value: float) -> str:
    """A cosine in at most four characters: `.84`, `−.03`, `1`."""
    text = f"{value:.2f}"
    text = text.removeprefix("-") if float(text) == 0 else text
    return "1" if text == "1.00" else "−1" if text == "-1.00" else text.replace("0.", ".", 1).replace("-", "−")
