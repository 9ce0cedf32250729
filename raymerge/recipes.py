"""A recipe: strategy + method + scale + rank, each with its parameters, and a name.

The allowed parameters come from the registries of strategies and methods, so that a mistyped one is answered with
the right ones. A recipe is plain data: its canonical form is `recipe.json` in the run folder, and its digest is part
of the key of everything made with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from raymerge.errors import MergeError, RankError, RecipeError, RoutingError, unknown
from raymerge.merging.methods import METHODS
from raymerge.merging.methods.parameters import plain
from raymerge.merging.rank import parse_rank
from raymerge.merging.scale import Scale, parse_offsets, parse_scale, scaled
from raymerge.routing.named import experts_in
from raymerge.routing.parameters import TUNED
from raymerge.routing.strategies import STRATEGIES, needs_of, resolve_parameters

DEFAULT_RANK: Mapping[str, Any] = {"energy": 0.95, "max": 64}
REFERENCES = ("base", "own", "unified", "cluster_trained")  # adapters as trained: nothing is merged
AS_TRAINED = (*REFERENCES, "selective", "neighbours_trained", "prefix")  # by default unscaled and uncompressed
UNSCALED = ("base", "selective", "prefix")  # there is no delta to scale, or it was scaled before
RETRIEVED = "{prompt}\n{response}\n\n"  # how an example in a prompt is written, unless said
DTYPES = ("float64", "float32", "bfloat16", "float16")
KEYS = ("strategy", "method", "scale", "scale_offsets", "rank", "anchor", "dtype", "embedding", "retrieval")


@dataclass(frozen=True)
class Recipe:
    """What a run carries out.

    scale: factor on the merged delta, or `match_norm`, or {match_norm: f}, or `tuned` on validation examples.
    scale_offsets: {clusters: {label: d}, layers: [d, ...]}, or None: exp(d) multiplies the scale in a cluster, and the
    weights at places spread over the depth. rank: see `merging.rank.parse_rank`. anchor: `auto` (what the experts
    record as their start), `none`, or the location of an adapter. embedding: a parquet file of persona vectors that
    stands in for the project's embedding, or None. retrieval: {examples, format} of similar training examples in every
    prompt, or None. strategy_parameters hold the resolved inner recipe of a control under `of`.
    """

    name: str
    strategy: str
    strategy_parameters: Mapping[str, Any] = field(default_factory=dict)
    method: str = "linear"
    method_parameters: Mapping[str, Any] = field(default_factory=dict)
    scale: Scale | Literal["tuned"] = "match_norm"
    rank: Any = field(default_factory=lambda: dict(DEFAULT_RANK))
    anchor: str = "auto"
    dtype: str | None = None
    embedding: str | None = None
    retrieval: Mapping[str, Any] | None = None
    scale_offsets: Mapping[str, Any] | None = None

    @property
    def tuned(self) -> tuple[str, ...]:
        """What validation examples have still to say, of `factor` (times match_norm) and `own_weight`."""
        unknown = {"factor": self.scale == TUNED, "own_weight": self.strategy_parameters.get("own_weight") == TUNED}
        return tuple(name for name, is_unknown in unknown.items() if is_unknown)

    def resolved(self, values: Mapping[str, float]) -> Recipe:
        """The same with what was tuned: `factor` and `own_weight`, whichever are given."""
        scale = scaled("match_norm", values["factor"]) if "factor" in values else self.scale
        parameters = dict(self.strategy_parameters)
        if "own_weight" in values:
            parameters["own_weight"] = values["own_weight"]
        return replace(self, scale=scale, strategy_parameters=parameters)

    @property
    def needs(self) -> frozenset[str]:
        """Inputs its strategy needs, of: embeddings, clusters, own, unified, cluster_adapters."""
        by_cluster = {"clusters"} & (self.scale_offsets or {}).keys()
        return needs_of(self.strategy, self.strategy_parameters) | by_cluster

    @property
    def merges(self) -> dict[str, Any]:
        """The part that decides how the contributors of one row become an adapter."""
        return {
            "method": self.method, "method_parameters": dict(self.method_parameters), "scale": self.scale,
            "rank": self.rank, "anchor": self.anchor, "dtype": self.dtype,
            **({} if self.scale_offsets is None else {"scale_offsets": dict(self.scale_offsets)}),
        }  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Canonical form: JSON-able, complete, parameters resolved."""
        return {
            "name": self.name, "strategy": self.strategy, "strategy_parameters": dict(self.strategy_parameters),
            "embedding": self.embedding, "retrieval": None if self.retrieval is None else dict(self.retrieval),
            **self.merges,
        }  # fmt: skip


