"""`raymerge router PROJECT`: train the router, tune it on validation examples, and say what it is worth.

Personas' training rows teach the network, their own adapter hidden. Their first validation examples tune temperature,
scale, own weight and offsets by depth, as any recipe is searched; those after them stop the training. Test examples
score the result, beside its control and the unified adapter.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raymerge import storage
from raymerge.config import Search, parse_size
from raymerge.errors import AdapterError, PersonaError, ProjectError, unknown
from raymerge.evaluation.scores import LEARNED
from raymerge.manifest import read_manifest
from raymerge.pipelines.compare import compare_runs, evaluated_runs
from raymerge.pipelines.job import JobResult, carry_out, finish
from raymerge.pipelines.learned import read_trained, record_of
from raymerge.pipelines.opening import Opened, base_location, open_project
from raymerge.pipelines.placing import Placed, Placing, write_if_new
from raymerge.pipelines.planning import embedding_kind
from raymerge.pipelines.search import check_ranks, placed_for, pursue, with_settings
from raymerge.pipelines.searching import winner
from raymerge.pipelines.searching.aim import Aim
from raymerge.pipelines.searching.chosen import Chosen, lines_of
from raymerge.pipelines.searching.scorer import order_of
from raymerge.routing.embeddings import encode_embeddings
from raymerge.routing.router_shape import TUNED
from raymerge.runtime.bases import base_digest
from raymerge.runtime.connection import connected
from raymerge.runtime.router_inputs import LABELS, MEAN, VECTORS
from raymerge.runtime.scheduler import Item
from raymerge.runtime.tasks import RouterTask
from raymerge.search.results import RECIPE, Summary

TITLE = "router"
EXPERTS = 2  # at least: a persona learns from others than its own
SMALLEST = 60  # personas that each trial of the tuning is scored on: they differ by little from the trained router


@dataclass(frozen=True)
class Taught:
    """Who teaches a router, and by what.

    held_out: personas taken to have no adapter, and no examples but those of the test. tuning_examples: validation
    examples of a persona that are left to the tuning, the first; notes: what one would not expect.
    """

    held_out: tuple[str, ...]
    tuning_examples: int
    notes: tuple[str, ...]


def router(
    location: str, *, settings: Mapping[str, Any] | None = None, restart: bool = False, local: bool = False
) -> int:
    """Train and tune a project's router, and compare it. settings: of the project's `router`, given on the command
    line. restart: remove the router that is there and begin anew. Returns the exit status.
    """
    opened = with_settings(open_project(location), settings or {}, "router")
    folder = opened.project.router_folder()
    taught = check(opened)
    if restart:
        storage.remove(folder)
    with nullcontext() if local else connected():  # once for all that follows
        trained = train(opened, taught, local=local)
        if trained.failed:
            return finish(trained)
        aim = aim_of_tuning(opened, taught)
        chosen, result = pursue(opened, aim, restart=False, local=local)
    storage.write_bytes(storage.join(folder, TUNED), storage.read_bytes(storage.join(aim.folder, RECIPE)))
    page = compare_runs(location).page if evaluated_runs(opened.project) else None
    show(chosen, aim, [*taught.notes, *trained.notes, *(read_manifest(folder) or {}).get("notes", ())], page)
    return finish(result)


def check(opened: Opened) -> Taught:
    """Who teaches. Raises ProjectError, AdapterError and PersonaError for what cannot work, before anything starts."""
    project, section = opened.project, opened.project.router
    opened.need_base(TITLE)
    personas = opened.need_personas(TITLE)
    check_ranks([section.merge_rank], f"{project.location}: router.merge_rank")
    winner.check_names(opened, Aim(project.search, "", run=LEARNED, title=TITLE))
    held_out = held_out_from(opened)
    experts = [name for name in opened.adapters if name not in held_out]
    if len(experts) < EXPERTS:
        raise AdapterError(
            f"{project.path(project.adapters)}: there are {len(experts)} adapters for a router to choose among.\n"
            f"Expected {EXPERTS} or more{', beside those held out' if held_out else ''}; "
            f"`raymerge train {project.location} --group-by persona` trains them."
        )
    teaching = [name for name in opened.trainable if name not in held_out]
    if not teaching:
        raise PersonaError(f"{personas.location}: nobody has training examples that could teach a router.")
    asked = order_of(opened, Search(seed=section.seed), held_out)
    counts = [len(personas.examples(name, "validation")) for name in asked]
    tuning = max(1, math.ceil(statistics.median(counts) / 2))
    notes = []
    if without := sorted({*teaching} - {*asked}):
        notes.append(f"{without[0]}: has no validation examples and tunes nothing ({len(without)} such personas)")
    if max(counts) <= tuning:
        if section.patience is not None:
            raise PersonaError(
                f"{personas.location}: nobody has more than {tuning} validation examples, and the tuning of a router "
                f"takes the first {tuning}.\nrouter.patience, which is {section.patience}, needs others to stop by: "
                "add rows with split validation, or leave it out."
            )
        notes.append(
            f"nobody has more than the {tuning} validation examples that tune the router: its last epoch is taken"
        )
    return Taught(held_out, tuning, tuple(notes))


def held_out_from(opened: Opened) -> tuple[str, ...]:
    """The personas that `router.held_out` names, sorted; as many as it says, drawn by its seed among those with an
    adapter. Raises ProjectError for an unknown one, or more than there are."""
    section, where = opened.project.router, f"{opened.project.location}: router.held_out"
    if not isinstance(section.held_out, int):
        for name in section.held_out:
            if name not in opened.names:
                raise ProjectError(f"{where}: {unknown('persona', name, opened.names)}")
        return tuple(sorted(set(section.held_out)))
    there = sorted(opened.adapters)
    if section.held_out > len(there):
        raise ProjectError(f"{where}: {section.held_out} of {len(there)} personas with an adapter cannot be held out.")
    drawn = np.random.default_rng([section.seed, 11]).permutation(len(there))[: section.held_out]
    return tuple(sorted(there[i] for i in drawn))


def train(opened: Opened, taught: Taught, *, local: bool) -> JobResult:
    """Embed personas if nobody did, and train the network unless it is there. Notes: who is left out."""
    placing = Placing(opened.adapters, embeddings=True, clusters=True)
    placed = placed_for(opened, placing, title=TITLE, local=local)
    task = task_of(opened, placed, taught)
    item = Item(TITLE, "model", "train_router", task, alone=True)
    result = carry_out(opened.without_recipes(), [item], local=local, title=TITLE)
    nowhere = sorted({*opened.names} - {*task.names})
    if not nowhere:
        return result
    left_out = f"{nowhere[0]}: has no embedding or no cluster and is left out ({len(nowhere)} such personas)"
    return replace(result, notes=(*result.notes, left_out))


def task_of(opened: Opened, placed: Placed, taught: Taught) -> RouterTask:
    """The item's task; where everybody lies is written for it into the router's folder."""
    project, section = opened.project, opened.project.router
    embeddings, clusters = placed.inputs.embeddings, placed.clusters or {}
    assert embeddings is not None  # asked for, and with them their mean
    assert placed.inputs.mean is not None
    mean = placed.inputs.mean if project.embedding.centred else np.zeros_like(placed.inputs.mean)
    placing = storage.join(project.router_folder(), "placing")
    write_if_new(storage.join(placing, VECTORS), encode_embeddings(embeddings))
    write_if_new(storage.join(placing, MEAN), storage.encode_json([float(x) for x in mean]))
    write_if_new(storage.join(placing, LABELS), storage.encode_json(dict(clusters)))
    there = {*embeddings.names} & {*clusters}
    return RouterTask(
        folder=project.router_folder(),
        names=tuple(name for name in opened.names if name in there),
        held_out=taught.held_out,
        experts=tuple((name, project.adapter_location(name)) for name in opened.adapters if name in there),
        placing=placing,
        personas=opened.need_personas(TITLE).source,
        settings=section.model_dump(mode="json"),
        tuning_examples=taught.tuning_examples,
        prompt_format=project.generation.prompt_format,
        base_digest=base_digest(opened.need_base(TITLE)),
        workspace=project.workspace,
        embedding=embedding_kind(opened),
        base=base_location(project),
        experts_bytes=None if section.experts_memory is None else parse_size(section.experts_memory),
    )


def aim_of_tuning(opened: Opened, taught: Taught) -> Aim:
    """The search that tunes a trained router, at most six numbers. It begins with the router as it was trained."""
    project, section, usual = opened.project, opened.project.router, opened.project.search
    trained = read_trained(project.router_folder())
    recipe: dict[str, Any] = {"strategy": LEARNED, "k": section.k, "rank": section.merge_rank}
    if (anchor := record_of(project.router_folder())["anchor"]) != "auto":
        recipe["anchor"] = anchor
    space: dict[str, Any] = {
        "temperature": {"min": 0.5, "max": 2.0, "log": True},
        "scale": {"min": 0.7 * trained.scale, "max": 1.6 * trained.scale, "log": True},
        "self_weight": {"min": 0.0, "max": 0.4},
    }
    first = {"temperature": 1.0, "scale": trained.scale, "self_weight": 0.0}
    if trained.layers:
        recipe["scale_offsets"] = {"layers": list(trained.layers)}
    else:
        space["scale_by_layers"] = {"groups": 3, "max": 0.3, "penalty": 1.0}
        first |= {f"scale_offsets.layers.{group}": 0.0 for group in range(3)}
    personas = len(order_of(opened, usual, taught.held_out))
    tuning = Search(
        recipe=recipe, space=space, trials=section.trials, seed=section.seed, examples=taught.tuning_examples,
        concurrency=usual.concurrency, ranks=usual.ranks, smallest=min(SMALLEST, personas),
    )  # fmt: skip
    return Aim(
        tuning, storage.join(project.router_folder(), "tuning"), run=LEARNED, title=TITLE,
        left_out=frozenset(taught.held_out), first=(first,), replaces=True,
    )  # fmt: skip


def show(chosen: Chosen, aim: Aim, notes: Sequence[str], page: str | None) -> None:
    """Print what the router is worth first, then how it was tuned."""
    said = [headline(chosen.summary), *lines_of(chosen, aim), *(f"note: {note}" for note in notes)]
    for line in said if page is None else [*said, f"Report: {page}"]:
        print(line, flush=True)


def headline(summary: Summary) -> str:
    """Whether the router is better than every other row, by more than the interval of the difference."""
    if summary.test is None:
        return f"Not known to be better: {LEARNED} has no score on test examples."
    scored = f"{LEARNED} {summary.test:.2f} on test examples"
    if not summary.beside:
        return f"Not known to be better: {scored}, and no other row to compare with."
    level = [one for one in summary.beside if one["low"] <= 0]
    if not level:
        return f"Better than each of {len(summary.beside)} other rows: {scored}; next is {_against(summary.beside)}."
    many = f" ({len(level)} such rows)" if len(level) > 1 else ""
    return f"Not better: {scored}, {_against(level)}{many}."


def _against(rows: Sequence[Mapping[str, Any]]) -> str:
    best = max(rows, key=lambda one: float(one["similarity"]))
    return (
        f"{best['name']} {best['similarity']:.2f}, a difference of {best['difference']:+.2f} "
        f"({best['low']:+.2f} to {best['high']:+.2f})"
    )
