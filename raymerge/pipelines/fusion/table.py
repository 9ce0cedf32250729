"""A fuse, or a sweep of them, in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raymerge.evaluation.wording import UNKNOWN, number, printable, short, size
from raymerge.pipelines.fusion.figures import Fused
from raymerge.pipelines.fusion.report import error_in_words, headline, joined, pairs, span_in_words, weight_in_words
from raymerge.storage import name_of

_ROWS = 24  # inputs shown
_WIDTH = 7  # of a name above a column
_COSINES = 3  # inputs up to which a sweep shows every cosine


def one(fused: Fused) -> RenderableType:
    """What `raymerge fuse` prints of one adapter: inputs, result, warnings, notes."""
    figures = fused.figures
    bases = {expert.base_model for expert in fused.experts}
    table = _table(["adapter", *(["base"] if len(bases) > 1 else []), "rank", "norm", "weight", "cosine"])
    for expert in fused.experts[:_ROWS]:
        base = [_name(name_of(expert.base_model or UNKNOWN), 16)] if len(bases) > 1 else []
        table.add_row(
            _name(expert.name, 18 if base else 26), *base, span_in_words(expert.rank), f"{expert.norm:.4g}",
            weight_in_words(expert.weight), number(expert.cosine, 3),
        )  # fmt: skip
    if len(fused.experts) > _ROWS:
        table.add_row(Text(f"and {len(fused.experts) - _ROWS} more", style="dim"))
    result = ["result", *([""] if len(bases) > 1 else []), span_in_words(figures.rank), f"{figures.norm:.4g}"]
    table.add_row(*(Text(cell, style="bold") for cell in result))
    facts = [f"Relative error {error_in_words(figures.error)}", size(figures.size)]
    if figures.ratio is not None:
        facts.insert(1, f"norm {figures.ratio:.2f} of the inputs' weighted norms")
    named = [Text(f"base model {printable(base)}", style="dim") for base in bases if base and len(bases) == 1]
    return Group(
        Text(headline(fused), style="bold"),
        *named,
        Text(),
        table,
        Text(f"\n{', '.join(facts)}."),
        *_between(fused),
        *_said(fused),
    )


def sweep(found: Sequence[Fused]) -> RenderableType:
    """What `raymerge fuse --sweep` prints: one line for each result."""
    experts = found[0].experts
    every = len(experts) <= _COSINES
    cosines = _columns([e.name for e in experts]) if every else ["least"]
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("\nfuse", no_wrap=True, overflow="ellipsis", max_width=16)
    for header in ("\nnorm", "\nratio", "\nerror", "\nrank", "\nsize", *(f"cosine\n{name}" for name in cosines)):
        table.add_column(header, justify="right", no_wrap=True)
    for fused in found:
        figures = fused.figures
        there = [expert.cosine for expert in fused.experts]
        known = [cosine for cosine in there if cosine is not None]
        shown = [number(cosine, 3) for cosine in there] if every else [number(min(known, default=None), 3)]
        table.add_row(
            _name(fused.name, 16), f"{figures.norm:.3g}", number(figures.ratio, 2), error_in_words(figures.error),
            span_in_words(figures.rank), size(figures.size), *shown,
        )  # fmt: skip
    legend = "ratio: norm over the inputs' weighted norms; error: what rank and rounding lose"
    if "#1" in cosines:
        numbered = ", ".join(f"#{i} {printable(expert.name)}" for i, expert in enumerate(experts, 1))
        legend += f"\n{numbered}"
    parts: list[RenderableType] = [table, Text(legend, style="dim"), Text()]
    warned = [fused.name for fused in found if fused.warnings]
    if warned:
        parts.append(Text(f"warning: the report warns of {printable(joined(warned))}.", style="yellow"))
    return Group(*parts)


def _table(headers: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    named = 18 if "base" in headers else 26
    for header, width in (("adapter", named), ("base", 16), ("rank", 9), ("norm", 9), ("weight", 13), ("cosine", 6)):
        if header in headers:
            left = header in ("adapter", "base")
            table.add_column(
                header, justify="left" if left else "right", no_wrap=True, overflow="ellipsis", max_width=width
            )
    return table


def _columns(names: Sequence[str]) -> list[str]:
    """Names of at most seven columns that tell inputs apart: their beginnings, else their ends, else numbers."""
    for side in (_beginning, _end):
        found = [side(printable(name)) for name in names]
        if len(set(found)) == len(names):
            return found
    return [f"#{i}" for i in range(1, len(names) + 1)]


def _beginning(name: str) -> str:
    text = Text(name)
    text.truncate(_WIDTH, overflow="ellipsis")
    return text.plain


def _end(name: str) -> str:
    if cell_len(name) <= _WIDTH:
        return name
    while cell_len(name) >= _WIDTH:
        name = name[1:]
    return f"…{name}"


def _between(fused: Fused) -> list[RenderableType]:
    found = pairs(fused)
    if not found:
        return []
    if len(found) == 1:
        return [Text(f"The inputs' cosine is {found[0][0]:.3f}.")]
    mean = sum(cosine for cosine, _, _ in found) / len(found)
    return [Text(f"The inputs' cosines are {mean:.3f} in the mean, {found[0][0]:.3f} to {found[-1][0]:.3f}.")]


def _said(fused: Fused) -> list[RenderableType]:
    return [
        *(Text(f"warning: {printable(warning)}", style="yellow") for warning in fused.warnings),
        *(Text(f"note: {printable(note)}", style="dim") for note in fused.notes),
    ]


def _name(text: str, length: int = 26) -> Text:
    return Text(short(text, length))
