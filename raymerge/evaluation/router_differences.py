"""How a learned router's weights differ from those of similarity: in figures, in whom they ask, and for a persona."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raymerge.evaluation.comparison import NO_CLUSTER, Comparison
from raymerge.evaluation.router_weights import Learned, Numbers, Values, Weights, effective, in_common, inside
from raymerge.evaluation.wording import number, percent

EXPERTS_NAMED = 3  # that gained, and that lost, weight for a persona
LEAST_MOVED = 0.005  # of a persona's weight: less is not worth naming

Moved = tuple[tuple[str, float], ...]  # experts, and the share that each gained or lost


@dataclass(frozen=True)
class Contrast:
    """A figure of each set of weights in words: by similarity, as learned, as merged (None without a routing table)."""

    what: str
    under: str
    similar: str
    learned: str
    merged: str | None


@dataclass(frozen=True)
class Asked:
    """How much an expert gives to others: in how many personas' mixtures it is, and its weight in all of them, in
    personas; the same by similarity alone."""

    expert: str
    personas: int
    weight: float
    similar_personas: int
    similar_weight: float


def contrasts(learned: Learned, comparison: Comparison) -> list[Contrast]:
    """How the sets of weights differ, one thing after the other."""
    sets = [learned.similar, learned.learned, *([learned.merged] if learned.merged else [])]
    found = [
        _contrast("experts in a mixture", "mean", [number(_mean(one.per_persona()[one.routed])) for one in sets]),
        _contrast("experts that count", "median", [number(_median(effective(one))) for one in sets]),
        _contrast("weight given as by similarity", "mean", [_percent(in_common(one, sets[0])) for one in sets]),
    ]
    labels = _labels(learned, comparison)
    if labels:
        stays = [_percent(inside(one, *labels)) for one in sets]
        found.append(_contrast("weight inside the persona's cluster", "mean", stays))
    others = [of_others(learned, one) for one in sets]
    own = [1 - others[i].per_persona(others[i].share)[one.routed] for i, one in enumerate(sets)]
    if any((share > 1e-9).any() for share in own):
        found.append(_contrast("weight of the own adapter", "mean", [_percent(share) for share in own]))
    totals = [np.sort(one.per_expert(one.share))[::-1] for one in others]
    top = max(1, len(learned.experts) // 10)
    held = [percent(total[:top].sum() / total.sum() if total.sum() else None) for total in totals]
    asked = f"{top:,} of {len(learned.experts):,} experts"
    found.append(_contrast("weight that the most asked tenth gives", asked, held))
    found.append(_contrast("experts that nobody asks", "", [f"{int((total == 0).sum()):,}" for total in totals]))
    return found


def _percent(shares: Values) -> str:
    return percent(_mean(shares))


def _contrast(what: str, under: str, values: Sequence[str]) -> Contrast:
    return Contrast(what, under, values[0], values[1], values[2] if len(values) > 2 else None)


def _labels(learned: Learned, comparison: Comparison) -> tuple[Numbers, Numbers] | None:
    """A number for the cluster of each persona and of each expert, -1 where none is known."""
    if not comparison.clusters:
        return None
    place = {label: i for i, label in enumerate(sorted(set(comparison.clusters) - {NO_CLUSTER}))}
    known = {p: place.get(label, -1) for p, label in zip(comparison.personas, comparison.clusters, strict=True)}
    persona, expert = (
        np.array([known.get(name, -1) for name in those], dtype=np.int64)
        for those in (learned.personas, learned.experts)
    )
    return persona, expert


def _mean(values: Values) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _median(values: Values) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def most_asked(learned: Learned) -> list[Asked]:
    """All experts, the one of the largest weight first; personas' own ones are not counted."""
    now, before = (of_others(learned, weights) for weights in (learned.merged or learned.learned, learned.similar))
    figures = (now.per_expert(), now.per_expert(now.share), before.per_expert(), before.per_expert(before.share))
    order = np.argsort(-figures[1], kind="stable").tolist()
    in_order = [values[order].tolist() for values in figures]
    return [
        Asked(learned.experts[i], int(asked), weight, int(similar), similar_weight)
        for i, asked, weight, similar, similar_weight in zip(order, *in_order, strict=True)
    ]


def of_others(learned: Learned, weights: Weights) -> Weights:
    """The same without personas' own adapters."""
    place = {name: i for i, name in enumerate(learned.experts)}
    own = np.array([place.get(name, -1) for name in learned.personas], dtype=np.int64)
    return weights.without(own[weights.persona] == weights.expert)


def moved(learned: Learned, persona: int) -> tuple[Moved, Moved]:
    """The experts that gained most of a persona's weight, as learned against by similarity, and those that lost most,
    with by how much."""
    difference: dict[int, float] = {}
    for weights, sign in ((learned.learned, 1), (learned.similar, -1)):
        mine = slice(*np.searchsorted(weights.persona, [persona, persona + 1]))
        for expert, share in zip(weights.expert[mine].tolist(), weights.share[mine].tolist(), strict=True):
            difference[expert] = difference.get(expert, 0.0) + sign * share
    ordered = sorted(difference.items(), key=lambda pair: (-pair[1], pair[0]))
    named = [(learned.experts[expert], by) for expert, by in ordered if abs(by) >= LEAST_MOVED]
    gained, lost = [pair for pair in named if pair[1] > 0], [pair for pair in reversed(named) if pair[1] < 0]
    return tuple(gained[:EXPERTS_NAMED]), tuple(lost[:EXPERTS_NAMED])
