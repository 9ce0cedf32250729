"""The same project trained with other seeds: how much of a row is the luck of its training.

Everything that depends on the seed lies in `<output>/_seeds/<n>/`: adapters, runs, evaluations. Personas, splits,
embeddings and controls are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from raymerge import storage
from raymerge.adapters.catalogue import Catalogue
from raymerge.config import Grouping, Project
from raymerge.errors import ProjectError
from raymerge.pipelines.learned import router_of
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.planning import TRAINS_ITS_OWN
from raymerge.pipelines.trainings import is_foreign, is_unified

FOLDER = "_seeds"


def check_seeds(opened: Opened, groupings: Sequence[Grouping]) -> None:
    """Raise ProjectError if an adapter is there that cannot be trained with another seed, if nothing is trained, or if
    a recipe asks a router."""
    project = opened.project
    own = any(recipe.strategy in TRAINS_ITS_OWN for recipe in opened.recipes.values())
    if not groupings and not own:
        raise ProjectError(f"{project.location}: nothing is trained, so there is nothing that a seed would change.")
    for recipe in opened.recipes.values():
        if router_of(project, recipe) is not None:
            raise ProjectError(
                f"recipe {recipe.name}: asks the router, which was trained on the adapters of one seed.\n"
                "Leave --seeds out, or name the other recipes with --recipe."
            )
    clusters = Catalogue.from_template(project.path(project.cluster_adapters)).names
    of_grouping = {"persona": opened.adapters, "unified": ("unified",), "cluster": clusters}
    names = [name for grouping in groupings for name in of_grouping[grouping]]
    for name in names:
        if is_foreign(project.adapter_location(name)):
            raise ProjectError(
                f"{project.adapter_location(name)}: was not trained by raymerge, so it cannot be with other seeds.\n"
                "Leave --seeds out, or give `adapters` a new place."
            )


def with_seed(
    opened: Opened, starts: Mapping[Grouping, str | None], number: int
) -> tuple[Opened, dict[Grouping, str | None]]:
    """The project as it is trained and run with another seed, and what its trainings begin from.

    starts: what those of the project begin from. number: 1 is the first beside the project's own.
    """
    before = opened.project
    place = storage.join(before.path(before.output), FOLDER, str(number))
    trained = storage.join(place, "_trained")
    project = before.model_copy(
        update={
            "output": place,
            "adapters": storage.join(trained, "adapters", "{persona}"),
            "unified_adapter": storage.join(trained, "unified"),
            "cluster_adapters": storage.join(trained, "clusters", "{cluster}"),
        }
    )
    training = before.training.model_copy(
        update={
            "seed": before.training.seed + number,
            "start_from": _moved(before, project, before.training.start_from),
        }
    )
    recipes = {
        name: replace(recipe, anchor=_moved(before, project, recipe.anchor) or recipe.anchor)
        for name, recipe in opened.recipes.items()
    }
    moved = {grouping: _moved(before, project, start) for grouping, start in starts.items()}
    return replace(
        opened, project=project.model_copy(update={"training": training}), recipes=recipes, adapters=(), notes=()
    ), moved


def _moved(before: Project, after: Project, place: str | None) -> str | None:
    """A location of the project file: of the unified adapter that of this seed, of anything else the same."""
    return after.unified_adapter if is_unified(before, place) else place
