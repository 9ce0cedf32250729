"""The comparison in a terminal of 80 columns or more."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raymerge.evaluation.comparison import Comparison
from raymerge.evaluation.criteria import Criterion
from raymerge.evaluation.drawing import KIND_SIGNS
from raymerge.evaluation.router_panel import in_a_line as router_in_a_line
from raymerge.evaluation.router_weights import Learned
from raymerge.evaluation.rows import Row
from raymerge.evaluation.search_panel import Searched, in_a_line
from raymerge.evaluation.wording import number, p_value, percent, printable, short, signed, size

STYLES = {
    "recipe": "bold blue", "reference": "default", "baseline": "cyan", "control": "yellow", "ceiling": "green",
    "external": "magenta",
}  # fmt: skip
OUTCOMES = {"met": "bold green", "not met": "bold red", "cannot be told": "bold"}
NOTES_SHOWN = 12
WIDTH = 80  # the least that is laid out for
NAME = 18  # characters of a row's name
STAYS = 10  # the importance of a column that is never left out


def terminal_table(
    comparison: Comparison, width: int = WIDTH, searched: Searched | None = None, learned: Learned | None = None
) -> RenderableType:
    """What `raymerge compare` prints: criteria, smallest detectable difference, table, what to run next, verdict, the
    search and the learned router where there are any, warnings. Fits `width` columns, and 80 where there are fewer."""
    answered = f"{len(comparison.personas):,} personas, {comparison.examples:,} answers a row"
    if comparison.smallest_detectable is None:
        first = Text(answered + ".")
    else:
        points = Text(f"{comparison.smallest_detectable:.1f} points", style="bold")
        first = Text.assemble("Smallest difference this data can show: ", points, f" ({answered}).")
    columns = _fitting(_columns(comparison), comparison.rows, max(map(len, _names(comparison))), max(WIDTH, width))
    parts: list[RenderableType] = [_criteria(comparison), Text(), first, Text(), _table(comparison, columns)]
    parts += [_legend(comparison, {column.header for column in columns}), Text(), *_guide(comparison), Text()]
    parts.append(Text(printable(comparison.verdict.headline), style="bold"))
    parts += [Padding(Text(printable(detail), style="dim"), (0, 0, 0, 2)) for detail in comparison.verdict.details]
    if searched:
        parts.append(Text.assemble(("Search: ", "bold"), printable(in_a_line(searched, comparison.reference))))
    if learned:
        parts.append(Text.assemble(("Router: ", "bold"), printable(router_in_a_line(learned, comparison))))
    parts += [Text(f"warning: {printable(warning)}", style="yellow") for warning in comparison.warnings]
    parts += [Text(f"note: {printable(note)}", style="dim") for note in comparison.notes[:NOTES_SHOWN]]
    if len(comparison.notes) > NOTES_SHOWN:
        parts.append(Text(f"and {len(comparison.notes) - NOTES_SHOWN} more notes in the report", style="dim"))
    return Group(*parts)


def _criteria(comparison: Comparison) -> RenderableType:
    of = f"Asked of merging, reached by {short(comparison.verdict.row, 40)}:" if comparison.verdict.row else None
    lines = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    lines.add_column(no_wrap=True)
    lines.add_column()
    for criterion in comparison.criteria:
        lines.add_row(Text(criterion.outcome, style=OUTCOMES[criterion.outcome]), Text(_figures(criterion)))
    return Group(Text(of or "Asked of merging:"), lines)


def _figures(criterion: Criterion) -> str:
    return printable(
        f"{criterion.what}: {criterion.said}" + (f", asked {criterion.asked}" if criterion.value is not None else "")
    )


def _guide(comparison: Comparison) -> list[RenderableType]:
    said: list[RenderableType] = [Text.assemble(("What to run next. ", "bold"), printable(comparison.guide.in_hand))]
    for place, sentence in enumerate(comparison.guide.sentences, start=1):
        said.append(Padding(Text(f"{place}. {printable(sentence)}"), (0, 0, 0, 2)))
    if not comparison.guide.steps:
        said.append(Text("  Nothing that these rows know of would gain more."))
    return said


@dataclass(frozen=True)
class Column:
    """A column of the table. importance: the least important ones are left out where the table would be too wide."""

    header: str
    cell: Callable[[Row], Text]
    importance: int = STAYS

    @property
    def may_go(self) -> bool:
        """Whether it may be left out."""
        return self.importance < STAYS


def _columns(comparison: Comparison) -> list[Column]:
    columns = [Column("simil.", lambda row: Text(number(row.similarity)))]
    if comparison.reference:
        columns += [
            Column(f"over {short(comparison.reference, 12)}", _difference),
            Column("p", lambda row: Text(p_value(row.difference.p_holm) if row.difference else ""), 6),
            Column("better", lambda row: Text(_improved(row)), 9),
            Column("worse", lambda row: Text(f"{row.difference.regressed.observed:.0f}" if row.difference else ""), 9),
        ]
    if any(row.over_seeds for row in comparison.rows):
        columns.append(Column("seeds", _seeds, 8))
    columns += [
        Column("models", lambda row: Text("" if row.costs.adapters is None else f"{row.costs.adapters:,}"), 7),
        Column("memory", lambda row: Text("" if row.costs.bytes is None else _memory(row.costs.bytes)), 5),
        Column("tenth", lambda row: Text(number(row.worst_decile)), 3),
        Column("chrF", lambda row: Text(number(row.chrf)), 2),
        Column("nll", lambda row: Text(number(row.nll, 2)), 1),
    ]
    if any(row.exact for row in comparison.rows):
        columns.append(Column("exact", lambda row: Text(number(row.exact)), 4))
    return columns


def _names(comparison: Comparison) -> list[Text]:
    return [Text(f"{KIND_SIGNS[row.kind]} {short(row.name, NAME)}", style=STYLES[row.kind]) for row in comparison.rows]


def _table(comparison: Comparison, columns: Sequence[Column]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("row", no_wrap=True)
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    for name, row in zip(_names(comparison), comparison.rows, strict=True):
        table.add_row(name, *(column.cell(row) for column in columns))
    return table


def _fitting(columns: Sequence[Column], rows: Sequence[Row], taken: int, width: int) -> list[Column]:
    """The columns that fit beside names of `taken` characters, in their order, the most important ones first served."""
    widths = [max(len(column.header), *(len(column.cell(row)) for row in rows)) + 1 for column in columns]
    kept: list[int] = []
    for i in sorted(range(len(columns)), key=lambda i: -columns[i].importance):
        if taken + widths[i] <= width or not columns[i].may_go:
            kept.append(i)
            taken += widths[i]
    return [columns[i] for i in sorted(kept)]


def _difference(row: Row) -> Text:
    if row.difference is None:
        return Text()
    low, high = row.difference.low, row.difference.high
    sure = "bold" if low > 0 or high < 0 else ""
    return Text.assemble((signed(row.difference.mean), sure), (f" [{signed(low)} {signed(high)}]", "dim"))


def _improved(row: Row) -> str:
    return percent(row.difference.improved.observed).replace(" ", "") if row.difference else ""


def _seeds(row: Row) -> Text:
    spread = row.over_seeds
    if spread is None:
        return Text()
    return Text(f"±{number(spread.similarity_sd if spread.difference_sd is None else spread.difference_sd)}")


def _memory(count: int) -> str:
    return "0" if count == 0 else size(count)


def _legend(comparison: Comparison, shown: Collection[str]) -> Text:
    """The signs, and the columns that are shown."""
    kinds = list(dict.fromkeys(row.kind for row in comparison.rows))
    signs = "  ".join(f"{KIND_SIGNS[kind]} {kind}" for kind in kinds)
    seeds = max((row.over_seeds.seeds for row in comparison.rows if row.over_seeds), default=0)
    served = ", ".join(name for name in ("models", "memory") if name in shown)
    said = {
        "simil.": "simil.: similarity x 100. [95 % interval].",
        "p": "p: sign-flip, Holm over the recipes.",
        "better": "better: share of personas.",
        "worse": "worse: personas that fall by more than 10 points.",
        "seeds": f"seeds: ± sd over {seeds} training seeds.",
        "models": f"{served}: adapters to serve.",
        "tenth": "tenth: simil. of the worst tenth of personas.",
        "nll": "nll: nats per token of the reference.",
    }
    return Text(f"{signs}\n" + " ".join(words for name, words in said.items() if name in shown), style="dim")
