"""A run's folder: what the driver writes into it before any item starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

from raymerge import storage
from raymerge.config import Project
from raymerge.errors import RecipeError
from raymerge.manifest import is_unfinished, read_manifest
from raymerge.pipelines.placing import Placed, write_if_new
from raymerge.recipes import Recipe
from raymerge.routing.table import RoutingTable

MOST_ROWS_FOR_PEOPLE = 100_000


def write_run_files(
    project: Project,
    recipe: Recipe,
    table: RoutingTable,
    placed: Placed,
    notes: Sequence[str],
    locations: Mapping[str, str],
) -> None:
    """Write recipe.json, routing.parquet, routing_info.json and assignments.parquet; remove adapters of no row.

    locations: where each adapter of the run lies or will lie. Raises RecipeError if the folder holds the run of another
    recipe.
    """
    folder = project.run_folder(recipe.name)
    check_same_recipe(folder, recipe)
    _remove_others(storage.join(folder, "adapters"), set(locations.values()))
    write_if_new(storage.join(folder, "recipe.json"), storage.encode_json(recipe.as_dict()))
    write_if_new(storage.join(folder, "routing.parquet"), table.to_bytes())
    if table.num_rows <= MOST_ROWS_FOR_PEOPLE:
        info = placed.explain(recipe, table, notes)
        write_if_new(storage.join(folder, "routing_info.json"), storage.encode_json(info))
    write_if_new(storage.join(folder, "assignments.parquet"), _assignments(project, table, locations))


def _remove_others(folder: str, wanted: Collection[str]) -> None:
    """Remove adapters that were merged into a run's folder, or were to be, and that no row names any longer."""
    for name in storage.list_folders(folder):
        place = storage.join(folder, name)
        if place not in wanted and (is_unfinished(place) or "merges" in (read_manifest(place) or {})):
            storage.remove(place)


def check_same_recipe(folder: str, recipe: Recipe) -> None:
    """Raise RecipeError with the difference if a run folder belongs to another recipe."""
    location = storage.join(folder, "recipe.json")
    if not storage.exists(location):
        return
    before, now = storage.read_json(location), recipe.as_dict()
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        differences = "\n".join(f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in changed)
        raise RecipeError(
            f"{folder}: holds a run of another recipe of the name {recipe.name}.\n{differences}\n"
            "Give the changed recipe another name, or remove the folder."
        )


def _assignments(project: Project, table: RoutingTable, locations: Mapping[str, str]) -> bytes:
    """Persona -> adapter and where it lies from the workspace; null is the base."""
    assigned: Any = table.assignments()
    start = project.workspace.rstrip("/") + "/"
    names = assigned.column("adapter").to_pylist()
    places = [None if name is None else locations[name].removeprefix(start) for name in names]
    return storage.encode_parquet(assigned.append_column("location", pa.array(places, pa.string())))
