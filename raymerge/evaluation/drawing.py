"""How a figure looks and how it becomes bytes: PNG for a folder, SVG for the page. Same figure, same bytes.

Colours are Okabe and Ito's, told apart by colour-blind readers too; every kind of row also has its own mark. In SVG
each colour becomes a CSS variable, so that the page's light and dark theme applies to its figures.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from raymerge.evaluation.scores import Kind

INK, MUTED, LINE, PAPER = "#1b1f24", "#5c6670", "#d5dae0", "#ffffff"
KIND_COLOURS: dict[Kind, str] = {
    "recipe": "#0072b2",
    "reference": "#4d4d4d",
    "baseline": "#997700",
    "control": "#d55e00",
    "ceiling": "#009e73",
    "external": "#aa4499",
}
KIND_MARKERS: dict[Kind, str] = {
    "recipe": "o", "reference": "D", "baseline": "v", "control": "s", "ceiling": "^", "external": "P",
}  # fmt: skip
KIND_SIGNS: dict[Kind, str] = {
    "recipe": "●", "reference": "◆", "baseline": "▼", "control": "■", "ceiling": "▲", "external": "✚",
}  # fmt: skip
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "card"} | {c: k for k, c in KIND_COLOURS.items()}

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # a persona may be called $x
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.unicode_minus": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "figure.facecolor": PAPER,
    "figure.dpi": 100,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "raymerge",
}


@contextmanager
def styled() -> Iterator[None]:
    """All figures are made and written inside this: our style alone, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box stands for it
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def png(figure: Figure) -> bytes:
    """The figure as PNG at 150 dots per inch, without date or version."""
    FigureCanvasAgg(figure)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=150, metadata={"Software": None})
    return target.getvalue()


def svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element for a page: no header, no metadata, colours as CSS variables.

    label: what a screen reader says of it; plain text.
    """
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(target.getvalue(), label)


def bare(axes: Axes, *sides: str) -> None:
    """Take away an axis' line on the named sides, and the tick marks of all."""
    for side in sides:
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def _for_page(text: str, label: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
    attributes = f'viewBox="0 0 {width} {height}" style="aspect-ratio:{width}/{height}" role="img"'
    text = re.sub(
        r"<svg[^>]*>",
        f'<svg {attributes} aria-label="{_attribute(label)}">',
        text,
        count=1,
    )
    text = text.replace("xlink:href", "href")
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to them, and several figures would repeat them
    text = re.sub(r"font: (?:(bold|\d+) )?([\d.]+)px [^;\"]+", _font, text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _font(found: re.Match[str]) -> str:
    weight = f"font-weight: {found[1]}; " if found[1] else ""
    return f"{weight}font-size: {found[2]}px"


def _attribute(text: str) -> str:
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(character, entity)
    return text
