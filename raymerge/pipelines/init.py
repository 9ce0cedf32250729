"""`raymerge init FOLDER`: a project file for a folder of adapters, and personas where there are any."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import yaml

from raymerge import storage
from raymerge.adapters import read_header
from raymerge.errors import ProjectError, RaymergeError
from raymerge.personas import FORMS, SPLITS, PersonaSource, Recognised, read_personas, recognise

NAME = "raymerge.yaml"
RECIPES: dict[str, dict[str, Any]] = {
    "own": {"strategy": "own"},
    "simple_average": {"strategy": "simple_average"},
    "sparse_moe_k5": {"strategy": "sparse_moe", "k": 5, "temperature": 0.1},
    "random_k5": {"strategy": "random_k", "of": "sparse_moe_k5"},
}


def init(folder: str) -> tuple[str, list[str]]:
    """Look into a folder and write its project file. Returns where it is, and what was found, in lines.

    Adapters are the folders with an adapter_config.json, in FOLDER itself or in a folder below it. Raises ProjectError
    if there are none or a project file is there already.
    """
    folder = storage.resolve(os.getcwd(), folder)
    target = storage.join(folder, NAME)
    if storage.exists(target):
        raise ProjectError(f"{target}: is there already.\nEdit it, or remove it first.")
    template, names = _find_adapters(folder)
    personas, said = _find_personas(folder, names)
    base, found = _base_of(storage.join(folder, template.replace("{persona}", names[0])), names[0])
    project: dict[str, Any] = {"workspace": ".", "adapters": template}
    if base is not None:
        project["base_model"] = base
    if personas:
        project["personas"] = personas["path"] if set(personas) == {"path"} else personas
    count = max(1, min(5, len(names) // 4))
    recipes = RECIPES if len(names) > 1 else {"own": {"strategy": "own"}}
    project |= {"clusters": {"count": count, "seed": 0}, "output": "runs", "recipes": recipes}
    text = "# Written by `raymerge init`. README.md says what every key means.\n" + yaml.safe_dump(
        project, sort_keys=False
    )
    storage.write_bytes(target, text.encode())
    lines = [f"{len(names)} adapters in {template}", found]
    return target, [*lines, *said]


def _find_adapters(folder: str) -> tuple[str, Sequence[str]]:
    found: dict[str, list[str]] = {}
    for file in storage.list_files(folder):
        parts = file.path.split("/")
        if parts[-1] == "adapter_config.json" and 2 <= len(parts) <= 3 and parts[0] != "runs":
            found.setdefault("/".join([*parts[:-2], "{persona}"]), []).append(parts[-2])
    if not found:
        raise ProjectError(
            f"{folder}: holds no adapters.\n"
            "Expected folders with adapter_config.json and weights in PEFT's or MLX's form, here or one folder below."
        )
    template = max(found, key=lambda t: (len(found[t]), t))
    return template, sorted(found[template])


def _find_personas(folder: str, adapters: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What `personas` of the project file says, nothing where there are none; and lines for people."""
    there = [name for name in storage.list_names(folder) if name.endswith(FORMS)]
    named: list[str] = [name for name in ("personas.jsonl", "personas.parquet") if name in there]
    if not named and any(f.path.endswith(FORMS) for f in storage.list_files(storage.join(folder, "personas"))):
        named = ["personas"]  # a folder of shards
    known: dict[str, Recognised | None] = {}
    for name in named[:1] or there:
        try:
            known[name] = recognise(storage.join(folder, name))
        except RaymergeError as error:
            if named:
                return {"path": name}, [str(error).splitlines()[0]]
    readable = {name: found for name, found in known.items() if found is not None}
    if named and not readable:
        return {"path": named[0]}, [
            f"examples in {named[0]}: its columns are not known; docs/data.md says how to name them"
        ]
    if len(readable) > 1:
        return {}, [f"examples in {', '.join(readable)}: give one as `personas`"]
    if not readable:
        return {}, ["no personas file: routed by the adapters' deltas"]
    name, found = next(iter(readable.items()))
    keys = {"path": name, **found.keys}
    return keys, [_described(folder, keys, adapters), *(f"{name}: {note}" for note in found.notes)]


def _described(folder: str, keys: dict[str, Any], adapters: Sequence[str]) -> str:
    source = PersonaSource(**{**keys, "path": storage.join(folder, keys["path"])})
    try:
        personas = read_personas(source)
    except RaymergeError as error:
        return str(error).splitlines()[0]
    counted = personas.counts().values()
    splits = ", ".join(f"{sum(one[split] for one in counted):,} {split}" for split in SPLITS)
    trained = len(set(personas.names) & set(adapters))
    return f"examples in {keys['path']}: {len(personas.names):,} personas ({trained:,} with an adapter), {splits}"


def _base_of(location: str, name: str) -> tuple[str | None, str]:
    try:
        base = read_header(location).settings.base_model
    except RaymergeError as error:
        return None, f"{name}: {str(error).splitlines()[0]}"
    if base is None:
        return None, "the adapters name no base model: set base_model to evaluate or train"
    return base, f"base model {base}, as {name} names it"
