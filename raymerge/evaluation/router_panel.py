"""A learned router as the report shows it: what it is worth beside similarity, and what changes for each persona."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raymerge.evaluation import search_panel, statistics
from raymerge.evaluation.comparison import Comparison
from raymerge.evaluation.router_differences import Moved, contrasts, most_asked, moved
from raymerge.evaluation.router_weights import Learned
from raymerge.evaluation.rows import Row
from raymerge.evaluation.scores import LEARNED, NEIGHBOURS, examples_in_prompt
from raymerge.evaluation.statistics import Against
from raymerge.evaluation.wording import UNKNOWN, number, signed

ASKED_SHOWN = 15
CHANGES_SHOWN = 10  # personas that gain most, and as many that lose most


@dataclass(frozen=True)
class Change:
    """A persona's similarity by the best row that goes by similarity and by the router, in points, and the experts
    whose share rose and fell most, with by how much."""

    persona: str
    held_out: bool
    before: float
    after: float
    gained: Moved
    lost: Moved


def row_of_run(learned: Learned, comparison: Comparison) -> int | None:
    """Place of the router's run in the comparison, None where it is not compared."""
    return next((i for i, row in enumerate(comparison.rows) if row.name == learned.run), None)


def by_similarity(comparison: Comparison) -> list[Row]:
    """The rows of plain prompts whose weights come from similarity, best first."""
    rows = [row for row in comparison.rows if row.kind == "recipe" and not examples_in_prompt(row.recipe)]
    return [row for row in rows if row.recipe.get("strategy") in NEIGHBOURS - {LEARNED}]


def against(learned: Learned, comparison: Comparison, personas: Sequence[int]) -> list[Against]:
    """The run against the best row by similarity, the reference, and the rows made to compare it with, over personas
    by their places. Empty where the run is not compared, or no persona is named."""
    own = row_of_run(learned, comparison)
    if own is None or not len(personas):
        return []
    names = [row.name for row in by_similarity(comparison)[:1]]
    names += [comparison.reference] if comparison.reference else []
    names += [row.name for row in comparison.rows if row.name.startswith(f"{learned.run}_")]
    scores, drawn = comparison.scores[:, personas], {"resamples": comparison.resamples, "seed": comparison.seed}
    return [
        statistics.against(name, scores[own], scores[comparison.row(name)], **drawn) for name in dict.fromkeys(names)
    ]


def changes(learned: Learned, comparison: Comparison) -> tuple[list[Change], list[Change]]:
    """The personas that gain most over the best row by similarity, and those that lose most, the largest change first;
    empty where there is no such row, or the run is not compared."""
    own, others = row_of_run(learned, comparison), by_similarity(comparison)
    if own is None or not others:
        return [], []
    after, before = comparison.scores[own], comparison.scores[comparison.row(others[0].name)]
    order = np.argsort(before - after, kind="stable").tolist()
    up = [i for i in order if after[i] > before[i]][:CHANGES_SHOWN]
    down = [i for i in reversed(order) if after[i] < before[i]][:CHANGES_SHOWN]
    place = {name: i for i, name in enumerate(learned.personas)}

    def change(i: int) -> Change:
        name = comparison.personas[i]
        gained, lost = moved(learned, place[name]) if name in place else ((), ())
        return Change(name, name in learned.held_out, float(before[i]), float(after[i]), gained, lost)

    return [change(i) for i in up], [change(i) for i in down]


@dataclass(frozen=True)
class OnHeldOut:
    """A row on personas that the router saw (None where there are none), and on those held out, in points; against:
    what the router's run is better by on the latter, None for that run itself."""

    name: str
    seen: float | None
    unseen: float
    against: Against | None


def context(learned: Learned, comparison: Comparison) -> dict[str, Any]:
    """What the page says of a router, beside its figures."""
    seen, unseen = _places(learned, comparison)
    up, down = changes(learned, comparison)
    asked = most_asked(learned)
    own, others = row_of_run(learned, comparison), by_similarity(comparison)
    tuning = learned.tuning
    return {
        "run": learned.run,
        "row": None if own is None else comparison.rows[own],
        "other": others[0].name if others else None,
        "rivals": len(others),
        "against": against(learned, comparison, range(len(comparison.personas))),
        "held_out": _on_held_out(learned, comparison, seen, unseen),
        "seen": len(seen),
        "unseen": len(unseen),
        "shape": learned.shape,
        "candidates": int(learned.nearest.max(initial=-1)) + 1,
        "trained_on": len(learned.trained_on),
        "left_out": len(learned.held_out),
        "nobody": int((~learned.learned.routed).sum()),
        "loss": _losses(learned),
        "best_epoch": learned.best_epoch,
        "epochs": max(0, len(learned.history) - 1),
        "tuning": tuning,
        "tuned": search_panel.said(tuning.winner.values) if tuning else "",
        "tuned_to": search_panel.similarity(tuning.winner) if tuning else None,
        "contrasts": contrasts(learned, comparison),
        "asked": asked[:ASKED_SHOWN],
        "asked_most": max([one.weight for one in asked] + [one.similar_weight for one in asked] + [1e-9]),
        "experts": len(learned.experts),
        "changes": [("Gained most", up), ("Lost most", down)],
        "notes": learned.notes,
    }


def _places(learned: Learned, comparison: Comparison) -> tuple[list[int], list[int]]:
    """Where the personas that the router saw stand in the comparison, and those that it did not."""
    unseen = [i for i, name in enumerate(comparison.personas) if name in learned.held_out]
    return sorted(set(range(len(comparison.personas))) - set(unseen)), unseen


def _on_held_out(
    learned: Learned, comparison: Comparison, seen: Sequence[int], unseen: Sequence[int]
) -> list[OnHeldOut]:
    """The router's run, then the rows that it is compared with. Empty where nobody was held out."""
    own = row_of_run(learned, comparison)
    if own is None or not unseen:
        return []

    def line(name: str, other: Against | None) -> OnHeldOut:
        scores = comparison.scores[comparison.row(name)]
        return OnHeldOut(name, float(scores[seen].mean()) if seen else None, float(scores[unseen].mean()), other)

    return [line(learned.run, None), *(line(one.name, one) for one in against(learned, comparison, unseen))]


def _losses(learned: Learned) -> tuple[str, str, str] | None:
    """Which loss, what it was before training, and at the best epoch; None where it is not known."""
    history, best = learned.history, learned.best_epoch
    for name, what in (("validation", "validation loss"), ("loss", "training loss")):
        if 0 <= best < len(history) and name in history[0] and name in history[best]:
            return what, number(history[0][name], 4), number(history[best][name], 4)
    return None


def in_a_line(learned: Learned, comparison: Comparison) -> str:
    """The router for a terminal: what it learned, and what that is worth."""
    loss, own = _losses(learned), row_of_run(learned, comparison)
    parts = [f"{learned.shape.get('network', UNKNOWN)}, trained on {len(learned.trained_on):,} personas"]
    parts += [f"{loss[0]} {loss[1]} before training, {loss[2]} at its best"] if loss else []
    parts.append("not scored on test examples" if own is None else f"test {number(comparison.rows[own].similarity)}")
    parts += [
        f"{one.outcome} than {one.name}: {signed(one.difference)} [{signed(one.low)} {signed(one.high)}]"
        for one in against(learned, comparison, range(len(comparison.personas)))
    ]
    return "; ".join(parts) + "."
