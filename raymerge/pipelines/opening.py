"""A project opened: read, checked for all that can be known before work starts, and what the driver knows of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from raymerge import storage
from raymerge.adapters.catalogue import Catalogue
from raymerge.adapters.formats import format_of
from raymerge.config import Project, load_project, load_recipes
from raymerge.errors import AdapterError, ProjectError, RecipeError, did_you_mean, unknown
from raymerge.personas import Personas, read_personas, source_of
from raymerge.recipes import Recipe, parse_recipes
from raymerge.routing.named import by_persona, experts_in

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Opened:
    """A project with what the driver needs to know of its inputs: names and locations, no weights."""

    project: Project
    personas: Personas | None
    recipes: Mapping[str, Recipe]
    adapters: tuple[str, ...]  # personas whose adapter is there now
    notes: tuple[str, ...] = ()  # what one would not expect

    @property
    def names(self) -> tuple[str, ...]:
        """All personas: those with examples, or those with an adapter where there are no examples."""
        return self.personas.names if self.personas is not None else self.adapters

    @cached_property
    def trainable(self) -> tuple[str, ...]:
        """Personas with training examples, sorted; none where there are no examples at all."""
        if self.personas is None:
            return ()
        without = set(self.personas.missing("train"))
        return tuple(name for name in self.personas.names if name not in without)

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
        """Where the base model lies, or its hub id. Raises ProjectError if there is none."""
        base, location = self.project.base_model, base_location(self.project)
        if base is None or location is None:
            raise ProjectError(f"{self.project.location}: {what} needs `base_model`.")
        if location != self.project.path(base) or storage.exists(storage.join(location, "config.json")):
            return location
        raise ProjectError(
            f"{self.project.location}: base_model {base!r} is not there.\nLooked for {location}/config.json."
        )


def open_project(
    location: str,
    *,
    recipes: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    start_from: str | None = None,
) -> Opened:
    """Read a project and check all that can be known before any work starts.

    recipes: names to keep, and files of others that stand in for the project's (`config.load_recipes`); all if empty.
    extra: a recipe of the command line, as a mapping with its `name`. start_from: overrides `training.start_from`.
    Raises ProjectError, RecipeError, PersonaError, StorageError.
    """
    project = load_project(location)
    start = start_from or project.training.start_from
    if start is not None:  # written in one way, since adapters record it and are compared by it
        start = project.path(start).removeprefix(project.workspace.rstrip("/") + "/")
        project = project.model_copy(update={"training": project.training.model_copy(update={"start_from": start})})
    _refuse_vanishing_output(project)
    written, recipes = _with_files(project, recipes)
    if extra is not None:
        written = {**written, extra["name"]: {k: v for k, v in extra.items() if k != "name"}}
        recipes = (extra["name"],)
    parsed = parse_recipes(written, centred=project.embedding.centred)
    for name in recipes:
        if name not in parsed:
            raise RecipeError(f"{location}: {unknown('recipe', name, parsed)}")
    chosen = with_those_asked({name: parsed[name] for name in (recipes or parsed)}, parsed)
    source = source_of(project)
    personas = read_personas(source) if source is not None else None
    adapters, strangers = _find_adapters(project, personas)
    storage.check_writable(project.path(project.output))
    notes = [
        f"{n}: has no examples, so its adapter is left out ({len(strangers)} such adapters)" for n in strangers[:1]
    ]
    if personas is not None and personas.skipped:
        notes.append(f"{personas.location}: {personas.skipped:,} examples without text are left out")
    opened = Opened(project, personas, chosen, adapters, tuple(notes))
    check_experts(opened)
    return opened


def check_experts(opened: Opened) -> None:
    """Raise what strategy `named` cannot work with: RecipeError for weights of an unknown expert or for an unknown
    persona, ProjectError for a further expert who is a persona too, AdapterError for one whose adapter is not there."""
    project, personas = opened.project, set(opened.names)
    taken = sorted(personas & project.experts.keys())
    if taken:
        raise ProjectError(
            f"{project.location}: `experts` has {taken[0]}, who is a persona.\nChoose another name for the expert."
        )
    known = {*project.experts, *opened.adapters, *opened.trainable, "unified"}
    for recipe in opened.recipes.values():
        weights = recipe.strategy_parameters.get("of", recipe.strategy_parameters).get("weights") or {}
        for name in experts_in(weights):
            if name not in known and not name.startswith("cluster_"):
                listed = ", ".join(sorted(project.experts)) or "none yet"
                raise RecipeError(
                    f"recipe {recipe.name}: weights name {name!r}, who is no expert.{did_you_mean(name, known)}\n"
                    f"Expected a persona with an adapter, unified, or one of the project file's `experts` ({listed})."
                )
            if name in project.experts:
                format_of(project.adapter_location(name), name)
        strangers = [name for name in by_persona(weights) or () if name not in personas]
        if strangers:
            hint = did_you_mean(strangers[0], personas)
            raise RecipeError(f"recipe {recipe.name}: weights are given for {strangers[0]!r}, who is no persona.{hint}")


def _with_files(project: Project, asked: Sequence[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The project's recipes as written and those of files among what is asked for, which are taken where both have a
    name; and the names asked for."""
    written: dict[str, Any] = dict(project.recipes)
    names: list[str] = []
    for one in asked:
        is_file = one not in project.recipes and ("/" in one or one.endswith((".yaml", ".yml", ".json")))
        found = load_recipes(one) if is_file else {}
        written |= found
        names += found or [one]
    return written, tuple(names)


def with_those_asked(chosen: Mapping[str, Recipe], known: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Recipes, and those that a selective one of them chooses among. Raises RecipeError for one that is not known."""
    asked: dict[str, Recipe] = {}
    for one in chosen.values():
        for name in one.strategy_parameters.get("among") or ():
            if name not in known:
                raise RecipeError(f"recipe {one.name}: {unknown('recipe in `among`', name, known)}")
            asked[name] = known[name]
    return {**asked, **chosen}


def _find_adapters(project: Project, personas: Personas | None) -> tuple[tuple[str, ...], list[str]]:
    """Personas whose adapter is there, and adapters of nobody. Raises AdapterError for a name that is taken."""
    found = Catalogue.from_template(project.path(project.adapters))
    unified = project.path(project.unified_adapter)
    there = [name for name, location in sorted(found.locations.items()) if location != unified]
    if personas is not None:
        known = set(personas.names)
        return tuple(n for n in there if n in known), [n for n in there if n not in known]
    for name in there:
        if name in ("all", "base", "unified") or name.startswith("cluster_"):
            raise AdapterError(
                f"{found.location(name)}: the name {name} is taken by the adapters of everyone or of a cluster.\n"
                "Rename the folder."
            )
    return tuple(there), []


def _refuse_vanishing_output(project: Project) -> None:
    unpacked = "runtime_resources/working_dir_files"
    if unpacked in project.workspace:
        raise ProjectError(
            f"{project.location}: its workspace is the job's unpacked working directory, which Ray removes.\n"
            "Give `workspace` an absolute path that all nodes see, or a URI such as s3://bucket/team."
        )


def base_location(project: Project) -> str | None:
    """Where the base model lies; a hub id such as org/name as it is, where there is no such folder."""
    base = project.base_model
    if base is None:
        return None
    location = project.path(base)
    is_path = storage.exists(location) or storage.exists(project.path(base.split("/")[0]))
    return base if _HUB_ID.fullmatch(base) and not base.startswith(".") and not is_path else location


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
