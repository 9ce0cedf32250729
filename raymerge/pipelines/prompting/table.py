"""Answers side by side, and scores by capability, in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raymerge.evaluation.capabilities import Kept, Respondent, Scores
from raymerge.evaluation.wording import UNKNOWN, cut, number, percent, printable, short
from raymerge.pipelines.prompting.answers import Answers

SHOWN = 8  # prompts shown before their scores; all of them where there are none
_NAME = 18  # widest name of a respondent
_COLUMN = 14  # widest name of a capability
_PROMPT = 600  # characters shown of a prompt
_TITLES = {
    "similarity": ("similarity of answer and reference, x 100", 100, 1),
    "chrf": ("chrF of answer and reference", 1, 1),
    "nll": ("nll of the reference, nats per token: lower is better", 1, 2),
}
_SHORT = {"similarity": "simil.", "chrf": "chrF", "nll": "nll"}
_STYLES = {"base": "dim", "expert": "default", "fused": "bold blue"}


def answers_and_scores(found: Answers, width: int) -> RenderableType:
    """What `raymerge prompt` prints. width: of the terminal, in columns."""
    shown = len(found.prompts) if found.scores is None else min(SHOWN, len(found.prompts))
    parts: list[RenderableType] = []
    for index in range(shown):
        parts += [*_one_prompt(found, index), Text()]
    if shown < len(found.prompts):
        more = len(found.prompts) - shown
        text = f"and {more} more prompt{'s' * (more > 1)}: --json or --out has all"
        parts += [Text(text, style="dim"), Text()]
    if found.scores is not None:
        for metric in found.scores.values:
            parts += [*_matrices(found.scores, metric, width), Text()]
        if found.kept:
            parts += [*_kept(found.kept), Text()]
    parts += [Text(f"note: {printable(note)}", style="dim") for note in found.notes]
    return Group(*parts) if found.notes else Group(*parts[:-1])


def _one_prompt(found: Answers, index: int) -> Iterator[RenderableType]:
    asked = found.prompts[index]
    whose = f" ({printable(asked.capability)})" if asked.capability else ""
    yield Text(f"prompt {index + 1} of {len(found.prompts)}{whose}", style="bold")
    yield Padding(_lines(cut(asked.text, _PROMPT), "italic"), (0, 0, 0, 2), expand=False)
    figures = found.figures(index)
    metric = next(iter(found.scores.values)) if found.scores is not None else ""
    longest = max([*(len(printable(r.name)) for r in found.respondents), len("reference") if figures else 0])
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", show_header=bool(figures))
    table.add_column("", no_wrap=True, overflow="ellipsis", width=min(longest, _NAME))
    if figures:
        table.add_column(_SHORT[metric], justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    if figures:
        table.add_row(Text("reference", style="dim"), "", _lines(asked.reference or "", "dim"))
    for respondent in found.respondents:
        text = found.answers[respondent.name][index]
        shown: list[RenderableType] = [_lines(text) if text else Text("(nothing)", style="dim")]
        if figures:
            shown.insert(0, _figure(figures[respondent.name][metric], metric))
        table.add_row(_name(respondent), *shown)
    yield table


def _matrices(scores: Scores, metric: str, width: int) -> Iterator[RenderableType]:
    """Respondents x capabilities, cut into tables that fit the width."""
    means = scores.means(metric)
    yield Text(_TITLES[metric][0], style="bold")
    for columns in _blocks(list(scores.prompts), width):
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("", no_wrap=True, overflow="ellipsis", max_width=_NAME)
        for name in columns:
            table.add_column(
                Text(short(name, _COLUMN)), justify="right", no_wrap=True, overflow="ellipsis", max_width=_COLUMN
            )
        table.add_row(
            Text("prompts", style="dim"), *(Text(f"{scores.prompts[name]:,}", style="dim") for name in columns)
        )
        for respondent in scores.respondents:
            table.add_row(
                _name(respondent),
                *(
                    _figure(means[respondent.name][name], metric, "bold" if name == respondent.name else "")
                    for name in columns
                ),
            )
        yield table


def _blocks(names: Sequence[str], width: int) -> Iterator[list[str]]:
    """Names of columns, as many at once as fit beside the widest name of a row."""
    block: list[str] = []
    used = _NAME + 2
    for name in names:
        needed = max(min(len(printable(name)), _COLUMN), 6) + 2
        if block and used + needed > width:
            yield block
            block, used = [], _NAME + 2
        block.append(name)
        used += needed
    yield block


def _kept(kept: Sequence[Kept]) -> Iterator[RenderableType]:
    """What a merge keeps, one line for each merge and expert; figures of the first metric, shares of all."""
    metrics = list(dict.fromkeys(one.metric for one in kept))
    first = metrics[0]
    yield Text("what a merge keeps of each expert, on the expert's own prompts", style="bold")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("merge", no_wrap=True, overflow="ellipsis", max_width=_COLUMN)
    table.add_column("expert", no_wrap=True, overflow="ellipsis", max_width=_COLUMN)
    for header in ("base", "before", "after", *(f"{_SHORT[metric]} kept" for metric in metrics)):
        table.add_column(header, justify="right", no_wrap=header in ("base", "before", "after"))
    found = {(one.merge, one.expert, one.metric): one for one in kept}
    for merge, expert in dict.fromkeys((one.merge, one.expert) for one in kept):
        own = [found[merge, expert, metric] for metric in metrics]
        figures = [_figure(value, first) for value in (own[0].base, own[0].before, own[0].after)]
        table.add_row(Text(printable(merge)), Text(printable(expert)), *figures, *(_share(one) for one in own))
    yield table
    meanings = [
        f"{_SHORT[first]} before: of the expert; after: of the merge.",
        "kept: (after - base) / (before - base).",
        *([f"{UNKNOWN}: the expert is not better than the base."] if any(one.share is None for one in kept) else []),
        *(
            ["?: the expert's lead over the base is within chance for so few prompts."]
            if any(one.share is not None and not one.certain for one in kept)
            else []
        ),
    ]
    yield Text("\n".join(meanings), style="dim")


def _share(one: Kept) -> Text:
    return Text(percent(one.share) + ("?" if one.share is not None and not one.certain else ""))


def _figure(value: float, metric: str, style: str = "") -> Text:
    _, factor, digits = _TITLES[metric]
    return Text(number(factor * value, digits), style=style)


def _name(respondent: Respondent) -> Text:
    return Text(short(respondent.name, _NAME), style=_STYLES[respondent.kind])


def _lines(text: str, style: str = "") -> Text:
    """The text with its line breaks and no other control character."""
    return Text("\n".join(printable(line) for line in text.splitlines()), style=style)
