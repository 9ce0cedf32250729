"""Recipes that ask the trained router: where it lies, whether it is there, and whose adapters it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from raymerge import storage
from raymerge.config import Project
from raymerge.errors import ProjectError, RoutingError
from raymerge.evaluation.scores import LEARNED
from raymerge.manifest import is_unfinished
from raymerge.recipes import Recipe
from raymerge.routing.router_shape import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from raymerge.routing.router import Router


def router_of(project: Project, recipe: Recipe) -> str | None:
    """Where the router lies that a recipe asks, or whose rows it controls; None for one that asks none."""
    asking = recipe.strategy_parameters.get("of") or {"strategy": recipe.strategy, **recipe.strategy_parameters}
    return place_of(project, asking.get("router")) if asking["strategy"] == LEARNED else None


def place_of(project: Project, given: str | None) -> str:
    """The folder that a recipe's `router` names: the project's own where it names none."""
    return project.router_folder() if given is None else project.path(given)


def is_trained(folder: str) -> bool:
    """Whether a router is there, trained to its end."""
    return storage.exists(storage.join(folder, CONFIG)) and not is_unfinished(folder)


def check_router(project: Project, folder: str | None, what: str) -> None:
    """Raise ProjectError if there is no router where `what` asks one. folder: as of `router_of`."""
    if folder is not None and not is_trained(folder):
        raise ProjectError(
            f"{what}: there is no trained router in {folder}.\n`raymerge router {project.location}` trains one."
        )


def check_embedding(folder: str, kind: str, what: str) -> None:
    """Raise RoutingError if a router was trained on embeddings of another kind than `what` has. kind: in words."""
    known = record_of(folder).get("embedding", kind)
    if known != kind:
        raise RoutingError(
            f"{what}: the router in {folder} was trained on other embeddings.\nExpected {known}; found {kind}. "
            "Set `embedding` to what it was, or train the router anew."
        )


def router_digest(folder: str) -> str:
    """Of the files of a router."""
    return storage.digest_value([storage.digest(storage.join(folder, name)) for name in (CONFIG, WEIGHTS)])


def read_trained(folder: str) -> Router:
    """The router of a folder, read once. Raises as `routing.router.read_router`, StorageError where it is not there."""
    return _read(folder, router_digest(folder))


def held_out_of(folder: str) -> frozenset[str]:
    """Personas whom a router took to have no adapter."""
    return frozenset(record_of(folder).get("held_out", ()))


def record_of(folder: str) -> Mapping[str, Any]:
    """What a router says of itself, read once: `router.json`. Raises StorageError where it is not there."""
    return _record(folder, router_digest(folder))


@lru_cache(maxsize=4)
def _record(folder: str, digest: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = storage.read_json(storage.join(folder, CONFIG))
    return found


@lru_cache(maxsize=4)
def _read(folder: str, digest: str) -> Router:
    from raymerge.routing.router import read_router

    return read_router(folder)
