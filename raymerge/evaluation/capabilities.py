"""Adapters on each capability's own prompts, and what a merge keeps of the experts that went into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raymerge.evaluation.statistics import Values, sign_flip_p

Kind = Literal["base", "expert", "fused"]
LOWER_IS_BETTER = frozenset({"nll"})
_ROUNDING = 1e-4  # a lead below this share of the figures is none
_SURE = 0.05


@dataclass(frozen=True)
class Contributor:
    """An expert that a merge was made of: its name there, and its content digest where that is known."""

    name: str
    digest: str | None = None


@dataclass(frozen=True)
class Respondent:
    """Who answers: the base alone, an expert, or an adapter that was made by merging.

    contributors: what a fused one was made of; empty where nobody wrote that down. digest: of an adapter's content, by
    which it is known under any name.
    """

    name: str
    kind: Kind
    contributors: tuple[Contributor, ...] = ()
    digest: str | None = None

    def is_one(self, contributor: Contributor) -> bool:
        """Whether this is what went into a merge: the same content, or the same name where a content is not known."""
        if self.kind == "base":
            return False
        if self.digest is None or contributor.digest is None:
            return self.name == contributor.name
        return self.digest == contributor.digest


@dataclass(frozen=True)
class Kept:
    """What a merge keeps of an expert, on the expert's own prompts.

    base, before, after: means of the metric for the base, the expert and the merge. share: (after - base) /
    (before - base); None where the expert is not better than the base. certain: whether the expert's lead over the
    base is more than chance (paired sign-flip test over its prompts, p below 0.05, which takes six of them at least).
    """

    merge: str
    expert: str
    metric: str
    prompts: int
    base: float
    before: float
    after: float
    share: float | None
    certain: bool


@dataclass(frozen=True, eq=False)
class Scores:
    """Figures of answers on the prompts that have a reference.

    capabilities: of each prompt. values: by metric, float64 (respondents, prompts).
    """

    respondents: tuple[Respondent, ...]
    capabilities: tuple[str, ...]
    values: Mapping[str, Values]

    @property
    def prompts(self) -> dict[str, int]:
        """Prompts of each capability, in the order in which they first occur."""
        return {name: self.capabilities.count(name) for name in dict.fromkeys(self.capabilities)}

    def of(self, metric: str, capability: str) -> Values:
        """One metric on one capability's prompts: float64 (respondents, prompts of it)."""
        chosen = np.array([name == capability for name in self.capabilities])
        return np.asarray(self.values[metric][:, chosen])

    def means(self, metric: str) -> dict[str, dict[str, float]]:
        """Mean of a metric by respondent and capability."""
        columns = {name: self.of(metric, name).mean(axis=1).tolist() for name in self.prompts}
        return {
            respondent.name: {name: column[row] for name, column in columns.items()}
            for row, respondent in enumerate(self.respondents)
        }

    def experts_of(self, merge: Respondent) -> list[str]:
        """The experts here that went into a merge; all of them where nobody wrote down which did."""
        known = merge.contributors
        experts = [r for r in self.respondents if r.kind == "expert"]
        return [r.name for r in experts if not known or any(r.is_one(contributor) for contributor in known)]

    def kept(self) -> list[Kept]:
        """What each fused adapter keeps of each expert that went into it and that a capability is named after, for
        every metric. Empty without the base."""
        rows = {respondent.name: row for row, respondent in enumerate(self.respondents)}
        base = next((row for row, r in enumerate(self.respondents) if r.kind == "base"), None)
        if base is None:
            return []
        found = []
        for merge in self.respondents:
            if merge.kind != "fused":
                continue
            for expert in (name for name in self.experts_of(merge) if name in self.prompts):
                for metric in self.values:
                    values = self.of(metric, expert)[[base, rows[expert], rows[merge.name]]]
                    found.append(_kept(values, merge.name, expert, metric))
        return found


def _kept(values: Values, merge: str, expert: str, metric: str) -> Kept:
    """values: float64 (3, prompts), of the base, the expert and the merge."""
    base, before, after = (float(mean) for mean in values.mean(axis=1))
    count = values.shape[1]
    gained = values[1] - values[0] if metric not in LOWER_IS_BETTER else values[0] - values[1]
    better = bool(gained.mean() > _ROUNDING * max(abs(base), abs(before)))
    share = (after - base) / (before - base) if better else None
    certain = better and float(sign_flip_p(gained[:, None])[0]) < _SURE
    return Kept(merge, expert, metric, count, base, before, after, share, certain)
