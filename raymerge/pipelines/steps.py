"""The steps of a job: train, merge, evaluate, in any selection; what every command that starts work is made of.

Planning continues as results arrive: clusters and routing need embeddings, so that everything which needs neither
is queued at once, and the rest as soon as the last embedding is there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from raymerge.config import Grouping
from raymerge.evaluation.scores import kind_of
from raymerge.merging.methods import METHODS
from raymerge.pipelines.checks import check_evaluation, check_recipes
from raymerge.pipelines.job import JobResult, carry_out
from raymerge.pipelines.layout import write_run_files
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.placing import (
    Placed,
    Placing,
    check_placing,
    embeddings_are_there,
    needs_embeddings,
    place,
)
from raymerge.pipelines.planning import (
    Scoring,
    embedding_items,
    evaluation_items,
    merge_items,
    merges_of,
)
from raymerge.pipelines.trainings import check_training, start_of, trained_by, training_items
from raymerge.recipes import Recipe
from raymerge.routing.table import RoutingTable
from raymerge.runtime.scheduler import Item, Outcome


@dataclass(frozen=True)
class Steps:
    """What a job does: groupings to train, whether to write merged adapters, whether to evaluate."""

    train: tuple[Grouping, ...] = ()
    merge: bool = False
    evaluate: bool = False
    refit: bool = False


@dataclass
class Plan:
    """A job's plan, which grows when the embeddings are there."""

    opened: Opened
    steps: Steps
    starts: dict[Grouping, str | None] = field(default_factory=dict)
    trained: dict[str, str] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    @property
    def experts(self) -> tuple[str, ...]:
        """Personas whose adapter is there or will be."""
        trained = self.opened.trainable if "persona" in self.steps.train else ()
        return tuple(sorted({*self.opened.adapters, *trained}))

    def check(self) -> None:
        """Raise what can be known to be wrong before any item starts, and note what one would not expect."""
        opened, steps = self.opened, self.steps
        self.starts = {grouping: start_of(opened, grouping) for grouping in steps.train}
        check_training(opened, self.starts)
        check_recipes(opened, train=steps.train, merge=steps.merge)
        if steps.evaluate:
            check_evaluation(opened)
        check_placing(opened, self.placing(), refit=steps.refit)
        self.notes = [*opened.notes]
        for grouping, start in self.starts.items():
            if start is not None and opened.project.training.start_from is None:
                self.notes.append(f"{grouping}: training starts from {start}, as that of the adapters there did")
        self.notes += self._notes_on_methods()
        without = sorted(set(opened.names) - set(opened.trainable)) if steps.train else []
        if without:
            self.notes.append(f"{without[0]}: has no training examples ({len(without)} such personas)")

    def first(self) -> list[Item]:
        """Items that wait for no embedding; all of them where none is needed."""
        self.check()
        items: list[Item] = []
        for grouping in ("unified", "persona"):
            items += self._trainings(grouping, None)
        embeddings = embedding_items(self.opened, self.experts, self.trained) if self.placing().embeddings else []
        self.waiting = {item.id for item in embeddings}
        return embeddings + items + ([] if embeddings else self.rest())

    def _trainings(self, grouping: Grouping, clusters: Mapping[str, str] | None) -> list[Item]:
        if grouping not in self.steps.train:
            return []
        start = self.starts[grouping]
        items = training_items(self.opened, grouping, clusters, start=start, trained=self.trained)
        self.trained |= trained_by(items)
        return items

    def follow(self, outcome: Outcome) -> list[Item]:
        """More items once the last embedding is there."""
        if outcome.item_id not in self.waiting:
            return []
        self.waiting.discard(outcome.item_id)
        return [] if self.waiting else self.rest()

    def _notes_on_methods(self) -> list[str]:
        """What users of the methods should know, each once."""
        found: dict[str, list[str]] = {}
        for recipe in self.opened.recipes.values():
            note = METHODS[recipe.method].note
            if note is not None and self.steps.merge:
                found.setdefault(note, []).append(recipe.method)
        return [f"method {', '.join(dict.fromkeys(names))}: {note}" for note, names in found.items()]

    def rest(self) -> list[Item]:
        """Cluster trainings, merges and evaluations."""
        placed = place(self.opened, self.placing(), refit=self.steps.refit)
        # all are routed before any is written, since routing may refuse one
        routed = [(recipe, *placed.route(recipe)) for recipe in self.opened.recipes.values()]
        items = self._trainings("cluster", placed.clusters)
        per_recipe = [self._items_of(recipe, placed, table, notes) for recipe, table, notes in routed]
        merges = [m for m, _ in per_recipe]
        evaluations = [e for _, e in per_recipe]
        return items + list(itertools.chain.from_iterable(merges)) + list(itertools.chain.from_iterable(evaluations))

    def _items_of(
        self, recipe: Recipe, placed: Placed, table: RoutingTable, notes: tuple[str, ...]
    ) -> tuple[list[Item], list[Item]]:
        self.notes += [f"{recipe.name}: {note}" for note in notes]
        items: list[Item] = []
        merges = merges_of(self.opened, recipe, table)
        if self.steps.merge:
            write_run_files(self.opened.project, recipe, table, placed, notes, merges.locations)
            items = merge_items(self.opened, recipe, merges.tasks, self.trained)
        if not self.steps.evaluate:
            return items, []
        return items, [
            item
            for scoring in self._scorings(recipe)
            for item in evaluation_items(self.opened, recipe, table, merges, self.trained, scoring)
        ]

    def _scorings(self, recipe: Recipe) -> list[Scoring]:
        """Test examples; and for what competes to be chosen, validation examples, so that test rows choose nothing."""
        split = self.opened.project.evaluation.split
        if not self.steps.merge:
            return [Scoring("evaluation_in_memory", split, in_memory=True)]
        scorings = [Scoring("evaluation", split)]
        competes = kind_of(recipe.name, recipe.as_dict()) == "recipe"
        personas = self.opened.need_personas("evaluation")
        if split == "test" and competes and len(personas.missing("validation")) < len(personas.names):
            scorings.append(Scoring("validation", "validation"))
        return scorings

    def placing(self) -> Placing:
        """What the job needs to know of its personas."""
        project, recipes = self.opened.project, self.opened.recipes.values()
        by_cluster = "cluster" in self.steps.train
        return Placing(
            experts=self.experts,
            embeddings=any(needs_embeddings(project, recipe) for recipe in recipes)
            or (by_cluster and project.clusters.file is None),
            clusters=by_cluster or any("clusters" in recipe.needs for recipe in recipes),
        )


