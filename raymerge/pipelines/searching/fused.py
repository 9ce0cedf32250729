"""A few adapters and a file of prompts as a project, so that their weights are searched as any recipe is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from raymerge import storage
from raymerge.adapters.formats import open_adapter
from raymerge.config import Evaluation, Generation, PersonaSource, Project, Search
from raymerge.errors import AdapterError, PersonaError, ProjectError
from raymerge.personas import read_personas
from raymerge.pipelines.fusion.options import named_sources
from raymerge.pipelines.fusion.request import Source
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.placing import write_if_new
from raymerge.pipelines.prompting.file import read_prompts

WHERE = "--fuse"
RECIPE = {"strategy": "named", "rank": "exact", "scale": 1.0}


@dataclass(frozen=True)
class Fused:
    """What was asked for. adapters: locations, or NAME=LOCATION. out: a folder. negative: whether weights may be."""

    adapters: tuple[str, ...]
    prompts: str | None
    base: str | None
    out: str
    negative: bool
    generation: Mapping[str, Any]


def as_project(asked: Fused) -> Opened:
    """A project whose personas are the prompts, each answered by the same mixture of the adapters.

    Raises MergeError, AdapterError, PersonaError and ProjectError for what cannot be searched.
    """
    sources = named_sources(asked.adapters)
    if len(sources) < 2:
        raise ProjectError(f"{WHERE}: one adapter has no weights to search.\nGive two or more.")
    for source in sources:
        open_adapter(source.location, source.name)  # refused now, by name, where it cannot be read
    base = _recorded(sources) if asked.base is None else _place_or_id(asked.base)
    folder = storage.resolve(os.getcwd(), asked.out)
    storage.check_writable(folder)
    examples = storage.join(folder, "prompts.jsonl")
    write_if_new(examples, _examples(asked))
    names = [source.name for source in sources]
    weights = {"experts": names, **({"min": -1.0, "max": 1.0} if asked.negative else {"simplex": True})}
    try:
        project = Project(
            location=WHERE,
            workspace=folder,
            base_model=base,
            personas=PersonaSource(path=examples),
            experts={source.name: source.location for source in sources},
            generation=Generation(**asked.generation),
            evaluation=Evaluation(split="validation"),
            output=".",
            search=Search(recipe=RECIPE, space={"weights": weights}, stop_early=False),
        )
    except ValidationError as error:  # the name of an adapter that is taken, a format without a prompt
        [problem, *_] = error.errors()
        found = problem["input"] if isinstance(problem["input"], str) else "give another name: OTHER=FOLDER"
        raise ProjectError(f"{WHERE}: {problem['msg'].removeprefix('Value error, ')}; {found}.") from error
    return Opened(project, read_personas(PersonaSource(path=examples)), {}, ())


def _examples(asked: Fused) -> bytes:
    if asked.prompts is None:
        raise PersonaError(
            f"{WHERE}: there is nothing to score weights on.\nGive --prompts FILE with prompt, response."
        )
    location = storage.resolve(os.getcwd(), asked.prompts)
    prompts, _ = read_prompts(location, "validation")
    without = next((number for number, one in enumerate(prompts, 1) if one.reference is None), None)
    if without is not None:
        raise PersonaError(f"{location}: prompt {without} has no response, with which answers could be compared.")
    rows = [
        {"persona": f"prompt_{number:05d}", "prompt": one.text, "response": one.reference, "split": "validation"}
        for number, one in enumerate(prompts)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _recorded(sources: tuple[Source, ...]) -> str:
    """The base that the adapters record. Raises AdapterError where they name none, or several."""
    named = {source.name: open_adapter(source.location, source.name).base_model for source in sources}
    bases = set(named.values())
    base = next(iter(bases))
    if len(bases) > 1 or base is None:
        listed = ", ".join(f"{name}: {base or 'none'}" for name, base in named.items())
        raise AdapterError(f"{WHERE}: the adapters do not record one base model.\nFound {listed}. Give --base.")
    return _place_or_id(base)


def _place_or_id(base: str) -> str:
    """A folder as an absolute path; else a hub id, as it is."""
    place = storage.resolve(os.getcwd(), base)
    return place if storage.exists(place) else base
