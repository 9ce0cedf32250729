"""The single best of several adapters for each persona, chosen on validation examples.

A few examples cannot choose: the best of four by six answers is mostly the luckiest. So each persona's difference
between a candidate and the population's best is shrunken towards the mean of all personas, by how much of the spread of
these differences is more than noise (empirical Bayes for a normal mean, Efron and Morris 1975), and a persona leaves
the population's best only where what is left says that another one is better with probability `sure`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from raymerge.errors import RoutingError

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """What a persona may be given.

    experts: persona -> (expert, weight), None for the base; a persona without an entry cannot have it. scores: persona
    -> similarities of its validation examples, float64 (examples,), the same examples for all candidates.
    """

    experts: Mapping[str, tuple[str, float] | None]
    scores: Mapping[str, Values]


@dataclass(frozen=True)
class Choice:
    """Who gets what: persona -> name of a candidate. best: the population's. moved: personas who do not get it."""

    chosen: Mapping[str, str]
    best: str
    moved: tuple[str, ...]


def choose(personas: Sequence[str], candidates: Mapping[str, Candidate], sure: float) -> Choice:
    """The candidate of each persona.

    sure: probability, 0.5 to 1, with which another one must be better than the population's best to replace it. The
    population's best is the one of the largest mean over the personas that all candidates have scores for; a persona
    without scores gets it too, or, where it cannot have it, the next best that it can have.
    Raises RoutingError if no persona has scores for all candidates.
    """
    common = [p for p in personas if all(len(c.scores.get(p, ())) and p in c.experts for c in candidates.values())]
    if not common:
        raise RoutingError("strategy selective: no persona has validation scores of all candidates.")
    names = sorted(candidates)
    means = {name: float(np.mean([candidates[name].scores[p].mean() for p in common])) for name in names}
    order = sorted(names, key=lambda name: (-means[name], name))
    best = order[0]
    probability = {
        name: dict(zip(common, _better(candidates[name], candidates[best], common), strict=True)) for name in order[1:]
    }
    chosen: dict[str, str] = {}
    for persona in personas:
        able = [name for name in order if persona in candidates[name].experts]
        if not able:
            continue
        chosen[persona] = able[0]
        likely = max(order[1:], key=lambda name: probability[name].get(persona, 0.0), default=best)
        if likely != best and probability[likely].get(persona, 0.0) > sure:
            chosen[persona] = likely
    return Choice(chosen, best, tuple(p for p in personas if chosen.get(p, best) != best))


def _better(other: Candidate, best: Candidate, personas: Sequence[str]) -> Values:
    """Probability (personas,) that `other` is really better than `best` for each persona; 0 where everybody has one
    example, from which nobody can tell what is noise."""
    differences = [other.scores[p] - best.scores[p] for p in personas]
    if all(len(d) < 2 for d in differences):
        return np.zeros(len(personas))
    counts = np.array([len(d) for d in differences])
    means = np.array([d.mean() for d in differences])
    return posterior(means, pooled_variance(differences) / counts)


def pooled_variance(groups: Sequence[Values]) -> float:
    """Variance within groups, pooled over them; 0 where no group has two values."""
    free = sum(len(group) - 1 for group in groups)
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    return squares / free if free else 0.0


def posterior(means: Values, noise: Values) -> Values:
    """Probability (n,) that each true mean is above 0, given measured means (n,) with variances `noise` (n,).

    The prior is normal; its mean is that of all, its variance what their spread has beyond the noise.
    """
    centre = float(means.mean())
    spread = max(0.0, float(means.var(ddof=1) - noise.mean())) if len(means) > 1 else 0.0
    kept = spread / np.maximum(spread + noise, 1e-300)
    middle = centre + kept * (means - centre)
    width = np.sqrt(np.maximum(kept * noise, 0.0) + noise.mean() / len(means))
    sure = np.where(middle > 0, 1.0, np.where(middle < 0, 0.0, 0.5))
    return np.where(width > 0, norm.cdf(middle / np.maximum(width, 1e-300)), sure)
