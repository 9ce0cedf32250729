"""The steps of a job, planned and carried out, or described: what every command that starts work is made of."""

from __future__ import annotations

from dataclasses import replace

from raymerge.pipelines import tuning
from raymerge.pipelines.job import JobResult, carry_out
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.placing import embeddings_are_there, place
from raymerge.pipelines.plan import Plan, Steps
from raymerge.pipelines.planning import merges_of


def run_steps(opened: Opened, steps: Steps, *, local: bool, title: str) -> JobResult:
    """Plan a job and carry it out."""
    plan = Plan(opened, steps)
    result = carry_out(opened, plan.first(), follow=plan.follow, local=local, title=title)
    return replace(result, failed={**result.failed, **plan.undecided}, notes=tuple(plan.notes))


def describe(opened: Opened, steps: Steps) -> list[str]:
    """What a job of merges would do, in lines, without doing it: less is known where the embeddings come first."""
    plan = Plan(opened, steps)
    plan.check()
    lines = []
    for name, recipe in opened.recipes.items():
        if recipe.tuned or recipe.strategy == "selective":
            lines.append(tuning.described(opened, recipe))
            continue
        alone = replace(plan, opened=opened.only([name])).placing()
        if alone.embeddings and not embeddings_are_there(opened, alone.experts):
            k = f" k = {recipe.strategy_parameters['k']}," if recipe.strategy_parameters.get("k") else ""
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
