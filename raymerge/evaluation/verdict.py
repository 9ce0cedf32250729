"""What the comparison says in one sentence, with the care that such a sentence needs.

Neighbours are worth asking only if a recipe that asks them beats its own control, the same recipe with other experts;
merging is worth it only if that recipe also beats the reference. The best of several recipes looks better than it is,
so its intervals are widened for the number of recipes it was picked from (Bonferroni), unless it was picked on
validation examples. Where a recipe has several controls it has to beat the strongest. Training examples in the prompt
are an intervention of their own: the verdict speaks of recipes with plain prompts, and says which others lie above.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from raymerge.evaluation import statistics
from raymerge.evaluation.criteria import POINTS_ASKED
from raymerge.evaluation.scores import NEIGHBOURS, Kind, examples_in_prompt
from raymerge.evaluation.statistics import Values
from raymerge.evaluation.wording import signed

Outcome = Literal["gains", "loses", "nothing", "unknown"]


@dataclass(frozen=True)
class Standing:
    """What the verdict needs to know of a row besides its scores. tuned: whether its scale was chosen on validation
    examples, and is so no part of what a control has to share with its recipe."""

    name: str
    kind: Kind
    recipe: Mapping[str, Any]
    validation_similarity: float | None = None
    tuned: bool = False

    @property
    def is_plain_recipe(self) -> bool:
        """Whether it merges and has plain prompts."""
        return self.kind == "recipe" and not examples_in_prompt(self.recipe)


@dataclass(frozen=True)
class Gain:
    """A difference of two rows in points, its interval at `level`, and what that interval allows to say."""

    over: str
    mean: float
    low: float
    high: float
    level: float
    outcome: Outcome

    @property
    def cannot_be_told(self) -> bool:
        """Whether the interval holds no difference as well as all the points that were asked for."""
        return self.outcome == "nothing" and self.high >= POINTS_ASKED


@dataclass(frozen=True)
class Verdict:
    """headline: one sentence. details: what it rests on, a sentence each. row: the recipe it speaks of, or None. level:
    of its intervals, above 0.95 where these very scores picked the recipe among several. matched: whether the control
    is made of the very same recipe. undecided: whether the headline says that this data cannot tell."""

    headline: str
    details: tuple[str, ...]
    row: str | None
    reference: Gain | None
    control: Gain | None
    level: float = 0.95
    matched: bool = False
    undecided: bool = False

    def with_data_needed(self, words: str) -> "Verdict":
        """The same; where this data cannot tell, the headline says what would.

        words: such as `60 personas instead of 24`.
        """
        if not self.undecided:
            return self
        return replace(self, headline=f"{self.headline.removesuffix('.')}: that takes about {words}.")


def judge(rows: Sequence[Standing], scores: Values, means: Values, place: int | None) -> Verdict:
    """The verdict over rows in order of their scores.

    scores: (rows, personas), points. means: bootstrap means (resamples, rows). place: the reference row, or None.
    """
    recipes = [i for i, row in enumerate(rows) if row.is_plain_recipe]
    neighbours = [i for i in recipes if rows[i].recipe["strategy"] in NEIGHBOURS]
    candidates = neighbours or recipes
    if not candidates:
        of = "recipe with plain prompts" if any(row.kind == "recipe" for row in rows) else "recipe"
        return Verdict(f"No {of} was compared, so nothing is said about merging.", (), None, None, None)
    best, level, how = _pick(rows, candidates)
    controls = controls_of(rows, best)
    strongest = min(controls) if controls else None  # rows come best first
    personas = scores.shape[1]
    over_reference = None if place is None else _gain(rows, means, scores, best, place, level, personas)
    over_control = None if strongest is None else _gain(rows, means, scores, best, strongest, level, personas)
    matched = _matched(rows, best, strongest)
    headline, undecided = _headline(rows[best].name, over_reference, over_control, matched, bool(neighbours))
    details = [*_comparisons(rows[best].name, over_reference, over_control, matched), how]
    details += _ceilings(rows, scores, best, place)
    return Verdict(headline, tuple(details), rows[best].name, over_reference, over_control, level, matched, undecided)


def controls_of(rows: Sequence[Standing], row: int) -> list[int]:
    """Controls of a row: those made of the very same recipe, else of its strategy, else all controls there are."""
    prompts = examples_in_prompt(rows[row].recipe)
    controls = [i for i, r in enumerate(rows) if r.kind == "control" and examples_in_prompt(r.recipe) == prompts]
    same = [i for i in controls if _is_control_of(rows[i], rows[row])]
    alike = [i for i in controls if _of(rows[i].recipe).get("strategy") == rows[row].recipe["strategy"]]
    return same or alike or controls


def _matched(rows: Sequence[Standing], row: int, control: int | None) -> bool:
    return control is not None and _is_control_of(rows[control], rows[row])


def _is_control_of(control: Standing, row: Standing) -> bool:
    recipe = row.recipe
    routed = {"strategy": recipe["strategy"], **recipe.get("strategy_parameters", {})}
    shared = ["method", "method_parameters", "rank", "anchor", "retrieval"]
    shared += [] if control.tuned else ["scale"]  # at its own best scale a control is as strong as it can be
    return _of(control.recipe) == routed and all(control.recipe.get(key) == recipe.get(key) for key in shared)


def _of(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = recipe.get("strategy_parameters", {}).get("of", {})
    return inner if isinstance(inner, Mapping) else {}


def _pick(rows: Sequence[Standing], candidates: Sequence[int]) -> tuple[int, float, str]:
    chosen_before = {i: v for i in candidates if (v := rows[i].validation_similarity) is not None}
    if len(candidates) == 1:
        return candidates[0], 0.95, f"{rows[candidates[0]].name} is the only recipe of its kind."
    if len(chosen_before) == len(candidates):
        best = max(candidates, key=lambda i: (chosen_before[i], -i))
        return best, 0.95, f"{rows[best].name} was chosen among {len(candidates)} recipes on validation examples."
    how = (
        f"{rows[candidates[0]].name} was picked among {len(candidates)} recipes by these very test examples; "
        "the intervals above are widened for that."
    )
    return candidates[0], 1 - 0.05 / len(candidates), how


def _gain(
    rows: Sequence[Standing], means: Values, scores: Values, row: int, other: int, level: float, personas: int
) -> Gain:
    low, high = (float(b[0]) for b in statistics.interval(means[:, [row]] - means[:, [other]], personas, level))
    outcome: Outcome = "nothing"
    if not np.isfinite(low):
        outcome = "unknown"
    elif low > 0:
        outcome = "gains"
    elif high < 0:
        outcome = "loses"
    return Gain(rows[other].name, float((scores[row] - scores[other]).mean()), low, high, level, outcome)


def _headline(
    name: str, reference: Gain | None, control: Gain | None, matched: bool, neighbours: bool
) -> tuple[str, bool]:
    """The headline, and whether it says that this data cannot tell."""
    merging = "Merging neighbours" if neighbours else "Merging"
    worth = "unknown" if reference is None else reference.outcome
    real = "unknown" if control is None else control.outcome
    if control is not None and real in ("nothing", "loses"):
        than = "no better than" if real == "nothing" else "worse than"
        which = "its control" if matched else "a control of another recipe,"
        return f"{merging} gains nothing: {name} does {than} {which} {control.over}.", False
    if reference is not None and worth != "unknown":
        if worth == "gains":
            caveat = _caveat(real, matched) if neighbours else ""
            return f"{merging} gains {reference.mean:.1f} points over {reference.over}{caveat}.", False
        credited = neighbours and real == "gains" and matched
        unmatched = neighbours and real == "gains" and not matched
        caveat = (
            ", but only a control of another recipe says that neighbours know more than others" if unmatched else ""
        )
        if reference.cannot_be_told:
            opening = "Neighbours know something, but whether m" if credited else "Whether m"
            between = f"{signed(reference.low)} to {signed(reference.high)} over {reference.over}"
            return f"{opening}{merging[1:]} pays cannot be told with this data ({name}: {between}).", True
        than = "no better than" if worth == "nothing" else "worse than"
        opening = f"Neighbours know something, but m{merging[1:]}" if credited else merging
        return f"{opening} does not pay: {name} does {than} {reference.over}{caveat}.", False
    if control is not None and real == "gains":
        gained = f"{merging} gains {control.mean:.1f} points over {control.over}"
        return f"{gained}; no reference is here to compare with.", False
    return f"{name} cannot be judged: that needs a reference, a control and at least two personas.", False


def _caveat(real: Outcome, matched: bool) -> str:
    if real != "gains":
        return ", but no control says whether neighbours are the reason"
    return "" if matched else ", but only a control of another recipe says that neighbours are the reason"


def _comparisons(name: str, reference: Gain | None, control: Gain | None, matched: bool) -> list[str]:
    sentences = []
    if reference is not None:
        sentences.append(f"{name} against {reference.over}: {_figures(reference)}.")
    if control is not None:
        which = "its control" if matched else "a control of another recipe,"
        sentences.append(f"{name} against {which} {control.over}: {_figures(control)}.")
    else:
        sentences.append("No control was run (random_k, random_cluster or shuffled), so neighbours are not credited.")
    return sentences


def _figures(gain: Gain) -> str:
    if gain.outcome == "unknown":
        return f"{signed(gain.mean, 2)} points, without an interval since there is one persona"
    meaning = {"gains": "above 0", "loses": "below 0", "nothing": "contains 0"}[gain.outcome]
    bounds = f"{signed(gain.low, 2)} to {signed(gain.high, 2)}"
    return f"{signed(gain.mean, 2)} points, {100 * gain.level:.4g} % interval {bounds} ({meaning})"


def _ceilings(rows: Sequence[Standing], scores: Values, best: int, place: int | None) -> list[str]:
    above = [
        f"{row.name} {scores[i].mean():.1f}"
        for i, row in enumerate(rows)
        if i < best and i != place and row.kind in ("reference", "baseline", "ceiling", "external")
    ]
    prompted = [
        f"{row.name} {scores[i].mean():.1f}"
        for i, row in enumerate(rows)
        if i < best and row.kind == "recipe" and not row.is_plain_recipe
    ]
    has = f"(it has {scores[best].mean():.1f})."
    said = [f"Above it without being a recipe: {', '.join(above)} {has}"] if above else []
    if prompted:
        said.append(f"Above it with training examples in the prompt too: {', '.join(prompted)} {has}")
    return said