def run_steps(opened: Opened, steps: Steps, *, local: bool, title: str) -> JobResult:
    """Plan a job and carry it out."""
    plan = Plan(opened, steps)
    result = carry_out(opened, plan.first(), follow=plan.follow, local=local, title=title)
    return replace(result, notes=tuple(plan.notes))


def describe(opened: Opened, steps: Steps) -> list[str]:
    """What a job of merges would do, in lines, without doing it: less is known where the embeddings come first."""
    plan = Plan(opened, steps)
    plan.check()
    lines = []
    for name, recipe in opened.recipes.items():
        alone = replace(plan, opened=opened.only([name])).placing()
        if alone.embeddings and not embeddings_are_there(opened, alone.experts):
            k = f" k = {recipe.strategy_parameters['k']}," if "k" in recipe.strategy_parameters else ""
            lines.append(
                f"{name}: {len(opened.names)} personas,{k} {len(alone.experts)} experts; embeddings come first"
            )
            continue
        table, notes = place(opened, alone, refit=steps.refit, write=False).route(recipe)
        merges = merges_of(opened, recipe, table)
        contributors = sum(len(task.experts) for task in merges.tasks.values())
        lines.append(
            f"{name}: {len(table.personas)} personas, {len(merges.tasks)} merges of {contributors} contributors, "
            f"{len(merges.as_they_are)} adapters used as they are"
        )
        lines += [f"  {note}" for note in notes]
    return [*plan.notes, *lines]
