"""What `raymerge inspect` prints, in a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raymerge.evaluation.similarity_map import brief
from raymerge.evaluation.wording import UNKNOWN, printable, short, size
from raymerge.pipelines.inspection.adapter import Inspected
from raymerge.pipelines.inspection.groups import Group
from raymerge.pipelines.inspection.similarity import FEW, Similarity
from raymerge.storage import name_of

_LISTED = 8  # names in a line of prose
_PAIRS = 8  # nearest pairs shown
_FORMATS = {"peft": "PEFT", "mlx": "MLX"}


def overview(adapters: Sequence[Inspected], groups: Sequence[Group], warnings: Sequence[str]) -> RenderableType:
    """The table, what is unusual, what cannot be read, and what merges with what."""
    readable = [one for one in adapters if one.error is None]
    broken = [one for one in adapters if one.error is not None]
    parts: list[RenderableType] = [_table(readable)] if readable else []
    parts += _unusual(readable)
    if broken:
        parts += [Text(f"\nCannot be read ({len(broken)})", style="bold red")]
        parts += [_indented(f"{one.name}: {one.reason}") for one in broken]
    if readable:
        parts += [Text(), *_merging(groups)]
    parts += [Text(f"warning: {printable(warning)}", style="yellow") for warning in warnings]
    return Lines(*parts)


def _table(adapters: Sequence[Inspected]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("adapter", no_wrap=True, overflow="ellipsis", max_width=22)
    table.add_column("form", no_wrap=True)
    table.add_column("base", no_wrap=True, overflow="ellipsis", max_width=14)
    for header in ("rank", "alpha", "mod.", "dtype", "size", "norm"):
        table.add_column(header, justify="right", no_wrap=True)
    for one in adapters:
        base = name_of(one.base_model or UNKNOWN)
        table.add_row(
            Text(short(one.name, 22)), _FORMATS.get(one.format or "", UNKNOWN), Text(short(base, 14)),
            _span(one.ranks), _span(one.alphas), str(len(one.headers or {})),
            one.dtypes[0] if len(one.dtypes) == 1 else "mixed", size(one.nbytes).replace("bytes", "B"),
            _rounded(one.norm),
        )  # fmt: skip
    return table


def _rounded(norm: float | None) -> str:
    return UNKNOWN if norm is None else f"{norm:#.3g}".removesuffix(".")


def _span(values: Sequence[float]) -> str:
    if not values:
        return UNKNOWN
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g}–{values[-1]:g}"


def _unusual(adapters: Sequence[Inspected]) -> list[RenderableType]:
    """Each remark once, with those it holds of."""
    found: dict[str, list[str]] = {}
    for one in adapters:
        for remark in one.remarks:
            found.setdefault(remark, []).append(one.name)
    if not found:
        return []
    every = len(adapters) > 1
    lines = [
        f"{remark}: {'all' if every and len(names) == len(adapters) else _listed(names)}"
        for remark, names in found.items()
    ]
    return [Text("\nUnusual", style="bold"), *map(_indented, lines)]


def _merging(groups: Sequence[Group]) -> list[RenderableType]:
    if len(groups) == 1:
        count = len(groups[0].names)
        text = f"All {count} merge together." if count > 1 else "There is one adapter to merge."
        return [Text(text), *_strangers(groups[0])]
    parts: list[RenderableType] = [Text("Merge together", style="bold")]
    for number, group in enumerate(groups, 1):
        parts.append(_indented(f"group {number} ({len(group.names)}): {_listed(group.names)}"))
        parts += [_indented(why, 4, "dim") for why in dict.fromkeys(filter(None, group.apart))]
        strangers = [str(other) for other, why in enumerate(group.apart, 1) if not why]
        if strangers:
            plural = "s" * (len(strangers) > 1)
            parts.append(_indented(f"shares no module with group{plural} {', '.join(strangers)}", 4, "dim"))
        parts += _strangers(group, 4)
    return parts


def _strangers(group: Group, columns: int = 2) -> list[RenderableType]:
    """Pairs of a group that share nothing by themselves."""
    text = "share no module and do not merge alone"
    shown = [_indented(f"{_listed(a)} | {_listed(b)}: {text}", columns, "dim") for a, b in group.strangers[:_LISTED]]
    more = len(group.strangers) - _LISTED
    return shown + ([_indented(f"and {more:,} more such pairs", columns, "dim")] if more > 0 else [])


def similarity_lines(similarity: Similarity) -> RenderableType:
    """The matrix where it fits, else what stands out in it."""
    parts: list[RenderableType] = [Text("\nCosine of deltas", style="bold")]
    parts += [_matrix(similarity)] if len(similarity.names) <= FEW else []
    values = similarity.values()
    if len(values) == 1:
        parts.append(_indented(f"1 pair: {values[0]:.3f}"))
    elif len(values):
        span = f"from {values.min():.3f} to {values.max():.3f}"
        parts.append(_indented(f"{len(values):,} pairs: mean {values.mean():.3f}, {span}"))
    if len(similarity.names) > FEW and len(values):
        shown = similarity.nearest(_PAIRS)
        parts += [_indented("nearest:"), *(_indented(f"  {c:.3f}  {_pair(a, b)}") for c, a, b in shown)]
    if similarity.left_out:
        parts.append(Text(f"left out, since their deltas need --base: {_listed(similarity.left_out)}", style="dim"))
    return Lines(*parts)


def _matrix(similarity: Similarity) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", justify="right", style="dim")
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=22 if len(similarity.names) <= 10 else 14)
    for number in range(1, len(similarity.names)):
        table.add_column(str(number), justify="right", no_wrap=True, min_width=4)
    for row, name in enumerate(similarity.names):
        values = similarity.cosines[row, :row].tolist()
        cells = [UNKNOWN if math.isnan(value) else brief(value) for value in values]
        table.add_row(str(row + 1), Text(printable(name)), *cells)
    return table


def _pair(first: str, second: str) -> str:
    return f"{short(first, 30)}, {short(second, 30)}"


def _indented(text: str, columns: int = 2, style: str = "") -> RenderableType:
    return Padding(Text(printable(text), style=style), (0, 0, 0, columns), expand=False)


def _listed(names: Iterable[str]) -> str:
    shown = [short(name, 30) for name in names]
    more = len(shown) - _LISTED
    return ", ".join(shown[:_LISTED]) + (f" and {more:,} more" if more > 0 else "")
