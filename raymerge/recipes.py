"""A recipe: strategy + method + scale + rank, each with its parameters, and a name.

The allowed parameters come from the registries of strategies and methods, so that a mistyped one is answered with
the right ones. A recipe is plain data: its canonical form is `recipe.json` in the run folder, and its digest is part
of the key of everything made with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raymerge.errors import MergeError, RankError, RecipeError, RoutingError, unknown
from raymerge.merging.methods import METHODS
from raymerge.merging.methods.parameters import plain
from raymerge.merging.rank import parse_rank
from raymerge.routing.strategies import STRATEGIES, needs_of, resolve_parameters

DEFAULT_RANK: Mapping[str, Any] = {"energy": 0.95, "max": 64}
REFERENCES = ("base", "own", "unified", "cluster_trained")  # adapters as trained: nothing is merged
DTYPES = ("float64", "float32", "bfloat16", "float16")
KEYS = ("strategy", "method", "scale", "rank", "anchor", "dtype", "embedding")


@dataclass(frozen=True)
class Recipe:
    """What a run carries out.

    scale: factor on the merged delta, or `match_norm`. rank: see `merging.rank.parse_rank`. anchor: `auto` (what the
    experts record as their start), `none`, or the location of an adapter. embedding: a parquet file of persona
    vectors that stands in for the project's embedding, or None. strategy_parameters hold the resolved inner recipe
    of a control under `of`.
    """

    name: str
    strategy: str
    strategy_parameters: Mapping[str, Any] = field(default_factory=dict)
    method: str = "linear"
    method_parameters: Mapping[str, Any] = field(default_factory=dict)
    scale: float | Literal["match_norm"] = "match_norm"
    rank: Any = field(default_factory=lambda: dict(DEFAULT_RANK))
    anchor: str = "auto"
    dtype: str | None = None
    embedding: str | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Inputs its strategy needs, of: embeddings, clusters, own, unified, cluster_adapters."""
        return needs_of(self.strategy, self.strategy_parameters)

    @property
    def merges(self) -> dict[str, Any]:
        """The part that decides how the contributors of one row become an adapter."""
        return {
            "method": self.method, "method_parameters": dict(self.method_parameters), "scale": self.scale,
            "rank": self.rank, "anchor": self.anchor, "dtype": self.dtype,
        }  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Canonical form: JSON-able, complete, parameters resolved."""
        return {
            "name": self.name, "strategy": self.strategy, "strategy_parameters": dict(self.strategy_parameters),
            "embedding": self.embedding, **self.merges,
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
    reference = strategy in REFERENCES
    rank = written.get("rank", "keep" if reference else dict(DEFAULT_RANK))
    try:
        parse_rank(rank)
    except RankError as error:
        raise RecipeError(f"{where}: {error}") from error
    return Recipe(
        name=name,
        strategy=strategy,
        strategy_parameters=_resolve(where, strategy, strategy_parameters, centred),
        method=method,
        method_parameters=_method_parameters(where, method, method_parameters),
        scale=_scale(where, written.get("scale", 1.0 if reference else "match_norm")),
        rank=rank,
        anchor=str(written.get("anchor") or "none") if "anchor" in written else "auto",
        dtype=_dtype(where, written.get("dtype")),
        embedding=str(written["embedding"]) if written.get("embedding") is not None else None,
    )


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
    """All recipes of a project file. `of: NAME` takes strategy, method, scale and rank from the recipe of that name."""
    return {
        name: parse_recipe(name, _expand(name, recipe, written), centred=centred) for name, recipe in written.items()
    }


def _expand(name: str, recipe: Mapping[str, Any], written: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if not isinstance(recipe, Mapping) or not isinstance(recipe.get("of"), str):
        return recipe
    if recipe["of"] not in written:
        _refuse(f"recipe {name}", "recipe in `of`", recipe["of"], list(written))
    inner = written[recipe["of"]]
    _known(f"recipe {recipe['of']}", "strategy", str(inner.get("strategy", "")), STRATEGIES)
    names = STRATEGIES[str(inner["strategy"])].parameters
    routed = {"strategy": inner["strategy"], **{k: v for k, v in inner.items() if k in names}}
    copied = {k: v for k, v in inner.items() if k != "strategy" and k not in names}
    return {**copied, **recipe, "of": routed}


def _scale(where: str, value: Any) -> float | Literal["match_norm"]:
    if value == "match_norm":
        return "match_norm"
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise RecipeError(f"{where}: scale is a number or match_norm; found {value!r}.")
    return float(value)


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
