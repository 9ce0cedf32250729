"""The strategies, by name. Most are presets of `neighbours.similar`; the controls take another strategy's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from raymerge.errors import RoutingError
from raymerge.routing import controls
from raymerge.routing.inputs import RoutingInputs, check_inputs, labels_of, make_space
from raymerge.routing.lines import Rows
from raymerge.routing.named import experts_in, named, parse_weights
from raymerge.routing.neighbours import equal, hierarchical, make_row, similar
from raymerge.routing.parameters import TUNED, refuse, resolve
from raymerge.routing.selective import choose
from raymerge.routing.table import RoutingTable

SOFT_MASS = 0.99  # `soft` takes no more experts than make up this share of the weights,
SOFT_EXPERTS = 256  # and no more than this many, so that no table is personas x experts

Routed = tuple[Rows, list[str]]
SIMILARITY: Mapping[str, Any] = {"temperature": 0.1, "self_weight": 0.0, "centred": True}


@dataclass(frozen=True)
class Strategy:
    """A way to say who contributes.

    parameters: names and defaults. needs: of embeddings, clusters, own (the personas' adapters), unified,
    cluster_adapters; a control also needs what it controls needs. function: resolved parameters, inputs -> rows, notes.
    """

    name: str
    summary: str
    needs: frozenset[str]
    function: Callable[[Mapping[str, Any], RoutingInputs], Routed]
    parameters: Mapping[str, Any] = field(default_factory=dict)


def _similar(parameters: Mapping[str, Any], inputs: RoutingInputs, *, scope: Literal["all", "cluster"]) -> Routed:
    space, notes = make_space(inputs, parameters["centred"])
    rows, more = similar(
        space, scope=scope, k=parameters.get("k", SOFT_EXPERTS), temperature=parameters["temperature"],
        self_weight=parameters["self_weight"], mass=1.0 if "k" in parameters else SOFT_MASS,
    )  # fmt: skip
    return rows, notes + more


def _hierarchical(parameters: Mapping[str, Any], inputs: RoutingInputs) -> Routed:
    space, notes = make_space(inputs, parameters["centred"])
    rows, more = hierarchical(space, **{name: value for name, value in parameters.items() if name != "centred"})
    return rows, notes + more


def _equal(parameters: Mapping[str, Any], inputs: RoutingInputs, *, scope: Literal["all", "cluster"]) -> Routed:
    return equal(inputs, scope=scope)


def _own(parameters: Mapping[str, Any], inputs: RoutingInputs) -> Routed:
    position = {name: i for i, name in enumerate(inputs.experts)}
    found = [np.array([position[name]] if name in position else [], np.int64) for name in inputs.personas]
    rows = tuple(make_row(experts, np.ones(len(experts))) for experts in found)
    without = [name for name in inputs.personas if name not in position]
    notes = [f"{without[0]}: has no adapter and gets the base ({len(without)} such personas)"] if without else []
    return Rows(tuple(inputs.experts), rows, np.arange(len(rows), dtype=np.int32)), notes


def _one_for_all(parameters: Mapping[str, Any], inputs: RoutingInputs, *, expert: str | None) -> Routed:
    count = int(expert is not None)
    row = make_row(np.arange(count), np.ones(count), adapter=expert)
    return Rows((expert,) if expert else (), (row,), np.zeros(len(inputs.personas), dtype=np.int32)), []


def _cluster_trained(parameters: Mapping[str, Any], inputs: RoutingInputs) -> Routed:
    own = labels_of(inputs, inputs.personas)
    labels = tuple(sorted(set(own)))
    rows = tuple(make_row(np.array([i]), np.ones(1), adapter=label) for i, label in enumerate(labels))
    return Rows(labels, rows, np.array([labels.index(label) for label in own], dtype=np.int32)), []


def _hybrid(parameters: Mapping[str, Any], inputs: RoutingInputs) -> Routed:
    part = float(parameters["own_weight"])
    names = tuple(sorted({"unified", *inputs.experts}))
    position = {name: i for i, name in enumerate(names)}
    rows = []
    for persona in inputs.personas:
        own = part if persona in inputs.experts else 0.0
        shares = {position["unified"]: 1.0 - own, position.get(persona, -1): own}
        kept = {expert: share for expert, share in shares.items() if share > 0}
        rows.append(make_row(np.array(list(kept), np.int64), np.array(list(kept.values()))))
    without = sorted(set(inputs.personas) - set(inputs.experts))
    notes = [f"{without[0]}: has no adapter and gets the unified one ({len(without)} such personas)"] if without else []
    return Rows(names, tuple(rows), np.arange(len(rows), dtype=np.int32)), notes


def _learned_router(parameters: Mapping[str, Any], inputs: RoutingInputs) -> Routed:
    from raymerge.routing.learned import learned_router  # imports torch

    return learned_router(parameters, inputs)


def _selective(parameters: Mapping[str, Any], inputs: RoutingInputs) -> Routed:
    choice = choose(inputs.personas, inputs.candidates, parameters["sure"])
    given = [inputs.candidates[choice.chosen[p]].experts[p] if p in choice.chosen else None for p in inputs.personas]
    distinct = sorted({one for one in given if one is not None})
    names = tuple(expert for expert, _ in distinct)
    rows = [make_row(np.array([i]), np.array([weight]), adapter=name) for i, (name, weight) in enumerate(distinct)]
    rows.append(make_row(np.zeros(0, np.int64), np.zeros(0)))  # the base
    row_of = [distinct.index(one) if one is not None else len(distinct) for one in given]
    told = f"{choice.best} is best for the population; {len(choice.moved)} personas get another"
    return Rows(names, tuple(rows), np.array(row_of, dtype=np.int32)), [told]


def _same(parameters: Mapping[str, Any], inputs: RoutingInputs) -> Routed:
    inner = parameters["of"]
    given = {key: value for key, value in inner.items() if key != "strategy"}
    taught = [name for name in inputs.experts if inputs.trainable is None or name in inputs.trainable]
    return STRATEGIES[inner["strategy"]].function(given, replace(inputs, experts=taught))


def _everybody(parameters: Mapping[str, Any], inputs: RoutingInputs) -> Routed:
    names = tuple(inputs.personas)
    able = [inputs.trainable is None or name in inputs.trainable for name in names]
    rows = tuple(
        make_row(np.array([i] if there else [], np.int64), np.ones(int(there)), adapter=name if there else None)
        for i, (name, there) in enumerate(zip(names, able, strict=True))
    )
    without = [name for name, there in zip(names, able, strict=True) if not there]
    notes = (
        [f"{without[0]}: has no training examples and gets the base ({len(without)} such personas)"] if without else []
    )
    return Rows(names, rows, np.arange(len(rows), dtype=np.int32)), notes


def _control(
    parameters: Mapping[str, Any],
    inputs: RoutingInputs,
    *,
    spoil: Callable[[Rows, RoutingInputs, tuple[int, int]], Routed],
) -> Routed:
    inner = parameters["of"]
    given = {key: value for key, value in inner.items() if key != "strategy"}
    rows, notes = STRATEGIES[inner["strategy"]].function(given, inputs)
    spoilt, more = spoil(rows, inputs, (inputs.seed, parameters["seed"]))
    return spoilt, notes + more


def _named(*strategies: Strategy) -> Mapping[str, Strategy]:
    return MappingProxyType({strategy.name: strategy for strategy in strategies})


def _make(name: str, summary: str, needs: str, function: Callable[..., Routed], **parameters: Any) -> Strategy:
    return Strategy(name, summary, frozenset(needs.split()), function, MappingProxyType(parameters))


def _make_control(name: str, summary: str, needs: str, spoil: Callable[..., Routed]) -> Strategy:
    return _make(name, summary, needs, partial(_control, spoil=spoil), of=None, seed=0)


AS_TRAINED = ("base", "own", "unified", "cluster_trained")
WITHOUT_NEIGHBOURS = ("selective", "hybrid", "neighbours_trained", "prefix")

CONTROLS: Mapping[str, Strategy] = _named(
    _make_control("random_k", "X's weights on random experts", "own", controls.random_k),
    _make_control(
        "random_cluster", "X's weights on experts of another cluster", "own clusters", controls.random_cluster
    ),
    _make_control("shuffled", "another persona's row of X", "", controls.shuffled),
)

STRATEGIES: Mapping[str, Strategy] = _named(
    _make("simple_average", "all adapters, equally", "own", partial(_equal, scope="all")),
    _make("cluster_average", "all of the persona's cluster, equally", "own clusters", partial(_equal, scope="cluster")),
    _make("top_k", "the k most similar of all", "own embeddings", partial(_similar, scope="all"), k=5, **SIMILARITY),
    _make("sparse_moe", "the k most similar within the cluster", "own embeddings clusters",
          partial(_similar, scope="cluster"), k=5, **SIMILARITY),
    _make("soft", "all, by similarity", "own embeddings", partial(_similar, scope="all"), **SIMILARITY),
    _make("hierarchical", "the most similar clusters, the k most similar in each", "own embeddings clusters",
          _hierarchical, top_clusters=2, k=3, **SIMILARITY),
    _make("own", "the persona's own adapter", "own", _own),
    _make("unified", "the adapter trained on all", "unified", partial(_one_for_all, expert="unified")),
    _make("cluster_trained", "the adapter trained on its cluster", "clusters cluster_adapters", _cluster_trained),
    _make("base", "no adapter", "", partial(_one_for_all, expert=None)),
    _make("learned_router", "what a trained router says", "own embeddings clusters", _learned_router,
          router=None, k=None, temperature=1.0, self_weight=0.0),
    _make("named", "the experts that it names, at the weights that it gives them", "", named, weights=None),
    _make("hybrid", "the unified adapter and the persona's own", "own unified", _hybrid, own_weight=TUNED),
    _make("selective", "the best of a few recipes, chosen on validation examples", "", _selective,
          among=None, sure=0.8),
    _make("neighbours_trained", "one trained on the examples of X's experts", "", _same, of=None, epochs=None),
    _make("prefix", "the persona's own prefix (prefix tuning)", "", _everybody,
          tokens=8, epochs=None, learning_rate=1e-2),
    *CONTROLS.values(),
)  # fmt: skip


def resolve_parameters(strategy: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a strategy, defaults filled in, also those of what a control controls.

    Raises RoutingError for an unknown strategy or parameter, with the allowed ones, and for an impossible value.
    """
    if strategy not in STRATEGIES:
        refuse("routing", "strategy", strategy, STRATEGIES)
    resolved = resolve(strategy, STRATEGIES[strategy].parameters, given)
    if strategy == "named":
        resolved["weights"] = parse_weights(resolved["weights"])
    if strategy == "learned_router" and resolved["self_weight"] == "similarity":
        raise RoutingError(
            "strategy learned_router: self_weight is 'similarity'.\nExpected a number from 0 to 1: a router has not "
            "learned what to give the persona's own adapter, which was hidden from it."
        )
    if "of" in resolved:
        inner = {key: value for key, value in resolved["of"].items() if key != "strategy"}
        name = str(resolved["of"]["strategy"])
        refused = (*WITHOUT_NEIGHBOURS, *((*AS_TRAINED, "named") if strategy == "neighbours_trained" else ()))
        if name in CONTROLS or name in refused:
            what = "itself a control" if name in CONTROLS else "which asks no neighbours"
            raise RoutingError(f"strategy {strategy}: `of` is {name}, {what}.\nExpected any other strategy.")
        resolved["of"] = {"strategy": name, **resolve_parameters(name, inner)}
    return resolved


def needs_of(strategy: str, parameters: Mapping[str, Any]) -> frozenset[str]:
    """What a strategy needs, and what it controls. Raises as `resolve_parameters`.

    Of `named` that is the trained adapters it names; those of single personas are not trained for it.
    """
    resolved = resolve_parameters(strategy, parameters)
    inner = [resolved["of"]["strategy"]] if "of" in resolved else list((resolved.get("among") or {}).values())
    needs = STRATEGIES[strategy].needs.union(*(STRATEGIES[name].needs for name in inner))
    for name in experts_in(resolved.get("of", resolved).get("weights") or {}):
        needs |= {"unified"} if name == "unified" else {"cluster_adapters"} if name.startswith("cluster_") else set()
    return needs - {"own"} if strategy == "neighbours_trained" else needs  # it asks for examples, not for adapters


def route(strategy: str, parameters: Mapping[str, Any], inputs: RoutingInputs) -> tuple[RoutingTable, tuple[str, ...]]:
    """The routing table of a strategy, and notes: what a reader would not expect of it.

    The same inputs give the same table, in whatever order the names come. Raises RoutingError for an unknown strategy
    or parameter, an input that the strategy needs and does not have, a persona without embedding or cluster.
    """
    resolved = resolve_parameters(strategy, parameters)
    checked = check_inputs(inputs)
    rows, notes = STRATEGIES[strategy].function(resolved, checked)
    table = RoutingTable.build(checked.personas, rows, f"strategy {strategy}")
    return replace(table, clusters=checked.clusters.labels if checked.clusters else None), tuple(notes)
