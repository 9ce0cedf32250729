"""A learned router as it is read: its weights of experts for personas beside those of similarity alone.

Three sets of weights stand side by side. *By similarity*: a softmax over the most similar experts, which a router
begins with. *As learned*: what it says of the same experts. *As merged*: the routing table of the run that is scored,
after temperature and own weight were tuned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymerge import storage
from raymerge.errors import EvaluationError
from raymerge.evaluation.search_panel import Searched, read_searched
from raymerge.manifest import read_manifest
from raymerge.routing.router_shape import CANDIDATES, CONFIG, TUNED
from raymerge.routing.table import RoutingTable

Numbers = NDArray[np.int64]
Values = NDArray[np.float64]

TUNING, TABLE = "tuning", "routing.parquet"
COLUMNS = ("persona", "expert", "similarity", "learned", "similar")


@dataclass(frozen=True, eq=False)
class Weights:
    """Who contributes which share to whom; pairs without a share are left out, and a persona's shares sum to 1.

    persona, expert: int64 (n,), numbers in lists that are kept elsewhere, ascending by persona, then expert. share:
    float64 (n,), above 0. personas, experts: how many there are in the lists.
    """

    persona: Numbers
    expert: Numbers
    share: Values
    personas: int
    experts: int

    def per_persona(self, values: Values | None = None) -> Values:
        """Sum of values (n,) over each persona's pairs, (personas,); how many there are, if none are given."""
        return np.bincount(self.persona, weights=values, minlength=self.personas).astype(np.float64)

    def per_expert(self, values: Values | None = None) -> Values:
        """The same over each expert's pairs, (experts,)."""
        return np.bincount(self.expert, weights=values, minlength=self.experts).astype(np.float64)

    @property
    def routed(self) -> NDArray[np.bool_]:
        """Whether a persona has any expert, (personas,)."""
        return np.asarray(self.per_persona() > 0)

    def without(self, pairs: NDArray[np.bool_]) -> "Weights":
        """The same with some pairs (n,) left out, and shares that no longer sum to 1."""
        kept = ~pairs
        return Weights(self.persona[kept], self.expert[kept], self.share[kept], self.personas, self.experts)


def shares(persona: Numbers, expert: Numbers, weight: Values, personas: int, experts: int) -> Weights:
    """Weights (n,) >= 0 of pairs in any order as shares; those of 0 are left out."""
    there = np.flatnonzero(weight > 0)
    there = there[np.lexsort((expert[there], persona[there]))]
    persona, expert, weight = persona[there], expert[there], weight[there]
    total = np.bincount(persona, weights=weight, minlength=personas)
    return Weights(persona, expert, weight / total[persona], personas, experts)


def effective(weights: Weights) -> Values:
    """How many experts count for each persona, (personas,): exp of the entropy of its shares, which is k for k equal
    ones. NaN for a persona without any."""
    entropy = weights.per_persona(-weights.share * np.log(weights.share))
    return np.where(weights.routed, np.exp(entropy), np.nan)


def in_common(one: Weights, other: Weights) -> Values:
    """The share that two sets of weights give alike to each persona's experts, (personas,): 1 if they are the same, 0
    if they have no expert in common. NaN for a persona that one of them does not route."""
    here, there = (weights.persona * one.experts + weights.expert for weights in (one, other))
    _, mine, theirs = np.intersect1d(here, there, assume_unique=True, return_indices=True)
    both = np.minimum(one.share[mine], other.share[theirs])
    found = np.bincount(one.persona[mine], weights=both, minlength=one.personas)
    return np.where(one.routed & other.routed, found, np.nan)


def inside(weights: Weights, persona_label: Numbers, expert_label: Numbers) -> Values:
    """The share that stays in each persona's cluster, (personas,). Labels: a number for each cluster, -1 where there is
    none. NaN for a persona without a cluster or without experts."""
    label = persona_label[weights.persona]
    stays = np.where((label >= 0) & (label == expert_label[weights.expert]), weights.share, 0.0)
    return np.where(weights.routed & (persona_label >= 0), weights.per_persona(stays), np.nan)


def by_nearness(persona: Numbers, similarity: Values, personas: int) -> Numbers:
    """How many of a persona's candidates are more similar to it than each one, (n,): 0 for the most similar."""
    order = np.lexsort((-similarity, persona))
    first = np.cumsum(np.bincount(persona, minlength=personas)) - np.bincount(persona, minlength=personas)
    found = np.empty(len(persona), dtype=np.int64)
    found[order] = np.arange(len(persona)) - first[persona[order]]
    return found


