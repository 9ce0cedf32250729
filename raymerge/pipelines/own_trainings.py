"""What a recipe trains for itself: an adapter on the examples of each row's experts, or a prefix for each persona."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from raymerge.config import GROUPINGS, Grouping, Training
from raymerge.errors import PersonaError, RecipeError
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.planning import TRAINS_ITS_OWN, trained_folder
from raymerge.pipelines.trainings import check_validation, folder_of_item, portions, training_item, training_task
from raymerge.pipelines.trials import sample_of, trial_items, trials_of
from raymerge.recipes import Recipe
from raymerge.routing.table import RoutingTable
from raymerge.runtime.bases import base_digest
from raymerge.runtime.scheduler import Item
from raymerge.runtime.tasks import PrefixTask, TrainGroup


def check(opened: Opened) -> None:
    """Raise now if a recipe's own training cannot begin: no base, no examples."""
    for recipe in opened.recipes.values():
        if recipe.strategy in TRAINS_ITS_OWN:
            if recipe.name in GROUPINGS:
                raise RecipeError(f"recipe {recipe.name}: the name is taken by what is trained.\nGive it another.")
            opened.need_base(f"recipe {recipe.name}")
            personas = opened.need_personas(f"recipe {recipe.name}")
            if not opened.trainable:
                raise PersonaError(f"{personas.location}: nobody has training examples, which {recipe.name} needs.")
            check_validation(opened, f"recipe {recipe.name}", settings_of(opened, recipe))


def items_of(opened: Opened, recipe: Recipe, table: RoutingTable) -> list[Item]:
    """Items that train what a recipe's rows are, and those that try its numbers of epochs."""
    settings = settings_of(opened, recipe)
    trainable = set(opened.trainable)
    served: dict[str, tuple[str, ...]] = {}
    groups = []
    for group in table.groups():
        rows = tuple(name for name, _ in group.experts if name in trainable)
        if rows:
            groups.append(TrainGroup(group.adapter, trained_folder(opened, recipe, group), rows))
            served[group.adapter] = group.personas
    trials = trials_of(opened, recipe.name, settings.choices)

    def make(name: str, some: tuple[TrainGroup, ...], epochs: int, after: Collection[str]) -> Item:
        return _item(opened, recipe, name, some, settings.with_epochs(epochs), after)

    tries = trial_items(
        opened, recipe.name, sample_of(opened, groups, lambda group: served[group.name]), trials, make,
        kind="prefix" if recipe.strategy == "prefix" else "adapter",
    )  # fmt: skip
    items = []
    for number, portion in enumerate(portions(opened, groups)):
        item = _item(
            opened, recipe, f"train/{recipe.name}/{number:04d}", tuple(portion), settings, {i.id for i in tries}
        )
        items.append(replace(item, payload=replace(item.payload, trials=trials)))
    return [*tries, *items]


def settings_of(opened: Opened, recipe: Recipe) -> Training:
    """What a recipe trains with: the settings of clusters for the examples of several personas, those of personas for a
    prefix; with its own epochs and rate where it gives them. Nothing of it is merged, so it chooses by its own."""
    grouping: Grouping = "persona" if recipe.strategy == "prefix" else "cluster"
    settings = opened.project.training.of(grouping)
    given = {
        key: tuple(value) if isinstance(value, list) else value
        for key in ("epochs", "learning_rate")
        if (value := recipe.strategy_parameters.get(key)) is not None
    }
    return settings.model_copy(update={**given, "start_from": None, "epochs_chosen_by": "own"})


def _item(
    opened: Opened,
    recipe: Recipe,
    name: str,
    groups: tuple[TrainGroup, ...],
    settings: Training,
    after: Collection[str],
) -> Item:
    if recipe.strategy != "prefix":
        task = training_task(opened, "neighbours", settings, None)
        return training_item(opened, name, replace(task, groups=groups), after)
    prefixes = PrefixTask(
        groups=groups,
        tokens=recipe.strategy_parameters["tokens"],
        personas=opened.need_personas("training").source,
        training=settings.model_dump(mode="json"),
        prompt_format=opened.project.generation.prompt_format,
        base_digest=base_digest(opened.need_base("training")),
        folder=folder_of_item(opened, name),
    )
    return Item(name, "model", "train_prefixes", prefixes, after=frozenset(after), alone=True)
