"""What can be known to be wrong before any item starts, of recipes and examples."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from raymerge import storage
from raymerge.config import Grouping
from raymerge.errors import AdapterError, PersonaError
from raymerge.merging.methods import METHODS
from raymerge.pipelines.layout import check_same_recipe
from raymerge.pipelines.learned import check_router, router_of
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.trainings import is_unified
from raymerge.recipes import Recipe
from raymerge.routing.embeddings import read_embeddings


def check_recipes(opened: Opened, *, train: Collection[Grouping], merge: bool) -> None:
    """Raise what would fail every item of a recipe: a run of another recipe, an anchor, a router or vectors that
    are not there.

    train: the groupings that the job trains. merge: whether it writes into the runs' folders.
    """
    for recipe in opened.recipes.values():
        if merge:
            check_same_recipe(opened.project.run_folder(recipe.name), recipe)
        _check_anchor(opened, recipe, train)
        check_router(opened.project, router_of(opened.project, recipe), f"recipe {recipe.name}")
        if recipe.embedding is not None:
            read_embeddings(opened.project.path(recipe.embedding))


def _check_anchor(opened: Opened, recipe: Recipe, train: Collection[Grouping]) -> None:
    if recipe.anchor in ("auto", "none") or ("unified" in train and is_unified(opened.project, recipe.anchor)):
        return
    location = opened.project.path(recipe.anchor)
    if not storage.exists(storage.join(location, "adapter_config.json")):
        raise AdapterError(
            f"recipe {recipe.name}: its anchor {recipe.anchor!r} is not there.\n"
            f"Looked for {location}/adapter_config.json; `auto` and `none` name no adapter."
        )


def check_evaluation(opened: Opened) -> None:
    """Raise now if nothing can be scored: no base, no examples, none of the split."""
    opened.need_base("evaluation")
    personas = opened.need_personas("evaluation")
    split = opened.project.evaluation.split
    if len(personas.missing(split)) == len(personas.names):
        raise PersonaError(f"{personas.location}: nobody has examples of split {split}, so nothing is scored.")


def notes_on_methods(recipes: Iterable[Recipe]) -> list[str]:
    """What users of the recipes' methods should know, each once."""
    found: dict[str, list[str]] = {}
    for recipe in recipes:
        note = METHODS[recipe.method].note
        if note is not None:
            found.setdefault(note, []).append(recipe.method)
    return [f"method {', '.join(dict.fromkeys(names))}: {note}" for note, names in found.items()]