@dataclass(frozen=True, eq=False)
class Learned:
    """A trained router, and the run that it made.

    run: name of the run. said: what router.json says: shape, settings, held_out, history, best_epoch. trained_on: the
    personas whose rows it learned from. notes: what people should know. personas, experts: names that numbers mean,
    sorted. similar, learned, merged: the three sets of weights, merged None where the run has no routing table.
    nearest: int64 (n,), of all candidates how many are more similar to the persona, with their shares `near_similar`
    and `near_learned`, (n,). tuning: the search of what stands around the network, None where there was none.
    """

    run: str
    said: Mapping[str, Any]
    trained_on: tuple[str, ...]
    notes: tuple[str, ...]
    personas: tuple[str, ...]
    experts: tuple[str, ...]
    similar: Weights
    learned: Weights
    merged: Weights | None
    nearest: Numbers
    near_similar: Values
    near_learned: Values
    tuning: Searched | None

    @property
    def shape(self) -> Mapping[str, Any]:
        """How the network is made, and how many experts it looks at and keeps."""
        shape = self.said.get("shape", {})
        return shape if isinstance(shape, Mapping) else {}

    @property
    def best_epoch(self) -> int:
        """The epoch that is kept, 0 for the network before training."""
        return int(self.said.get("best_epoch") or 0)

    @property
    def held_out(self) -> frozenset[str]:
        """Personas that the router never saw."""
        return frozenset(self.said.get("held_out") or ())

    @property
    def history(self) -> list[Mapping[str, float]]:
        """Figures of each epoch, the first before training; those that are no number are left out."""
        epochs = self.said.get("history") or ()
        return [{k: float(v) for k, v in e.items() if v is not None and np.isfinite(v)} for e in epochs]


def read_learned(router_folder: str, run_folder: str) -> Learned | None:
    """The router of a folder with the run it made, None where there is no whole router. Until it was tuned, a run
    that is there is an earlier one's, and left out.

    Raises StorageError, RoutingError, and EvaluationError for candidates that cannot be.
    """
    manifest = read_manifest(router_folder)
    if manifest is None:
        return None
    said = storage.read_json(storage.join(router_folder, CONFIG))
    where = storage.join(router_folder, CANDIDATES)
    table = _candidates(storage.read_parquet(where), where)
    location = storage.join(run_folder, TABLE)
    is_its_own = storage.exists(storage.join(router_folder, TUNED)) and storage.exists(location)
    merged = RoutingTable.read(location) if is_its_own else None
    (who, persona), (what, expert) = _coded(table["persona"]), _coded(table["expert"])
    personas = tuple(sorted({*who, *(merged.personas if merged else ())}))
    experts = tuple(sorted({*manifest["experts"], *what, *(merged.experts if merged else ())}))
    persona, expert = _places(who, personas)[persona], _places(what, experts)[expert]
    size = (len(personas), len(experts))
    similarity, learned, similar = (_figures(table[name]) for name in ("similarity", "learned", "similar"))
    return Learned(
        run=storage.name_of(run_folder),
        said=said,
        trained_on=tuple(manifest["personas"]),
        notes=tuple(manifest["notes"]),
        personas=personas,
        experts=experts,
        similar=shares(persona, expert, similar, *size),
        learned=shares(persona, expert, learned, *size),
        merged=None if merged is None else _merged(merged, personas, experts),
        nearest=by_nearness(persona, similarity, len(personas)),
        near_similar=_normalised(persona, similar),
        near_learned=_normalised(persona, learned),
        tuning=read_searched(storage.join(router_folder, TUNING)),
    )


def _candidates(table: pa.Table, where: str) -> pa.Table:
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise EvaluationError(
            f"{where}: there is no column {missing[0]!r}.\nFound: {', '.join(table.column_names)}. "
            "Train the router again: `raymerge router PROJECT --restart`."
        )
    for name in ("learned", "similar"):
        values = _figures(table[name])
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if len(bad):
            persona, expert = (table[of][int(bad[0])].as_py() for of in ("persona", "expert"))
            raise EvaluationError(
                f"{where}: the {name} weight of {expert} for {persona} is {values[bad[0]]}.\n"
                "Expected a number of 0 or more. Train the router again: `raymerge router PROJECT --restart`."
            )
    return table


def _coded(column: pa.ChunkedArray) -> tuple[list[str], Numbers]:
    found = column.combine_chunks().cast(pa.string()).dictionary_encode()
    return found.dictionary.to_pylist(), found.indices.to_numpy().astype(np.int64)


def _places(names: Sequence[str], among: Sequence[str]) -> Numbers:
    place = {name: i for i, name in enumerate(among)}
    return np.array([place[name] for name in names], dtype=np.int64)


def _figures(column: pa.ChunkedArray) -> Values:
    return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)


def _normalised(persona: Numbers, weight: Values) -> Values:
    total = np.bincount(persona, weights=weight)[persona] if len(persona) else weight
    return np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)


def _merged(table: RoutingTable, personas: Sequence[str], experts: Sequence[str]) -> Weights:
    rows = [table.rows[i] for i in table.row_of]
    persona = np.repeat(_places(table.personas, personas), [len(row.experts) for row in rows])
    expert = _places(table.experts, experts)[np.concatenate([np.zeros(0, np.int32), *(row.experts for row in rows)])]
    weight = np.concatenate([np.zeros(0), *(row.weights for row in rows)])
    return shares(persona, expert, weight, len(personas), len(experts))
