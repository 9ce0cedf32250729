"""What the decision guide is computed from, and what a step of it is."""

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from raymerge.evaluation import statistics
from raymerge.evaluation.best import Best
from raymerge.evaluation.data_needed import DataNeeded
from raymerge.evaluation.rows import Row, row_of
from raymerge.evaluation.statistics import Values
from raymerge.evaluation.verdict import Verdict
from raymerge.evaluation.wording import duration, signed

ASSUMED = 0.5  # points that a step of unknown gain counts for in the order
LEAST_S = 60.0  # seconds that any step costs a person
TRAINING_S, OTHER_S = 3600.0, 300.0  # what counts for a step of unknown length, in the order alone


@dataclass(frozen=True)
class Step:
    """Something to run next.

    what: in words. gain: likely range in points, None where the rows say nothing of it. because: where the range comes
    from, or what the step is for where it gains no points. training: whether it trains. seconds: what it takes, None
    where no like row says. tells: whether it gains knowledge, not points. needed: without it nothing can be said, so it
    is among the steps whatever it costs. first: whether it comes before all others.
    """

    what: str
    gain: tuple[float, float] | None
    because: str
    training: bool
    seconds: float | None
    command: str
    tells: bool = False
    needed: bool = False
    first: bool = False

    @property
    def worth(self) -> float:
        """Likely points per second, for the order alone."""
        points = ASSUMED if self.gain is None else (max(0.0, self.gain[0]) + max(0.0, self.gain[1])) / 2
        usual = TRAINING_S if self.training else OTHER_S
        return points / max(LEAST_S, usual if self.seconds is None else self.seconds)

    @property
    def sentence(self) -> str:
        """The step with gain, cost and command."""
        return f"{self.what}: {self.gain_words}; {self.cost_words}: `{self.command}`."

    @property
    def gain_words(self) -> str:
        """What it is likely to gain, or what it is for."""
        if self.tells:
            return self.because
        if self.gain is None:
            return "gain not known from these rows" + (f" ({self.because})" if self.because else "")
        low, high = self.gain
        span = f"up to {signed(high)}" if low <= 0 else f"{signed(low)} to {signed(high)}"
        return f"{span} points likely, {self.because}"

    @property
    def cost_words(self) -> str:
        """What it takes."""
        if not self.training:
            return "no training: minutes" if self.seconds is None else f"no training, about {duration(self.seconds)}"
        return "training of unknown length" if self.seconds is None else f"about {duration(self.seconds)}, training"


@dataclass(frozen=True, eq=False)
class Facts:
    """What the guide is computed from.

    means: bootstrap means (resamples, rows). place: the reference row, or None. best, best_reference: the best rows of
    every persona, among all rows and among adapters as trained. needed: data that would tell the verdict's
    recipe from the reference, None where there is enough. project: the project file as commands name it; unified:
    where it has the unified adapter; recipes: the recipes that it has, None where that is not known. validated: whether
    recipes were chosen on validation examples, so that there are some.
    """

    rows: Sequence[Row]
    means: Values
    personas: int
    place: int | None
    verdict: Verdict
    needed: DataNeeded | None
    best_reference: Best | None
    project: str
    unified: str = "unified"
    recipes: Collection[str] | None = None
    validated: bool = False

    @property
    def merge(self) -> int | None:
        """The row that the verdict speaks of."""
        return None if self.verdict.row is None else self.named(self.verdict.row)

    @property
    def start(self) -> int | None:
        """What a step's gain is over: the best merge, else the reference."""
        return self.place if self.merge is None else self.merge

    def named(self, name: str) -> int | None:
        """The row of a name."""
        return next((i for i, row in enumerate(self.rows) if row.name == name), None)

    def find(self, strategy: str) -> int | None:
        """The row of a strategy with plain prompts."""
        return row_of(self.rows, strategy)

    def gap(self, row: int, other: int) -> tuple[float, float, float]:
        """Mean difference of two rows and its 95 % interval, points."""
        low, high = statistics.interval(self.means[:, [row]] - self.means[:, [other]], self.personas)
        return self.rows[row].similarity - self.rows[other].similarity, float(low[0]), float(high[0])

    def evaluating(self, rows: int = 1) -> float | None:
        """Seconds that it takes to evaluate some rows."""
        return scaled(rows, _median([row.costs.evaluate_s for row in self.rows]))

    def training(self, strategy: str) -> float | None:
        """Seconds that training took for the row of a strategy."""
        row = self.find(strategy)
        return None if row is None else self.rows[row].costs.train_s

    def merging(self) -> float | None:
        """Seconds to merge and evaluate a recipe."""
        merge = _median([row.costs.merge_s for row in self.rows if row.kind in ("recipe", "control")])
        return plus(merge, self.evaluating())

    def run(self, *recipes: str) -> str:
        """The command that runs recipes."""
        return self.command("run", *(part for name in recipes for part in ("--recipe", name)))

    def command(self, name: str, *arguments: str) -> str:
        """A command on the project, as a shell takes it."""
        return shlex.join(["raymerge", name, self.project, *arguments])


def plus(*seconds: float | None) -> float | None:
    """Sum of seconds, None where one of them is not known."""
    known = [value for value in seconds if value is not None]
    return sum(known) if len(known) == len(seconds) else None


def scaled(factor: float, seconds: float | None) -> float | None:
    """Seconds times a factor, None where they are not known."""
    return None if seconds is None else factor * seconds


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
