"""What the report shows of single personas: a fixed choice of answers, and the routing tables as maps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raymerge.evaluation.scores import Aligned, RunScores
from raymerge.evaluation.statistics import Values

EXAMPLES_SHOWN = 3
CELLS = 250  # a map has at most this many rows and columns; more personas share a cell


@dataclass(frozen=True)
class Answer:
    """What one run answered; similarity in points. text is None where the run keeps no answers."""

    run: str
    text: str | None
    similarity: float
    exact: bool


@dataclass(frozen=True)
class Question:
    """One test example with every run's answer, in the order of the rows."""

    prompt: str
    reference: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Sample:
    """A persona, why it is shown, and up to three of its examples. difference: points, None without reference."""

    persona: str
    why: str
    row: str
    difference: float | None
    questions: tuple[Question, ...]


@dataclass(frozen=True, eq=False)
class RoutingMap:
    """A routing table with personas and experts sorted by cluster and name.

    weights: float32 (cells, cells), what a persona of the row's cell gives to all experts of the column's cell;
    personas_per_cell is 1 up to 250 personas. bounds: label, begin and end of each cluster, from 0 to 1.
    own_cluster: share of the weight that stays in the persona's cluster, by_chance: what equal weights on all experts
    would give; None without clusters.
    """

    run: str
    weights: NDArray[np.float32]
    personas: int
    personas_per_cell: float
    bounds: tuple[tuple[str, float, float], ...]
    own_cluster: float | None
    by_chance: float | None


def choose_samples(
    runs: Sequence[RunScores], aligned: Aligned, scores: Values, row: int, place: int | None
) -> tuple[Sample, ...]:
    """The personas of the largest gain, the median one and the largest loss of `row` against the reference.

    scores: (runs, personas), points. Without a reference, the best, median and worst by similarity. Of each persona the
    examples that show the same most clearly. Empty where no run keeps answers.
    """
    if not any(run.generations is not None for run in runs):
        return ()
    judged = scores[row] if place is None else scores[row] - scores[place]
    order = np.argsort(judged, kind="stable")
    places = [(order[-1], "largest gain"), (order[(len(order) - 1) // 2], "median persona"), (order[0], "largest loss")]
    if place is None:
        places = [(i, f"{name} similarity") for (i, _), name in zip(places, ("best", "median", "worst"), strict=True)]
    elif judged[order[0]] >= 0:
        places[2] = (order[0], "smallest gain")
    seen: set[int] = set()
    samples = []
    for person, why in places:
        if int(person) not in seen:
            seen.add(int(person))
            shown = _examples(aligned, int(person), row, place, why)
            difference = float(judged[person]) if place is not None else None
            questions = _questions(runs, aligned, int(person), shown)
            samples.append(Sample(aligned.personas[person], why, runs[row].name, difference, questions))
    return tuple(samples)


def _examples(aligned: Aligned, person: int, row: int, place: int | None, why: str) -> list[int]:
    answers = np.flatnonzero(aligned.person == person)
    similarity = aligned.metrics["similarity"]
    judged = similarity[row, answers] - (0 if place is None else similarity[place, answers])
    if why.startswith("median"):
        judged = np.abs(judged - judged.mean())
    elif why in ("largest gain", "best similarity"):
        judged = -judged
    return [int(i) for i in answers[np.argsort(judged, kind="stable")[:EXAMPLES_SHOWN]]]


def _questions(
    runs: Sequence[RunScores], aligned: Aligned, person: int, answers: Sequence[int]
) -> tuple[Question, ...]:
    persona = aligned.personas[person]
    texts = [_texts(run, persona) for run in runs]
    questions = []
    for answer in answers:
        example = int(aligned.example[answer])
        asked = next((t[example] for t in texts if example in t), ("", "", ""))
        given = tuple(
            Answer(
                run.name,
                known[example][2] if example in known else None,
                100 * float(aligned.metrics["similarity"][i, answer]),
                bool(aligned.metrics["exact"][i, answer] == 1),
            )
            for i, (run, known) in enumerate(zip(runs, texts, strict=True))
        )
        questions.append(Question(asked[0], asked[1], given))
    return tuple(questions)


def _texts(run: RunScores, persona: str) -> dict[int, tuple[str, str, str]]:
    if run.generations is None:
        return {}
    mine = run.generations.filter(pc.equal(run.generations["persona"], persona))
    columns = [mine[c].to_pylist() for c in ("example", "prompt", "reference", "generated")]
    return {int(example): (prompt, reference, text) for example, prompt, reference, text in zip(*columns, strict=True)}


def map_routing(
    runs: Sequence[RunScores], personas: Sequence[str], clusters: Mapping[str, str] | None
) -> tuple[RoutingMap, ...]:
    """Maps of the routing tables in which personas contribute to personas; others have nothing to show."""
    labels = clusters or {}
    ordered = sorted(personas, key=lambda p: (labels.get(p, "~"), p))
    maps = [_map(run, ordered, clusters) for run in runs if run.routing is not None]
    return tuple(m for m in maps if m is not None)


def _map(run: RunScores, ordered: Sequence[str], clusters: Mapping[str, str] | None) -> RoutingMap | None:
    assert run.routing is not None
    where = pa.array(ordered, pa.string())
    row = pc.index_in(run.routing["persona"].cast(pa.string()), value_set=where).to_numpy()
    column = pc.index_in(run.routing["expert"].cast(pa.string()), value_set=where).to_numpy()
    weight = np.nan_to_num(run.routing["weight"].cast(pa.float64()).to_numpy())  # an empty row is the base
    known = np.isfinite(row) & np.isfinite(column)
    strange = np.isfinite(row) & ~known
    if not known.any() or np.abs(weight[strange]).sum() > np.abs(weight[known]).sum():
        return None
    row, column, weight = row[known].astype(np.int64), column[known].astype(np.int64), weight[known]
    count = len(ordered)
    cells = min(CELLS, count)
    flat = (row * cells // count) * cells + column * cells // count
    summed = np.bincount(flat, weights=weight, minlength=cells * cells).reshape(cells, cells)
    per_cell = count / cells
    own, chance = _within(row, column, weight, ordered, clusters) if clusters else (None, None)
    return RoutingMap(
        run.name, (summed / per_cell).astype(np.float32), count, per_cell, _bounds(ordered, clusters), own, chance
    )


def _within(
    row: NDArray[np.int64],
    column: NDArray[np.int64],
    weight: NDArray[np.float64],
    ordered: Sequence[str],
    clusters: Mapping[str, str],
) -> tuple[float, float]:
    _, code = np.unique([clusters.get(p, "~") for p in ordered], return_inverse=True)
    share = np.bincount(code) / len(code)
    inside = np.abs(weight)[code[row] == code[column]].sum() / np.abs(weight).sum()
    return float(inside), float((share**2).sum())


def _bounds(ordered: Sequence[str], clusters: Mapping[str, str] | None) -> tuple[tuple[str, float, float], ...]:
    if not clusters:
        return ()
    labels = [clusters.get(p, "~") for p in ordered]
    found = []
    for label in sorted(set(labels)):
        first = labels.index(label)
        last = first + labels.count(label)
        found.append((label if label != "~" else "no cluster", first / len(labels), last / len(labels)))
    return tuple(found)
