"""`raymerge check PROJECT`: what would make a run wrong, impossible or pointless, before anything is spent."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from raymerge import storage
from raymerge.errors import PoolError, RaymergeError
from raymerge.pipelines.checking.adapters import Bank, check_adapters, read_bank
from raymerge.pipelines.checking.finding import Finding, Section, Sign, worst
from raymerge.pipelines.opening import Opened, open_project
from raymerge.runtime.progress import passing_line

if TYPE_CHECKING:
    from raymerge.models.base import BaseModel
    from raymerge.pipelines.checking.estimate import Estimate, Speeds
    from raymerge.pipelines.checking.prompts import Prompts, Rendered

BAD = 2  # exit status


@dataclass(frozen=True)
class Checked:
    """Everything found. examples: three prompts as the model sees them. estimate: None where nothing can be counted."""

    project: str
    sections: tuple[Section, ...]
    examples: tuple[Rendered, ...]
    estimate: Estimate | None

    @property
    def sign(self) -> Sign:
        """The worst of all."""
        return worst(section.sign for section in self.sections)

    @property
    def exit_status(self) -> int:
        """2 where something would make the run wrong or impossible."""
        return BAD if self.sign == "bad" else 0

    def to_json(self) -> dict[str, Any]:
        """As mappings and lists."""
        return {
            "project": self.project,
            "sign": self.sign,
            "sections": [section.to_json() for section in self.sections],
            "estimate": None if self.estimate is None else self.estimate.to_json(),
        }


def check(location: str, *, model: bool = False, as_json: bool = False, local: bool = False) -> int:
    """Look at a project and print what is found. Returns the exit status: 2 if something is bad.

    model: ask the base and own adapters too, on a model worker, and time it. Raises what reading a project raises.
    """
    found = checked(location, model=model, local=local)
    if as_json:
        print(storage.encode_json(found.to_json()).decode(), end="")
        return found.exit_status
    from rich.console import Console

    from raymerge.pipelines.checking.table import report

    console = Console(highlight=False)
    console.print(report(found.sections, found.examples, found.estimate, found.sign, console.width))
    return found.exit_status


def checked(location: str, *, model: bool = False, local: bool = False) -> Checked:
    """What `check` prints, as data."""
    opened = open_project(location)
    with passing_line() as say:
        bank = read_bank(opened.project, opened.adapters, say)
        say("the base's shapes")
        base, unknown = _base(opened)
        sections = [_plan(opened), check_adapters(opened, bank, base), *unknown]
        prompts: Prompts | None = None
        clusters: Mapping[str, str] = {}
        if opened.personas is not None:
            clusters = _clusters(opened)
            sections, prompts = _of_examples(opened, clusters, base, sections, say)
    sections = [section for section in sections if section.findings]
    estimate, speeds = None, None
    if model and base is not None and opened.personas is not None:
        asked, speeds = _ask(opened, base, local)
        sections.append(asked)
    if base is not None and prompts is not None:
        estimate = _estimate(opened, base, prompts, clusters, bank, speeds, local)
    examples = () if prompts is None else prompts.examples
    return Checked(opened.project.location, tuple(sections), examples, estimate)


def _plan(opened: Opened) -> Section:
    """What `raymerge run` itself would refuse."""
    from raymerge.pipelines.plan import Plan, Steps
    from raymerge.pipelines.trainings import all_groupings

    if not opened.recipes:
        text = "has no recipes, so there is nothing to run"
        return Section(
            "recipes", (Finding("warn", text, "add one under `recipes`, or use --strategy of `raymerge merge`"),)
        )
    count = f"{len(opened.recipes)} recipes can be carried out"
    try:
        scores = opened.personas is not None and opened.project.base_model is not None
        plan = Plan(opened, Steps(train=all_groupings(opened), merge=True, evaluate=scores))
        plan.check()
    except RaymergeError as error:
        first, _, rest = str(error).partition("\n")
        return Section("recipes", (Finding("bad", first, " ".join(rest.split()) or None),))
    notes = tuple(Finding("ok", f"note: {note}") for note in plan.notes)
    return Section("recipes", (Finding("ok", count), *notes))


def _base(opened: Opened) -> tuple[BaseModel | None, list[Section]]:
    """The base without weights; or why it cannot be described, or trained as the project says."""
    from raymerge.models.training.beginning import targets
    from raymerge.pipelines.checking.base import describe_base

    name = opened.project.base_model
    if name is None:
        text = "the project names none: prompts, likelihoods and costs cannot be checked"
        return None, [Section("base", (Finding("warn", text, "set base_model to train and to score"),))]
    try:
        base = describe_base(opened.need_base("check"), name)
        targets(base, opened.project.training.target_modules)
        return base, []
    except RaymergeError as error:
        first, _, rest = str(error).partition("\n")
        return None, [Section("base", (Finding("bad", first, " ".join(rest.split())[:200] or None),))]


def _clusters(opened: Opened) -> Mapping[str, str]:
    """Persona -> label, from the project's file or from an earlier fit; empty where neither is there."""
    from raymerge.routing.clusters import read_clusters

    given = opened.project.clusters.file
    location = storage.join(opened.project.shared_folder(), "clusters", "clusters.json")
    place = opened.project.path(given) if given is not None else location
    try:
        return read_clusters(place).labels if storage.exists(place) else {}
    except RaymergeError:  # the recipes' section says so
        return {}


