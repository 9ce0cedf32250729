"""What a check found: each finding with a sign, and a line of what to do where something is to be done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from raymerge.evaluation.wording import short

Sign = Literal["ok", "warn", "bad"]
SIGNS: tuple[Sign, ...] = ("ok", "warn", "bad")  # from the least to the worst
_LISTED = 5


@dataclass(frozen=True)
class Finding:
    """One thing found. bad: it would make the run wrong or impossible; warn: a run can live with it. todo: what to do
    about it, in one line."""

    sign: Sign
    text: str
    todo: str | None = None


@dataclass(frozen=True)
class Section:
    """What was found of one subject. lines: what else to show. facts: figures, JSON-able."""

    name: str
    findings: tuple[Finding, ...]
    lines: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sign(self) -> Sign:
        """The worst sign of its findings."""
        return worst(finding.sign for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As mappings and lists."""
        return {
            "name": self.name,
            "sign": self.sign,
            "findings": [{"sign": f.sign, "text": f.text, "todo": f.todo} for f in self.findings],
            **self.facts,
        }


def worst(signs: Iterable[Sign]) -> Sign:
    """The worst of some signs; ok for none."""
    return max(signs, key=SIGNS.index, default="ok")


def listed(names: Sequence[str], most: int = _LISTED) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - most
    return ", ".join(short(name, 30) for name in names[:most]) + (f" and {more:,} more" if more > 0 else "")


def counted(number: int, what: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
