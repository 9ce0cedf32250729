"""The comparison in a terminal of 80 columns."""

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raymerge.evaluation.comparison import Comparison
from raymerge.evaluation.drawing import KIND_SIGNS
from raymerge.evaluation.rows import Row
from raymerge.evaluation.wording import number, p_value, percent, printable, short, signed

STYLES = {"recipe": "bold blue", "reference": "default", "control": "yellow", "ceiling": "green", "external": "magenta"}
NOTES_SHOWN = 12


def terminal_table(comparison: Comparison) -> RenderableType:
    """What `raymerge compare` prints: smallest detectable difference, table, verdict, warnings. Fits 80 columns."""
    answered = f"{len(comparison.personas):,} personas, {comparison.examples:,} answers a row"
    if comparison.smallest_detectable is None:
        first = Text(answered + ".")
    else:
        points = Text(f"{comparison.smallest_detectable:.1f} points", style="bold")
        first = Text.assemble("Smallest difference this data can show: ", points, f" ({answered}).")
    parts: list[RenderableType] = [first, Text(), _table(comparison), _legend(comparison), Text()]
    parts.append(Text(printable(comparison.verdict.headline), style="bold"))
    parts += [Padding(Text(printable(detail), style="dim"), (0, 0, 0, 2)) for detail in comparison.verdict.details]
    parts += [Text(f"warning: {printable(warning)}", style="yellow") for warning in comparison.warnings]
    parts += [Text(f"note: {printable(note)}", style="dim") for note in comparison.notes[:NOTES_SHOWN]]
    if len(comparison.notes) > NOTES_SHOWN:
        parts.append(Text(f"and {len(comparison.notes) - NOTES_SHOWN} more notes in the report", style="dim"))
    return Group(*parts)


def _table(comparison: Comparison) -> Table:
    exact = any(row.exact for row in comparison.rows)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("row", no_wrap=True, overflow="ellipsis", max_width=20)
    headers = ["simil.", f"over {short(comparison.reference or 'reference', 12)}", "p", "better", "worse"]
    for header in [*headers, "chrF", "nll", *(["exact"] if exact else [])]:
        table.add_column(header, justify="right", no_wrap=True)
    for row in comparison.rows:
        table.add_row(*_cells(row, exact))
    return table


def _cells(row: Row, exact: bool) -> list[Text]:
    name = Text(f"{KIND_SIGNS[row.kind]} {short(row.name, 18)}", style=STYLES[row.kind])
    difference = row.difference
    if difference is None:
        compared = [Text(), Text(), Text(), Text()]
    else:
        interval = f" [{signed(difference.low)} {signed(difference.high)}]"
        sure = "bold" if difference.low > 0 or difference.high < 0 else ""
        compared = [
            Text.assemble((signed(difference.mean), sure), (interval, "dim")),
            Text(p_value(difference.p_holm)),
            Text(percent(difference.improved.observed).replace(" ", "")),
            Text(f"{difference.regressed.observed:.0f}"),
        ]
    last = [Text(number(row.exact))] if exact else []
    return [name, Text(number(row.similarity)), *compared, Text(number(row.chrf)), Text(number(row.nll, 2)), *last]


def _legend(comparison: Comparison) -> Text:
    kinds = list(dict.fromkeys(row.kind for row in comparison.rows))
    signs = "  ".join(f"{KIND_SIGNS[kind]} {kind}" for kind in kinds)
    return Text(
        f"{signs}\nsimil.: similarity x 100. [95 % interval]. p: sign-flip, Holm over the recipes.\n"
        "better: share of personas; worse: personas that fall by more than 10 points.",
        style="dim",
    )