def parse_recipe(name: str, written: Mapping[str, Any], *, centred: bool = True) -> Recipe:
    """Give a recipe of the project file its meaning. Raises RecipeError with the allowed names."""
    where = f"recipe {name}"
    if not isinstance(written, Mapping):
        raise RecipeError(f"{where}: is not a mapping.\nExpected for example {{strategy: sparse_moe, k: 5}}.")
    strategy = str(written.get("strategy", ""))
    _known(where, "strategy", strategy, STRATEGIES)
    method = str(written.get("method", "linear"))
    _known(where, "method", method, METHODS)
    strategy_parameters: dict[str, Any] = {}
    method_parameters: dict[str, Any] = {}
    allowed = [*STRATEGIES[strategy].parameters, *METHODS[method].defaults, *KEYS]
    for key, value in written.items():
        if key in STRATEGIES[strategy].parameters:
            strategy_parameters[key] = value
        if key in METHODS[method].defaults:  # one seed may serve both
            method_parameters[key] = value
        if key not in allowed:
            _refuse(where, "parameter", key, allowed)
    if strategy in ("selective", "prefix"):
        for key in ("method", "scale", "rank", "anchor", "dtype"):
            if written.get(key) is not None and written[key] != TUNED:
                raise RecipeError(f"{where}: strategy {strategy} takes adapters as they are.\nLeave `{key}` out.")
    resolved = _resolve(where, strategy, strategy_parameters, centred)
    negative = experts_in(resolved.get("weights") or {}, below=0.0)
    if negative and not METHODS[method].signed:
        raise RecipeError(f"{where}: the weight of {negative[0]} is negative, which method {method} cannot use.")
    as_trained = strategy in AS_TRAINED
    rank = written.get("rank", "keep" if as_trained else dict(DEFAULT_RANK))
    try:
        parse_rank(rank)
    except RankError as error:
        raise RecipeError(f"{where}: {error}") from error
    return Recipe(
        name=name,
        strategy=strategy,
        strategy_parameters=resolved,
        method=method,
        method_parameters=_method_parameters(where, method, method_parameters),
        scale=_scale(where, strategy, written.get("scale", 1.0 if as_trained else "match_norm")),
        rank=rank,
        anchor=_anchor(strategy, written),
        dtype=_dtype(where, written.get("dtype")),
        embedding=str(written["embedding"]) if written.get("embedding") is not None else None,
        retrieval=_retrieval(where, written.get("retrieval")),
        scale_offsets=_offsets(where, strategy, written.get("scale_offsets")),
    )


def _anchor(strategy: str, written: Mapping[str, Any]) -> str:
    """What a recipe says; else `auto`, but for what mixes adapters that began in different places."""
    if "anchor" in written:
        return str(written["anchor"] or "none")
    return "none" if strategy in ("hybrid", "selective") else "auto"


def _retrieval(where: str, value: Any) -> dict[str, Any] | None:
    """{examples, format} of `retrieval: 3` or `retrieval: {examples: 3, format: "{prompt} {response} "}`."""
    if value is None:
        return None
    given = dict(value) if isinstance(value, Mapping) else {"examples": value}
    for key in given:
        if key not in ("examples", "format"):
            _refuse(where, "key of retrieval", str(key), ["examples", "format"])
    examples, form = given.get("examples", 3), given.get("format", RETRIEVED)
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 1:
        raise RecipeError(f"{where}: retrieval puts {examples!r} examples into a prompt.\nExpected 1 or more.")
    if not isinstance(form, str) or "{prompt}" not in form or "{response}" not in form:
        raise RecipeError(f"{where}: retrieval.format {form!r} lacks {{prompt}} or {{response}}.")
    return {"examples": examples, "format": form}


