"""Who proposes the next trial: TPE, CMA-ES, random points or a grid.

Each trial has a sampler of its own, drawn from (seed, number of the trial). What it proposes depends on that and on the
trials before it, never on how often something was drawn, so that a search which was interrupted proposes what an
undisturbed one would, and its finished trials need no sampler to be entered again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna

from raymerge.config.search import Search
from raymerge.errors import ProjectError

if TYPE_CHECKING:
    from raymerge.search.space import Space


def sampler_of(search: Search, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial; for `grid` see `Given`.

    TPE: Bergstra et al. 2011 (Algorithms for Hyper-Parameter Optimization), over all parameters at once where there is
    one objective (Falkner et al. 2018, 1807.01774); trials that still run count as poor ones (the constant liar of
    Ginsbourger et al. 2010), so that several at once do not propose the same. CMA-ES: Hansen 2016 (1604.00772).
    """
    seed = int(np.random.SeedSequence([search.seed % 2**64, number]).generate_state(1)[0])
    if search.sampler == "tpe":
        together = len(search.objectives) == 1  # of several objectives, one parameter at a time is what optuna advises
        return optuna.samplers.TPESampler(seed=seed, multivariate=together, constant_liar=True)
    if search.sampler == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    return optuna.samplers.RandomSampler(seed=seed)


class Given(optuna.samplers.BaseSampler):  # type: ignore[misc]
    """Proposes the values that it is given: a point of a grid, or a trial of an earlier run.

    beneath: the sampler that proposed them, where it keeps its state in the study (CMA-ES its distribution, with the
    trials): it is asked all the same.
    """

    def __init__(self, values: Mapping[str, Any], beneath: optuna.samplers.BaseSampler | None = None) -> None:
        self._values = values
        self._beneath = beneath

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return dict(self._beneath.infer_relative_search_space(study, trial)) if self._beneath else {}

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        if self._beneath:
            self._beneath.sample_relative(study, trial, search_space)
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self._values[param_name]


def check_sampler(space: Space, search: Search) -> None:
    """Raises ProjectError where the sampler cannot search the space."""
    if search.sampler != "cmaes":
        return
    reason = None
    if len(search.objectives) > 1:
        reason = "it has one objective; `search.objectives` names several"
    elif space.conditional or not space.continuous:
        reason = "it takes numbers that always count; the space has choices or conditions"
    elif len(space.parameters) < 2:
        reason = "it needs two numbers at least; the space has one"
    if reason:
        raise ProjectError(f"search.sampler: cmaes cannot search this space: {reason}.\nUse tpe, random or grid.")
