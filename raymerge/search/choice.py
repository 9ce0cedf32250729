"""Which trial to take, and what its validation score is worth. Personas are what is sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raymerge.errors import EvaluationError
from raymerge.merging.methods import METHODS
from raymerge.recipes import Recipe
from raymerge.routing.strategies import STRATEGIES
from raymerge.search.records import Trial

if TYPE_CHECKING:
    import optuna

    from raymerge.search.space import Parameter, Space

CELLS_AT_ONCE = 2_000_000  # drawn counts held in memory: 16 MB, whatever the number of personas
ROUNDING = 1e-9  # of a difference in percent
FEWEST = 10  # trials below which importances would be noise


def optimism(scores: NDArray[np.float64], seed: int = 0, resamples: int = 2000) -> float:
    """By how much the best trial's mean exceeds what the same selection is worth on other personas, in points.

    scores: (trials, personas), percent, as trials compete. Personas are drawn with replacement, the best trial is
    chosen on those drawn, and compared with the best of all on those left out (BBC-CV: Tsamardinos, Greasidou and
    Borboudakis 2018; the left-out personas are Efron's 1983 e0). Efron's plain optimism, the winner's excess on those
    drawn, is a third too small where trials are alike, because their observed means, which stand in for the truth, are
    already spread by chance. This one is right there, and errs to the cautious side where trials truly differ.
    0 for one trial; NaN for one persona. Raises EvaluationError for scores that are not finite, or none.
    """
    _check(scores)
    trials, personas = scores.shape
    if trials == 1:
        return 0.0
    if personas == 1:
        return float("nan")
    spread = scores - scores.mean(axis=0)  # what all trials share cancels in the difference, but not in its noise
    best = int(np.argmax(scores.mean(axis=1)))
    generator = np.random.default_rng([seed, 7])
    lost: list[NDArray[np.float64]] = []
    step = max(1, CELLS_AT_ONCE // max(trials, personas))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        times = generator.multinomial(personas, np.full(personas, 1 / personas), size=size).astype(np.float64)
        out = (times == 0).astype(np.float64)
        some = out.sum(axis=1) > 0  # nearly all draws, but for a handful of personas
        times, out = times[some], out[some]
        chosen = np.argmax(times @ spread.T, axis=1)
        left_out = out @ spread.T / out.sum(axis=1, keepdims=True)
        lost.append(left_out[:, best] - left_out[np.arange(len(chosen)), chosen])
    drawn = np.concatenate(lost)
    return max(0.0, float(drawn.mean())) if len(drawn) else float("nan")


def complexity(recipe: Recipe, experts: float) -> tuple[int, int, int, int]:
    """How involved a recipe is; smaller tuples are simpler. experts: that contribute to a persona, a mean.

    In this order: linear, then other methods, then those that drop entries at random; contributors, to the nearest
    whole number; numbers searched beside (offsets of the scale, weights of named experts); parameters that are not at
    their defaults. The rank is left out: it is chosen afterwards, from the front of similarity against bytes.
    """
    defaults = METHODS[recipe.method].defaults
    kind = 0 if recipe.method == "linear" else 2 if "seed" in defaults else 1
    numbers = _count(recipe.scale_offsets) + _count(recipe.strategy_parameters.get("weights"))
    usual = STRATEGIES[recipe.strategy].parameters
    moved = [
        name for name, value in recipe.strategy_parameters.items() if name != "weights" and usual.get(name) != value
    ]
    moved += [name for name, value in recipe.method_parameters.items() if defaults.get(name) != value]
    return kind, round(experts), numbers, len(moved) + (recipe.scale != "match_norm")


def simplest(trials: Sequence[Trial], scores: NDArray[np.float64], complexity: Sequence[tuple[float, ...]]) -> int:
    """The number of the simplest trial within one standard error of the best (Breiman et al. 1984, 1-SE rule).

    trials: complete ones. scores: theirs (trials, personas), percent, without penalties, which are taken off here.
    complexity: of each. The standard error is that of the difference from the best, paired over personas, so that two
    recipes are not called alike because personas differ; with one persona there is none, and only equal trials count
    as alike. Of equally simple ones the best, then the first. Raises EvaluationError for scores that are not finite.
    """
    _check(scores)
    personas = scores.shape[1]
    standing = scores.mean(axis=1) - np.array([trial.last.penalty if trial.last else 0.0 for trial in trials])
    differences = scores[int(np.argmax(standing))] - scores
    errors = differences.std(axis=1, ddof=1) / np.sqrt(personas) if personas > 1 else np.zeros(len(scores))
    alike: list[int] = np.flatnonzero(standing.max() - standing <= errors + ROUNDING).tolist()
    chosen = min(alike, key=lambda i: (complexity[i], -standing[i], trials[i].number))
    return trials[chosen].number


def pareto_front(values: NDArray[np.float64], larger: Sequence[bool]) -> list[int]:
    """Indices of the points (n, m) than which no other is as good in everything and better in something, ascending.

    larger: for each of the m objectives whether more is better. Equal points are all in the front or all out of it.
    Raises EvaluationError for values that are not finite.
    """
    points = np.where(np.asarray(larger, dtype=bool), values, -np.asarray(values, dtype=np.float64))
    if not np.isfinite(points).all():
        raise EvaluationError(f"the front has no place for values that are not finite: point {_first_bad(points)}.")
    return [
        index
        for index, point in enumerate(points)
        if not ((points >= point).all(axis=1) & (points > point).any(axis=1)).any()
    ]


def importances(trials: Sequence[Trial], space: Space) -> dict[str, float]:
    """The share of the variance of trials' scores that each parameter accounts for by itself, largest first.

    Scores are those on the first rung, the same personas for all trials: few of them come to everybody where poor ones
    stop early. fANOVA (Hutter, Hoos and Leyton-Brown 2014) over the score less its penalty. The shares of parameters
    without condition sum to 1. A conditional one is judged among the trials that have it, beside all other parameters
    that these have. Left out are those with fewer than 10 such trials, or with trials that all score the same.
    """
    scored = [trial for trial in trials if trial.state in ("complete", "stopped") and trial.rungs]
    found = _shares(scored, [parameter for parameter in space.parameters if not parameter.when])
    judged: dict[tuple[int, ...], dict[str, float]] = {}
    for parameter in space.parameters:
        having = [trial for trial in scored if parameter.name in trial.values]
        key = tuple(trial.number for trial in having)
        if parameter.when and having:
            if key not in judged:
                there = [one for one in space.parameters if all(one.name in trial.values for trial in having)]
                judged[key] = _shares(having, there)
            found |= {name: share for name, share in judged[key].items() if name == parameter.name}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _shares(trials: Sequence[Trial], parameters: Sequence[Parameter]) -> dict[str, float]:
    scores = [trial.rungs[0].competes for trial in trials]
    if len(trials) < FEWEST or not parameters or np.ptp(scores) == 0:
        return {}
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    distributions = {parameter.name: _distribution(parameter) for parameter in parameters}
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it speaks of every study made in memory
    study = optuna.create_study(direction="maximize")
    for trial, value in zip(trials, scores, strict=True):
        given = {parameter.name: _plain(parameter, trial.values[parameter.name]) for parameter in parameters}
        study.add_trial(optuna.trial.create_trial(value=value, params=given, distributions=distributions))
    shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=list(distributions))
    return {name: float(share) for name, share in shares.items()}


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.kind == "choice":
        return CategoricalDistribution(range(len(parameter.choices)))
    low, high = parameter.bounds
    if parameter.kind == "int":
        return IntDistribution(int(low), int(high), log=parameter.log)
    return FloatDistribution(low, high, log=parameter.log)


def _plain(parameter: Parameter, value: Any) -> float:
    """A value as the distribution takes it: of a choice its place."""
    if parameter.kind == "choice":
        return parameter.choices.index(value)
    kept = np.clip(value, *parameter.bounds)  # steps may overshoot the end by a rounding
    return int(kept) if parameter.kind == "int" else float(kept)


def _count(value: Any) -> int:
    """Numbers other than 0 in mappings and lists of them."""
    if isinstance(value, Mapping):
        return sum(map(_count, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_count, value))
    return int(bool(value))


def _check(scores: NDArray[np.float64]) -> None:
    if scores.ndim != 2 or not scores.size:
        raise EvaluationError(
            f"there is nothing to choose among: scores of shape {scores.shape}.\n"
            "Expected (trials, personas), at least one of each."
        )
    if not np.isfinite(scores).all():
        trial, persona = _first_bad(scores)
        raise EvaluationError(
            f"the score of row {trial} for persona {persona} is {scores[trial, persona]}.\n"
            "Only trials that were scored on all personas compete: leave out those that were stopped or failed."
        )


def _first_bad(values: NDArray[np.float64]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