def _method_parameters(where: str, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return plain(METHODS[method].resolve(given))
    except MergeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _resolve(where: str, strategy: str, given: Mapping[str, Any], centred: bool) -> dict[str, Any]:
    def with_default(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        known = name in STRATEGIES and "centred" in STRATEGIES[name].parameters
        return {**({"centred": centred} if known else {}), **parameters}

    filled = with_default(strategy, given)
    if isinstance(filled.get("of"), Mapping):
        filled["of"] = with_default(str(filled["of"].get("strategy")), filled["of"])
    try:
        return resolve_parameters(strategy, filled)
    except RoutingError as error:
        raise RecipeError(f"{where}: {error}") from error


def parse_recipes(written: Mapping[str, Mapping[str, Any]], *, centred: bool = True) -> dict[str, Recipe]:
    """All recipes of a project file. `of: NAME` takes strategy, method, scale and rank from the recipe of that name;
    `among` are the names of those that `selective` chooses from, all of strategies REFERENCES unless given."""
    return {
        name: parse_recipe(name, _expand(name, recipe, written), centred=centred) for name, recipe in written.items()
    }


def _expand(name: str, recipe: Mapping[str, Any], written: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if isinstance(recipe, Mapping) and recipe.get("strategy") == "selective":
        return {**recipe, "among": _among(name, recipe.get("among"), written)}
    if not isinstance(recipe, Mapping) or not isinstance(recipe.get("of"), str):
        return recipe
    if recipe["of"] not in written:
        _refuse(f"recipe {name}", "recipe in `of`", recipe["of"], list(written))
    inner = written[recipe["of"]]
    _known(f"recipe {recipe['of']}", "strategy", str(inner.get("strategy", "")), STRATEGIES)
    names = STRATEGIES[str(inner["strategy"])].parameters
    routed = {"strategy": inner["strategy"], **{k: v for k, v in inner.items() if k in names}}
    copied = {k: v for k, v in inner.items() if k != "strategy" and k not in names}
    if recipe.get("strategy") in AS_TRAINED:  # it takes whom to ask, and nothing of how they are merged
        copied = {k: v for k, v in copied.items() if k == "embedding"}
    return {**copied, **recipe, "of": routed}


def _among(name: str, given: Any, written: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Names of recipes -> their strategies."""
    strategies = {n: str(r.get("strategy")) for n, r in written.items() if isinstance(r, Mapping)}
    plain = [n for n, s in strategies.items() if s in REFERENCES and not written[n].get("retrieval")]
    first = [n for n in plain if strategies[n] not in [strategies[m] for m in plain[: plain.index(n)]]]
    names = first if given is None else [str(n) for n in given] if isinstance(given, list | tuple) else [str(given)]
    for one in names:
        if one not in plain:
            _refuse(f"recipe {name}", f"recipe of a strategy {', '.join(REFERENCES)} in `among`", one, plain)
    if len(names) < 2:
        raise RecipeError(
            f"recipe {name}: there is nothing to choose among.\nAdd recipes of strategies {', '.join(REFERENCES)}."
        )
    for one, other in itertools.combinations(names, 2):
        if strategies[one] == strategies[other]:
            raise RecipeError(
                f"recipe {name}: `among` has {one} and {other}, both {strategies[one]}.\nGive one of them."
            )
    return {n: strategies[n] for n in names}


def _scale(where: str, strategy: str, value: Any) -> Scale | Literal["tuned"]:
    if value == TUNED:
        if strategy in UNSCALED:
            raise RecipeError(f"{where}: strategy {strategy} has nothing to scale.\nLeave `scale` out.")
        return TUNED
    try:
        factor, is_matched = parse_scale(value)
    except MergeError as error:
        raise RecipeError(
            f"{where}: scale is a number, match_norm, {{match_norm: 1.4}} or tuned; found {value!r}."
        ) from error
    return scaled("match_norm", factor) if is_matched else factor


def _offsets(where: str, strategy: str, value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if strategy in UNSCALED:
        raise RecipeError(f"{where}: strategy {strategy} has nothing to scale.\nLeave `scale_offsets` out.")
    try:
        return parse_offsets(value)
    except MergeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _dtype(where: str, value: Any) -> str | None:
    if value is None:
        return None
    _known(where, "dtype", str(value), dict.fromkeys(DTYPES))
    return str(value)


def _known(where: str, what: str, name: str, registry: Mapping[str, Any]) -> None:
    if name not in registry:
        _refuse(where, what, name, list(registry))


def _refuse(where: str, what: str, name: str, allowed: list[str]) -> None:
    raise RecipeError(f"{where}: {unknown(what, name, allowed)}")
