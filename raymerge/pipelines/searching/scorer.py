"""From a point of the space to its figures: a recipe is routed, and its merges answer validation examples in memory.

Personas are scored in nested parts, the same for every trial. Each part of a trial is an artefact whose folder is named
by all that is known to decide it, so that what was scored once, by a trial that was interrupted or by an equal one, is
found there; the worker compares the digests of the adapters themselves. No merge is written.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymerge import storage
from raymerge.config import Search
from raymerge.errors import EvaluationError, PersonaError
from raymerge.manifest import read_manifest
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.placing import Placed
from raymerge.pipelines.planning import cut, merges_of
from raymerge.pipelines.scoring import answering_of, asking_of, retrieval_of
from raymerge.pipelines.searching.aim import Aim
from raymerge.recipes import Recipe
from raymerge.runtime.broker import CarryOut
from raymerge.runtime.scheduler import Item, Outcome
from raymerge.runtime.tasks import Candidate, TuneTask
from raymerge.runtime.tuning import TABLE
from raymerge.search.records import Figures
from raymerge.search.space import Space

LABEL = "recipe"


@dataclass(frozen=True)
class Part:
    """Scores of some personas: percent (personas,). size, experts: means over them, see `Figures`."""

    similarity: NDArray[np.float32]
    size: float
    experts: float
    answers: int


class Known:
    """Parts by their folders, each scored once: whoever asks for one that is being scored waits for it.

    Two trials may have merges in common, and be under way at the same time. Another process begins with none.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: dict[str, Future[Part]] = {}

    def __reduce__(self) -> Any:
        return Known, ()

    def begin(self, places: Iterable[str]) -> tuple[dict[str, Future[Part]], list[str]]:
        """All these parts, and those of them that the caller has to settle."""
        with self._lock:
            new = [place for place in places if place not in self._parts]
            self._parts |= {place: Future() for place in new}
            return {place: self._parts[place] for place in places}, new

    def fail(self, place: str, error: BaseException) -> None:
        """A part that could not be had: those who wait get the error, the next to ask tries again."""
        with self._lock:
            self._parts.pop(place).set_exception(error)


@dataclass
class RecipeScorer:
    """Scores recipes on the validation examples of a project.

    aim: what for. names: personas, in the order in which they are scored. rungs: how many of them each step takes,
    ascending. folder: for what was scored.
    """

    opened: Opened
    aim: Aim
    placed: Placed
    space: Space
    names: tuple[str, ...]
    rungs: tuple[int, ...]
    folder: str
    known: Known = field(default_factory=Known, repr=False)

    def score(self, values: Mapping[str, Any], rung: int, carry_out: CarryOut) -> Figures:
        """The figures of a point on the first personas, as many as a rung has.

        Raises EvaluationError where somebody cannot be answered or a score is not finite, and what routing raises.
        """
        return self.score_recipe(self.space.recipe(values), rung, carry_out, self.space.penalty(values))

    def score_recipe(self, recipe: Recipe, rung: int, carry_out: CarryOut, penalty: float = 0.0) -> Figures:
        """As `score`, for any recipe. penalty: see `Figures`."""
        parts = self.parts(recipe, rung)
        asked, new = self.known.begin(parts)
        items = [Item(f"{self.aim.title}/{storage.name_of(place)}", "model", "tune", parts[place]) for place in new]
        answers = 0
        seconds = 0.0
        try:
            outcomes = carry_out(items) if items else []
            for place, outcome in zip(new, outcomes, strict=True):
                _check(recipe, outcome)
                part = read_part(place)
                asked[place].set_result(part)
                answers += 0 if (outcome.result or {}).get("skipped") else part.answers
                seconds += outcome.seconds
        except BaseException as error:
            for place in new:
                if not asked[place].done():
                    self.known.fail(place, error)
            raise
        return _figures([asked[place].result() for place in parts], penalty, answers, seconds)

    def scores(self, recipe: Recipe) -> NDArray[np.float64]:
        """Percent (personas,) of a recipe that was scored on all of them, in the order of `names`."""
        parts = [read_part(place) for place in self.parts(recipe, len(self.rungs) - 1)]
        return np.concatenate([part.similarity for part in parts]).astype(np.float64)

    def parts(self, recipe: Recipe, rung: int) -> dict[str, TuneTask]:
        """What is to be scored of a recipe up to a rung, by the folder that it goes into."""
        count = self.rungs[rung]
        asked = self.placed.inputs.personas if self.placed.routes_together(recipe) else self.names[:count]
        among = replace(self.placed, inputs=replace(self.placed.inputs, personas=asked), routed={})
        table, _ = among.route(recipe)
        merges = merges_of(self.opened, recipe, table)
        answering = answering_of(self.opened, recipe, table, merges, {}, in_memory=True)
        asking = asking_of(self.opened, "validation", retrieval_of(self.opened, recipe), self.aim.section.examples)
        found = {}
        for names in portions(self.names, self.rungs[: rung + 1], self.opened.project.evaluation.personas_per_item):
            sources = tuple(answering[name].source for name in names)
            decided = storage.digest_value([[asdict(source) for source in sources], _asked(asking)])
            place = storage.join(self.folder, decided.rpartition(":")[2][:32])
            found[place] = TuneTask(place, (Candidate(LABEL, sources),), **vars(asking))
        return found


