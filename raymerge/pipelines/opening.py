"""A project opened: read, checked for all that can be known before work starts, and what the driver knows of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raymerge import storage
from raymerge.adapters.catalogue import Catalogue
from raymerge.config import GROUPINGS, Grouping, Project, load_project
from raymerge.errors import AdapterError, PersonaError, ProjectError, RecipeError
from raymerge.personas import Personas, read_personas
from raymerge.recipes import Recipe, parse_recipe, parse_recipes


@dataclass(frozen=True)
class Opened:
    """A project with what the driver needs to know of its inputs: names and locations, no weights."""

    project: Project
    personas: Personas | None
    recipes: Mapping[str, Recipe]
    adapters: tuple[str, ...]  # personas whose adapter is there now

    @property
    def names(self) -> tuple[str, ...]:
        """All personas: those with examples, or those with an adapter where there are no examples."""
        return self.personas.names if self.personas is not None else self.adapters

    def only(self, recipes: Iterable[str]) -> Opened:
        """The same with these recipes alone."""
        return replace(self, recipes={name: self.recipes[name] for name in recipes})

    def without_recipes(self) -> Opened:
        """The same with nothing to merge."""
        return self.only(())

    def need_personas(self, what: str) -> Personas:
        """The examples. Raises ProjectError where the project has none."""
        if self.personas is None:
            raise ProjectError(f"{self.project.location}: {what} needs `personas`, a file of examples.")
        return self.personas

    def need_base(self, what: str) -> str:
        """Where the base model lies. Raises ProjectError where the project names none or it is not there."""
        base = self.project.base_model
        if base is None:
            raise ProjectError(f"{self.project.location}: {what} needs `base_model`.")
        location = self.project.path(base)
        if not storage.exists(storage.join(location, "config.json")):
            raise ProjectError(
                f"{self.project.location}: base_model {base!r} is not there.\nLooked for {location}/config.json."
            )
        return location


def open_project(
    location: str,
    *,
    recipes: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    start_from: str | None = None,
) -> Opened:
    """Read a project and check all that can be known before any work starts.

    recipes: names to keep, all if empty. extra: a recipe given on the command line, as a mapping with its `name`.
    start_from: overrides `training.start_from`.
    Raises ProjectError, RecipeError, PersonaError, StorageError.
    """
    project = load_project(location)
    if start_from is not None:
        project = project.model_copy(
            update={"training": project.training.model_copy(update={"start_from": start_from})}
        )
    _refuse_vanishing_output(project)
    parsed = parse_recipes(project.recipes, centred=project.embedding.centred)
    if extra is not None:
        written = {k: v for k, v in extra.items() if k != "name"}
        parsed = {extra["name"]: parse_recipe(extra["name"], written, centred=project.embedding.centred)}
    for name in recipes:
        if name not in parsed:
            close = difflib.get_close_matches(name, list(parsed), n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise RecipeError(f"{location}: unknown recipe {name!r}.{hint}\nAllowed: {', '.join(parsed) or 'none'}.")
    chosen = {name: parsed[name] for name in (recipes or parsed)}
    personas = read_personas(project.path(project.personas)) if project.personas else None
    there = Catalogue.from_template(project.path(project.adapters)).names
    adapters = tuple(n for n in there if personas is None or n in set(personas.names))
    storage.check_writable(project.path(project.output))
    return Opened(project, personas, chosen, adapters)


def _refuse_vanishing_output(project: Project) -> None:
    unpacked = "runtime_resources/working_dir_files"
    if unpacked in project.workspace:
        raise ProjectError(
            f"{project.location}: its workspace is the job's unpacked working directory, which Ray removes.\n"
            "Give `workspace` an absolute path that all nodes see, or a URI such as s3://bucket/team."
        )


def base_digest(location: str) -> str:
    """One digest for a base model's files: configuration, weights and tokenizer."""
    files = [f.path for f in storage.list_files(location) if f.path.endswith((".json", ".safetensors", ".model"))]
    return storage.digest_value([[name, storage.digest(storage.join(location, name))] for name in files])


def check_training(opened: Opened, groupings: Iterable[Grouping]) -> None:
    """Raise now if something cannot be trained: no base, no examples."""
    groupings = tuple(groupings)
    if not groupings:
        return
    opened.need_base("training")
    personas = opened.need_personas("training")
    start = opened.project.training.start_from
    if (
        "persona" in groupings
        and start is not None
        and not (
            storage.exists(storage.join(opened.project.path(start), "adapter_config.json"))
            or (start == opened.project.unified_adapter and "unified" in groupings)
        )
    ):
        raise AdapterError(
            f"{opened.project.path(start)}: there is no adapter to start from.\n"
            f"`raymerge train {opened.project.location} --group-by unified` makes the unified one."
        )
    empty = [name for name in personas.names if not personas.examples(name, "train")]
    if empty and "persona" in groupings:
        raise PersonaError(
            f"{opened.project.personas}: {empty[0]} has no training examples ({len(empty)} such personas).\n"
            "Add rows with split train, or leave these personas out."
        )


def all_groupings(opened: Opened) -> tuple[Grouping, ...]:
    """The groupings whose adapters the recipes ask for, as far as there are examples to train them on."""
    if opened.personas is None:
        return ()
    needs: frozenset[str] = frozenset().union(*(recipe.needs for recipe in opened.recipes.values()))
    wanted = {"persona": "own" in needs, "cluster": "cluster_adapters" in needs, "unified": "unified" in needs}
    start = opened.project.training.start_from
    if wanted["persona"] and start is not None and start == opened.project.unified_adapter:
        wanted["unified"] = True
    return tuple(grouping for grouping in GROUPINGS if wanted[grouping])


def need_recipes(opened: Opened) -> None:
    """Raise ProjectError if there is nothing to carry out."""
    if not opened.recipes:
        raise ProjectError(
            f"{opened.project.location}: has no recipes.\nAdd one under `recipes`, or name a strategy with --strategy."
        )


def need_adapters(opened: Opened) -> None:
    """Raise AdapterError if recipes need the personas' adapters and not one is there."""
    if opened.adapters or not any("own" in recipe.needs for recipe in opened.recipes.values()):
        return
    raise AdapterError(
        f"{opened.project.path(opened.project.adapters)}: there is no adapter.\n"
        "Expected a folder with adapter_config.json for each persona; `raymerge run` trains what is missing."
    )
