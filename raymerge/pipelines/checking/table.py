"""What `raymerge check` prints, in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raymerge.evaluation.wording import duration, printable, size
from raymerge.pipelines.checking.estimate import CPU_THREAD, GPU, Estimate, Speeds, Step
from raymerge.pipelines.checking.finding import Finding, Section, Sign
from raymerge.pipelines.checking.prompts import Rendered

_STYLES: dict[Sign, str] = {"ok": "green", "warn": "yellow", "bad": "bold red"}
_ENDS = 240  # characters of a prompt that are shown from its start and from its end
_BREAK = "↵"


def report(
    sections: Sequence[Section], examples: Sequence[Rendered], estimate: Estimate | None, sign: Sign, width: int
) -> RenderableType:
    """All sections, three prompts, the steps of the run, and what it comes to."""
    parts: list[RenderableType] = []
    for section in sections:
        parts += _section(section)
        if section.name == "prompts":
            parts += [_indented(line, 6) for example in examples for line in _example(example)]
    if estimate is not None:
        parts += ["", *_estimate(estimate)]
    parts += ["", _verdict(sections, sign)]
    return Lines(*parts)


def _section(section: Section) -> Iterator[RenderableType]:
    first, *others = section.findings
    yield _finding(first, section.name, section.sign)
    for finding in others:
        yield _finding(finding, "", finding.sign)
    for line in section.lines:
        yield _indented(Text(printable(line), style="dim"), 16)


def _finding(finding: Finding, name: str, sign: Sign) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=4, no_wrap=True)
    grid.add_column(width=10, no_wrap=True)
    grid.add_column(overflow="fold")
    shown = Text(sign, style=_STYLES[sign])
    text = Text(printable(finding.text), style="" if finding.sign == "ok" else _STYLES[finding.sign])
    if finding.todo is not None:
        text.append(f"\n→ {printable(finding.todo)}", style="default")
    grid.add_row(shown if name or finding.sign != "ok" else Text(), Text(name, style="bold"), text)
    return grid


def _example(example: Rendered) -> Iterator[Text]:
    """A prompt as the model sees it, and the answer that training has follow it."""
    tokens = f"{example.prompt_tokens:,} + {example.answer_tokens:,} tokens"
    yield Text(f"{example.which}: {printable(example.persona)}, {tokens}", style="dim")
    yield Text(f"prompt  {_visible(example.prompt)}")
    yield Text(f"answer  {_visible(example.answer)}")


def _visible(text: str) -> str:
    """A text with its line breaks seen, and without its middle where it is long."""
    if len(text) > 2 * _ENDS:
        text = f"{text[:_ENDS]} […{len(text) - 2 * _ENDS:,} characters…] {text[-_ENDS:]}"
    return "\n".join(printable(line) for line in text.replace("\n", f"{_BREAK}\n").split("\n"))


def _estimate(estimate: Estimate) -> Iterator[RenderableType]:
    left = [step for step in estimate.steps if step.items]
    yield Text("What `raymerge run` has still to do", style="bold")
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("step", no_wrap=True, overflow="ellipsis", max_width=22)
    workers = estimate.workers.get("model", 1)
    together = "in all" if workers == 1 else f"on {workers}"
    for header in ("to do", "there", "operations", "bytes", "one worker", together):
        table.add_column(header, justify="right", no_wrap=True)
    for step in estimate.steps:
        table.add_row(*_cells(step, estimate))
    yield Padding(table, (0, 0, 0, 2))
    nbytes = sum(step.nbytes for step in left)
    most = "at most " if any(step.bound for step in left) else ""
    yield _indented(f"In all about {_time(estimate.total_s)} and {most}{size(nbytes)}.", 2)
    yield from (_indented(Text(line, style="dim"), 2) for line in _how(estimate))


def _cells(step: Step, estimate: Estimate) -> list[Text]:
    if not step.items:
        return [Text(step.name), Text("–"), Text(f"{step.there:,}"), *[Text()] * 4]
    rough = "~" if estimate.source(step) == "assumed" else ""
    nbytes = ("≤ " if step.bound else "") + size(step.nbytes)
    times = [Text(f"{rough}{_time(s)}") for s in (estimate.alone(step), estimate.elapsed(step))]
    done = f"{step.operations + step.encoding:.1e}"
    return [Text(step.name), Text(f"{step.makes:,}"), Text(f"{step.there:,}"), Text(done), Text(nbytes), *times]


def _time(seconds: float) -> str:
    return duration(seconds if seconds < 10 else round(seconds)) if seconds >= 0.1 else "below 1 s"


def _how(estimate: Estimate) -> Iterator[str]:
    """Where the times come from."""
    sources = {estimate.source(step) for step in estimate.steps if step.items and step.worker == "model"}
    if "measured" in sources:
        yield "Times as those of earlier items of this project, where there are some."
    if "calibrated" in sources:
        train, answer = estimate.speeds.train, estimate.speeds.answer
        yield f"Model workers as just timed: {train:.1e} operations/s in training, {answer:.1e} in answering."
    if "assumed" in sources:
        yield from _assumed(estimate)
    yield from (f"Workers: {note}." for note in estimate.notes)


def _assumed(estimate: Estimate) -> Iterator[str]:
    if estimate.device == "gpu":
        yield f"~ rough: {GPU:.0e} operations/s for a GPU, with a base of a billion weights or more."
    else:
        fast = Speeds(GPU, GPU, GPU)
        steps = [s for s in estimate.steps if s.items and s.worker == "model"]
        seconds = sum(step.seconds(fast.of(step), fast.encode) for step in steps)
        yield f"~ rough: {CPU_THREAD:.0e} operations/s for a CPU thread. On one GPU ({GPU:.0e}, a base"
        yield f"of a billion weights or more) training and answering take {_time(seconds)}."
    yield "`raymerge check --model` times a few real steps."


def _verdict(sections: Sequence[Section], sign: Sign) -> Text:
    named = {s: [section.name for section in sections if section.sign == s] for s in _STYLES}
    if sign == "bad":
        return Text(f"Not ready: {', '.join(named['bad'])}. A run would be wrong or impossible.", style="bold red")
    if sign == "warn":
        return Text(f"Ready, with warnings: {', '.join(named['warn'])}.", style="yellow")
    return Text("Ready.", style="bold green")


def _indented(text: str | Text, columns: int) -> RenderableType:
    return Padding(text if isinstance(text, Text) else Text(printable(text)), (0, 0, 0, columns), expand=False)