def portions(names: Sequence[str], rungs: Sequence[int], size: int) -> list[Sequence[str]]:
    """Names in portions that end where a rung does."""
    starts = [0, *rungs[:-1]]
    return [part for start, end in zip(starts, rungs, strict=True) for part in cut(names[start:end], size)]


def read_part(place: str) -> Part:
    """What a tuning item scored of one recipe. Raises EvaluationError where it is not there or not finite."""
    manifest = read_manifest(place)
    if manifest is None:
        raise EvaluationError(f"{place}: was not scored to the end.\nThe same search goes on from there.")
    table = storage.read_parquet(storage.join(place, TABLE))
    personas = table.column("persona").to_pylist()
    order = list(dict.fromkeys(personas))
    position = {name: number for number, name in enumerate(order)}
    sums, counts = np.zeros(len(order)), np.zeros(len(order))
    rows = np.array([position[name] for name in personas], dtype=np.int64)
    np.add.at(sums, rows, table.column("similarity").to_numpy().astype(np.float64))
    np.add.at(counts, rows, 1.0)
    means = 100.0 * sums / counts
    if not np.isfinite(means).all():
        worst = order[int(np.flatnonzero(~np.isfinite(means))[0])]
        raise EvaluationError(f"{place}: the similarity of {worst} is {means[position[worst]]}.\nExpected a number.")
    size, experts = float(manifest["bytes"][LABEL]), float(manifest["experts"][LABEL])
    return Part(means.astype(np.float32), size, experts, len(personas))


def subset_sizes(search: Search, personas: int, where: str) -> tuple[int, ...]:
    """How many personas a trial is scored on, step by step: ASHA's rungs. Raises PersonaError for too few."""
    if personas < search.smallest and "smallest" in search.model_fields_set:
        raise PersonaError(
            f"{where}: `search.smallest` is {search.smallest}, and {personas} personas have validation examples.\n"
            "Lower it, or add rows with split validation."
        )
    if not search.stop_early or len(search.objectives) > 1:
        return (personas,)
    sizes = []
    size = search.smallest
    while size < personas:
        sizes.append(size)
        size *= search.reduction
    return (*sizes, personas)


def order_of(opened: Opened, search: Search, left_out: Collection[str] = ()) -> tuple[str, ...]:
    """Personas with validation examples, in an order drawn from the seed. left_out: those who score nothing.

    Raises PersonaError if there are none.
    """
    personas = opened.need_personas("search")
    without = {*personas.missing("validation"), *left_out}
    names = [name for name in personas.names if name not in without]
    if not names:
        raise PersonaError(
            f"{personas.location}: nobody has validation examples, which a search scores recipes on.\n"
            "Add rows with split validation; test rows are never looked at."
        )
    drawn = np.random.default_rng([search.seed, 5]).permutation(len(names))
    return tuple(names[i] for i in drawn)


def _asked(asking: Any) -> dict[str, Any]:
    source = asking.personas
    return {**vars(asking), "personas": source if isinstance(source, str) else source.model_dump(mode="json")}


def _check(recipe: Recipe, outcome: Outcome) -> None:
    failed: Mapping[str, str] = (outcome.result or {}).get("failed", {})
    why = outcome.error or next((f"{persona}: {reason}" for persona, reason in failed.items()), None)
    if why is not None:
        raise EvaluationError(f"{recipe.strategy}, {recipe.method}: cannot be scored: {why}")


def _figures(parts: Sequence[Part], penalty: float, answers: int, seconds: float) -> Figures:
    similarity = np.concatenate([part.similarity for part in parts])
    shares = np.array([len(part.similarity) for part in parts]) / len(similarity)
    values = {
        "similarity": float(similarity.astype(np.float64).mean()),
        "bytes": float(shares @ np.array([part.size for part in parts])),
        "experts": float(shares @ np.array([part.experts for part in parts])),
    }
    return Figures(len(similarity), values, penalty, answers, seconds)
