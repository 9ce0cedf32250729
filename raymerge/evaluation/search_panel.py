"""A search as the report shows it: its trials, what they say of each parameter, and what its winner is worth.

Validation examples chose the winner, so its score there flatters. What it is worth stands in its test score, beside
unified adapters and controls.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from raymerge import storage
from raymerge.errors import EvaluationError
from raymerge.evaluation.wording import UNKNOWN, number, signed
from raymerge.search.records import Trial
from raymerge.search.results import SUMMARY, TRIALS, Summary, read_summary, read_trials


@dataclass(frozen=True)
class Searched:
    """A search. trials: by number, the winner and the best complete."""

    trials: tuple[Trial, ...]
    summary: Summary

    @property
    def winner(self) -> Trial:
        """The trial that is taken."""
        return next(trial for trial in self.trials if trial.number == self.summary.winner)

    @property
    def best(self) -> Trial:
        """The trial of the highest score."""
        return next(trial for trial in self.trials if trial.number == self.summary.best)

    def count(self, state: str) -> int:
        """How many trials are in a state."""
        return sum(trial.state == state for trial in self.trials)

    @property
    def parameters(self) -> list[str]:
        """Those that any trial has, the most important first."""
        names = dict.fromkeys(name for trial in self.trials for name in trial.values)
        return sorted(names, key=lambda name: -self.summary.importances.get(name, 0.0))

    def conditional(self, parameter: str) -> bool:
        """Whether some trial does without it."""
        return any(parameter not in trial.values for trial in self.trials)


def read_searched(folder: str) -> Searched | None:
    """The search of a folder, None where it has no summary yet.

    Raises StorageError, and EvaluationError where the files are not of one search.
    """
    if not storage.exists(storage.join(folder, SUMMARY)):
        return None
    found = Searched(tuple(read_trials(folder)), read_summary(folder))
    complete = {trial.number for trial in found.trials if trial.state == "complete" and trial.last}
    for chosen in (found.summary.winner, found.summary.best):
        if chosen not in complete:
            raise EvaluationError(
                f"{folder}: {SUMMARY} chose trial {chosen}, which is not complete in {TRIALS}.\n"
                "Run `raymerge search` again, or take the folder away."
            )
    return found


def score(trial: Trial) -> float:
    """What a trial that was scored competes by: percent, less what its offsets cost."""
    return trial.last.competes if trial.last else float("nan")


def similarity(trial: Trial) -> float:
    """Mean similarity in percent over the personas that a trial was scored on, NaN where there are none."""
    return trial.last.values["similarity"] if trial.last else float("nan")


def adapter_bytes(trial: Trial) -> float | None:
    """Mean bytes of an adapter as it would be published."""
    return trial.last.values.get("bytes") if trial.last else None


def against(searched: Searched, reference: str | None) -> list[Mapping[str, Any]]:
    """What `Summary.beside` says of the reference and of the runs that the search made to compare its winner with."""
    made = f"{searched.summary.run}_"
    return [one for one in searched.summary.beside if one["name"] == reference or one["name"].startswith(made)]


def value_text(value: Any) -> str:
    """A parameter's value in words, as a project file has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def said(values: Mapping[str, Any]) -> str:
    """Values of parameters in words: `k 14, scale_offsets.layers 0.1 / 0 / -0.2`."""
    together: dict[str, list[str]] = {}
    for name, value in values.items():
        together.setdefault(re.sub(r"\.\d+$", "", name), []).append(value_text(value))
    return ", ".join(f"{name} {' / '.join(texts)}" for name, texts in together.items())


def tried(searched: Searched, parameter: str) -> str:
    """What was tried of a parameter: `0.5 to 3`, or its choices."""
    values = [trial.values[parameter] for trial in searched.trials if parameter in trial.values]
    if all(is_number(value) for value in values):
        return f"{value_text(min(values))} to {value_text(max(values))}"
    return ", ".join(choices(values))


def choices(values: Iterable[Any]) -> list[str]:
    """Different values in words: numbers in their order, then texts in theirs."""
    ordered = sorted(values, key=lambda value: (not is_number(value), value if is_number(value) else 0, str(value)))
    return list(dict.fromkeys(value_text(value) for value in ordered))


def is_number(value: Any) -> bool:
    """Whether a value lies on a range, and is no choice."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def context(searched: Searched, reference: str | None) -> dict[str, Any]:
    """What the page says of a search, beside its figures. reference: name of the row that all others are compared
    with."""
    winner, importances = searched.winner, searched.summary.importances
    return {
        **vars(searched.summary),
        "trials": searched.trials,
        "count": searched.count,
        "said": said(winner.values),
        "validation": similarity(winner),
        "validation_of_best": similarity(searched.best),
        "against": against(searched, reference),
        "penalised": any(trial.last and trial.last.penalty for trial in searched.trials),
        "conditional": [name for name in searched.parameters if searched.conditional(name)],
        "table": [
            (name, importances.get(name), tried(searched, name), value_text(winner.values.get(name, UNKNOWN)))
            for name in searched.parameters
        ],
    }


def in_a_line(searched: Searched, reference: str | None) -> str:
    """The search for a terminal: how many trials, the winner, and what it is worth. reference: see `context`."""
    winner, summary = searched.winner, searched.summary
    optimism = "" if summary.optimism is None else f" (optimism {number(summary.optimism)})"
    parts = [f"{len(searched.trials):,} trials; winner {winner.number}: {said(winner.values)}; validation "]
    parts[0] += f"{number(similarity(winner))}{optimism}"
    parts += [] if summary.test is None else [f"test {number(summary.test)}"]
    parts += [
        f"{signed(one['difference'])} [{signed(one['low'])} {signed(one['high'])}] over {one['name']}"
        for one in against(searched, reference)
    ]
    return ", ".join(parts) + "."
