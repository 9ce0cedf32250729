"""The steps of a job: train, merge, evaluate, in any selection; what every command that starts work is made of.

Planning continues as results arrive: clusters and routing need embeddings, so that everything which needs neither
is queued at once, and the rest as soon as the last embedding is there.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

from raymerge.config import Grouping
from raymerge.evaluation.scores import kind_of
from raymerge.pipelines.job import JobResult, carry_out
from raymerge.pipelines.layout import write_run_files
from raymerge.pipelines.opening import Opened, check_training
from raymerge.pipelines.placing import Placed, Placing, place
from raymerge.pipelines.planning import (
    Scoring,
    embedding_items,
    evaluation_items,
    merge_items,
    merge_tasks,
    trained_by,
    training_items,
)
from raymerge.recipes import Recipe
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
    trained: dict[str, str] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    @property
    def experts(self) -> tuple[str, ...]:
        """Personas whose adapter is there or will be."""
        if "persona" not in self.steps.train:
            return self.opened.adapters
        return self.opened.need_personas("training").names

    def first(self) -> list[Item]:
        """Items that wait for no embedding; all of them where none is needed."""
        opened, steps = self.opened, self.steps
        check_training(opened, steps.train)
        items: list[Item] = []
        if "unified" in steps.train:
            items += training_items(opened, "unified", None)
        if "persona" in steps.train:
            started = opened.project.training.start_from == opened.project.unified_adapter
            items += training_items(opened, "persona", None, after=frozenset(i.id for i in items if started))
        self.trained = trained_by(items)
        if not self._needs_embeddings():
            return items + self.rest()
        embeddings = embedding_items(opened, self.experts, self.trained)
        self.waiting = {item.id for item in embeddings}
        return embeddings + items

    def follow(self, outcome: Outcome) -> list[Item]:
        """More items once the last embedding is there."""
        if outcome.item_id not in self.waiting:
            return []
        self.waiting.discard(outcome.item_id)
        return [] if self.waiting else self.rest()

    def rest(self) -> list[Item]:
        """Cluster trainings, merges and evaluations."""
        opened, steps = self.opened, self.steps
        placed = place(opened, self.placing(), refit=steps.refit)
        items: list[Item] = []
        if "cluster" in steps.train:
            items = training_items(opened, "cluster", placed.clusters)
            self.trained |= trained_by(items)
        per_recipe = [self._items_of(name, placed) for name in opened.recipes]
        merges = [m for m, _ in per_recipe]
        evaluations = [e for _, e in per_recipe]
        return items + list(itertools.chain.from_iterable(merges)) + list(itertools.chain.from_iterable(evaluations))

    def _items_of(self, name: str, placed: Placed) -> tuple[list[Item], list[Item]]:
        recipe = self.opened.recipes[name]
        table, notes = placed.route(recipe)
        self.notes += [f"{name}: {note}" for note in notes]
        merges: list[Item] = []
        if self.steps.merge:
            tasks, as_they_are = merge_tasks(self.opened, recipe, table)
            locations = as_they_are | {adapter: task.folder for adapter, task in tasks.items()}
            write_run_files(self.opened.project, recipe, table, placed, notes, locations)
            merges = merge_items(recipe, tasks, self.trained)
        if not self.steps.evaluate:
            return merges, []
        return merges, [
            item
            for scoring in self._scorings(recipe)
            for item in evaluation_items(self.opened, recipe, table, self.trained, scoring)
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

    def _needs_embeddings(self) -> bool:
        placing = self.placing()
        return placing.embeddings or (placing.clusters and self.opened.project.clusters.file is None)

    def placing(self) -> Placing:
        """What the job needs to know of its personas."""
        recipes = self.opened.recipes.values()
        return Placing(
            experts=self.experts,
            embeddings=any("embeddings" in r.needs and r.embedding is None for r in recipes),
            clusters="cluster" in self.steps.train or any("clusters" in r.needs for r in recipes),
        )


def run_steps(opened: Opened, steps: Steps, *, local: bool, title: str) -> JobResult:
    """Plan a job and carry it out."""
    plan = Plan(opened, steps)
    result = carry_out(opened, plan.first(), follow=plan.follow, local=local, title=title)
    return replace(result, notes=tuple(plan.notes))


def describe(opened: Opened, steps: Steps) -> list[str]:
    """What a job of merges would do, in lines, without doing it. The embeddings must be there where one is needed."""
    plan = Plan(opened, steps)
    placed = place(opened, plan.placing(), refit=False)
    lines = []
    for recipe in opened.recipes.values():
        table, notes = placed.route(recipe)
        tasks, as_they_are = merge_tasks(opened, recipe, table)
        contributors = sum(len(task.experts) for task in tasks.values())
        lines.append(
            f"{recipe.name}: {len(table.personas)} personas, {len(tasks)} merges of {contributors} contributors, "
            f"{len(as_they_are)} adapters used as they are"
        )
        lines += [f"  {note}" for note in notes]
    return lines
