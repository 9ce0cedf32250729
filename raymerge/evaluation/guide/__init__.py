"""The decision guide: what to run next, what it is likely to gain, and what it costs, from the rows there are.

A step's gain is over the best merge (over the reference where nothing was merged), in points, and comes from a like row
of the comparison. Its cost comes from what like rows took. Steps are ordered by gain over cost; merging costs no
training, so it comes first where it was not done.
"""

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from raymerge.evaluation.best import SERVED
from raymerge.evaluation.guide.facts import Facts, Step
from raymerge.evaluation.guide.with_training import (
    compare_reference,
    more_test_data,
    start_from_unified,
    train_on_neighbours,
    train_router,
    train_with_other_seeds,
)
from raymerge.evaluation.guide.without_training import (
    choose_per_persona,
    merge_neighbours,
    mix_own,
    retrieve,
    run_control,
    search_recipe,
    tune_scale,
)
from raymerge.evaluation.wording import number, short, signed, size

MOST_STEPS = 5
MAKERS: Sequence[Callable[[Facts], Step | None]] = (
    merge_neighbours,
    compare_reference,
    tune_scale,
    search_recipe,
    train_router,
    retrieve,
    choose_per_persona,
    mix_own,
    train_on_neighbours,
    start_from_unified,
    more_test_data,
    run_control,
    train_with_other_seeds,
)


@dataclass(frozen=True)
class Guide:
    """in_hand: the best row that can be served, in a sentence. steps: what to run next, the most worthwhile first."""

    in_hand: str
    steps: tuple[Step, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        """The steps in words."""
        return tuple(step.sentence for step in self.steps)


def advise(facts: Facts) -> Guide:
    """The decision guide for a comparison: at most five steps."""
    steps = [_with_missing_recipes(facts, step) for make in MAKERS if (step := make(facts)) is not None]
    kept = sorted(steps, key=lambda step: (not (step.first or step.needed), -step.worth))[:MOST_STEPS]
    return Guide(_in_hand(facts), tuple(sorted(kept, key=lambda step: (not step.first, -step.worth))))


def _with_missing_recipes(facts: Facts, step: Step) -> Step:
    """The step, which says of each recipe of its command that is not in the project file that it has to be added."""
    if facts.recipes is None:
        return step
    words = shlex.split(step.command.replace("`", " "))
    named = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--recipe"]
    missing = [n for n in named if n not in facts.recipes and not re.search(rf"\badd {re.escape(n)}(?!\w)", step.what)]
    if not missing:
        return step
    return replace(step, what=f"{step.what} (add {' and '.join(missing)} to the recipes of the project file)")


def _in_hand(facts: Facts) -> str:
    best = next((row for row in facts.rows if row.kind in SERVED), None)
    if best is None:
        return "Nothing here can be served."
    parts = [f"{short(best.name)} {number(best.similarity)}"]
    if best.difference is not None and facts.place is not None:
        parts.append(f"{signed(best.difference.mean)} over {facts.rows[facts.place].name}")
    if best.costs.adapters is not None:
        parts.append(f"{best.costs.adapters:,} adapter{'s' if best.costs.adapters != 1 else ''} to serve")
    if best.costs.bytes:
        parts.append(size(best.costs.bytes))
    return f"Best in hand: {', '.join(parts)}."