def _of_examples(
    opened: Opened,
    clusters: Mapping[str, str],
    base: BaseModel | None,
    sections: list[Section],
    say: Callable[[str], None],
) -> tuple[list[Section], Prompts | None]:
    """Sections on the examples, after those that are there."""
    from raymerge.pipelines.checking.leaks import check_leaks
    from raymerge.pipelines.checking.power import check_power
    from raymerge.pipelines.checking.prompts import check_prompts
    from raymerge.pipelines.checking.splits import check_splits

    personas = opened.need_personas("check")
    prompts: Prompts | None = None
    say("splits and leaks")
    found = [check_splits(opened, personas, clusters), check_leaks(personas, clusters)]
    found.append(check_power(opened, personas))
    if base is not None:
        say("prompts")
        try:
            prompts = check_prompts(opened, personas, base)
            found.insert(0, prompts.section)
        except RaymergeError as error:
            first, _, rest = str(error).partition("\n")
            found.insert(0, Section("prompts", (Finding("bad", first, " ".join(rest.split()) or None),)))
    return [*sections, *found], prompts


def _ask(opened: Opened, base: BaseModel, local: bool) -> tuple[Section, Speeds | None]:
    """The section on the model, and how fast a worker is."""
    from raymerge.pipelines.checking import operations
    from raymerge.pipelines.checking.model import ask_model, check_model, speeds_of

    found, error = ask_model(opened, opened.need_personas("check"), local=local)
    if found is None:
        return check_model(found, error), None
    settings = opened.project.training.of("persona")
    layers = operations.layers_of(base, settings.target_modules)
    adapted = operations.factors(layers.targets, settings.rank)
    return check_model(found, error), speeds_of(found["speed"], layers, adapted)


def _estimate(
    opened: Opened,
    base: BaseModel,
    prompts: Prompts,
    clusters: Mapping[str, str],
    bank: Bank,
    speeds: Speeds | None,
    local: bool,
) -> Estimate:
    from raymerge.pipelines.checking import operations
    from raymerge.pipelines.checking.estimate import Estimate, assumed_speeds
    from raymerge.pipelines.checking.known import Known
    from raymerge.pipelines.checking.work import steps_of_run

    layers = operations.layers_of(base, opened.project.training.target_modules)
    known = Known(opened, opened.need_personas("check"), layers, prompts.lengths, clusters, bank)
    hardware = opened.project.hardware
    given = hardware.gpus_per_model
    device: Literal["cpu", "gpu"] = "gpu" if given != "auto" and given > 0 else "cpu"
    workers, notes = _workers(opened, local)
    threads = max(1, int(hardware.cpus_per_model))
    return Estimate(steps_of_run(known), workers, speeds or assumed_speeds(device, threads), device, notes)


def _workers(opened: Opened, local: bool) -> tuple[dict[str, int], tuple[str, ...]]:
    """Workers of each kind: those the project counts, or as many as this machine alone has room for."""
    from raymerge.pipelines.job import worker_kinds
    from raymerge.runtime.kinds import plan_workers

    if local:
        return {"model": 1, "merge": 1}, ("in this process",)
    kinds = worker_kinds(opened.project, opened.project.base_model)
    gpus = max((float(kind.num_gpus) for kind in kinds if kind.num_gpus != "auto"), default=0.0)
    try:
        plan = plan_workers(kinds, [{"CPU": float(os.cpu_count() or 1), "GPU": gpus}])
    except PoolError:
        return {kind.name: kind.count or 1 for kind in kinds}, ("workers as the project counts them",)
    counts = {kind.name: max(kind.count or 0, plan.counts[kind.name]) for kind in kinds}
    return counts, (f"as many workers as fit on {os.cpu_count()} CPUs; a Ray cluster has more",)
