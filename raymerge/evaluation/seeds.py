"""How much a row depends on the seed that its adapters were trained with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raymerge.evaluation.scores import Aligned, RunScores
from raymerge.evaluation.statistics import Values
from raymerge.evaluation.wording import signed


@dataclass(frozen=True)
class SeedSpread:
    """A row trained with several seeds, in points: standard deviations (of a sample) over the seeds.

    similarity_sd: of its mean similarity. differences: to the reference trained with the same seed, the seed of the
    comparison first, and difference_sd of them; None and empty where the reference is not known for the same seeds.
    seeds, compared: number of seeds, and of those with a difference.
    """

    seeds: int
    similarity_sd: float
    compared: int
    difference_sd: float | None
    differences: tuple[float, ...]


def spreads_over_seeds(
    runs: Sequence[RunScores], aligned: Aligned, scores: Values, place: int | None
) -> list[SeedSpread | None]:
    """The spread of each run over the training seeds it was scored with, None where there is one seed only.

    aligned, scores: the personas and examples that the comparison stands on, and (runs, personas) points of them; other
    seeds are read over the same ones, and left out where they lack some. place: the reference row, or None.
    """
    by_seed = [seed_means(run, aligned)[0] for run in runs]
    return [_spread(by_seed, scores.mean(axis=1), i, place) for i in range(len(runs))]


def seed_means(run: RunScores, aligned: Aligned) -> tuple[dict[int, float], dict[int, int]]:
    """Mean similarity x 100 of a run trained with other seeds, over the aligned personas and examples; and the seeds
    that lack some of them, with the number of personas they lack."""
    index = {name: place for place, name in enumerate(aligned.personas)}
    width = 1 + int(aligned.example.max(initial=0))
    wanted = aligned.person * width + aligned.example
    means: dict[int, float] = {}
    lacking: dict[int, int] = {}
    for seed, table in sorted(run.by_seed.items()):
        person = np.array([index.get(name, -1) for name in table["persona"].to_pylist()], dtype=np.int64)
        example = table["example"].to_numpy().astype(np.int64)
        similarity = np.array(table["similarity"].to_pylist(), dtype=np.float64)
        known = (person >= 0) & (example < width) & np.isfinite(similarity)
        keys, values = person[known] * width + example[known], similarity[known]
        there = np.isin(wanted, keys)
        if not there.all():
            lacking[seed] = len(np.unique(aligned.person[~there]))
            continue
        order = np.argsort(keys, kind="stable")
        picked = values[order[np.searchsorted(keys[order], wanted)]]
        totals = np.bincount(aligned.person, weights=picked) / np.bincount(aligned.person)
        means[seed] = 100 * float(totals.mean())
    return means, lacking


def _spread(by_seed: Sequence[Mapping[int, float]], means: Values, row: int, place: int | None) -> SeedSpread | None:
    mine = by_seed[row]
    if not mine:
        return None
    similarities = [float(means[row]), *(mine[seed] for seed in sorted(mine))]
    differences: list[float] = []
    if place is not None and place != row:
        theirs = by_seed[place]
        differences = [mine[seed] - theirs[seed] for seed in sorted(mine) if seed in theirs]
        differences = [float(means[row] - means[place]), *differences] if differences else []
    return SeedSpread(
        seeds=len(similarities),
        similarity_sd=float(np.std(similarities, ddof=1)),
        compared=len(differences),
        difference_sd=float(np.std(differences, ddof=1)) if differences else None,
        differences=tuple(differences),
    )


def describe_spread(name: str, reference: str, spread: SeedSpread | None) -> tuple[str | None, str | None]:
    """What the verdict says of a row's gain over the training seeds, and the warning where the gain is no larger than
    the spread; None where there is nothing to say."""
    if spread is None or spread.difference_sd is None:
        return None, None
    mean, sd = float(np.mean(spread.differences)), spread.difference_sd
    each = ", ".join(signed(value) for value in spread.differences)
    said = f"Over {spread.compared} training seeds {name} is at {signed(mean, 2)} ± {sd:.2f} points against {reference}"
    said += f" ({each}; ± is the standard deviation over seeds, which the intervals over personas do not hold)."
    if sd < abs(mean):
        return said, None
    warning = f"{name}: the spread over training seeds ({sd:.1f} points) is as large as its gain ({signed(mean)})."
    return said, f"{warning} Another training may turn it round."
