"""What decides a router: personas and experts as points of a space, answers to learn from, settings; and their key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymerge import storage
from raymerge.adapters.formats import adapter_digest
from raymerge.errors import PersonaError, RoutingError
from raymerge.models.router_training import RouterSettings
from raymerge.personas import Personas
from raymerge.routing.clusters import Clusters
from raymerge.routing.embeddings import Embeddings, read_embeddings
from raymerge.routing.inputs import RoutingInputs, Space, check_inputs, make_space
from raymerge.routing.router import RouterShape
from raymerge.runtime.bases import base_digest, base_of_dora, describe
from raymerge.runtime.tasks import RouterTask
from raymerge.runtime.training_inputs import GroupInputs

VECTORS, MEAN, LABELS = "vectors.parquet", "mean.json", "labels.json"  # what a placing folder holds
NOTHING = GroupInputs((), (), "")


@dataclass(frozen=True)
class Expert:
    """An adapter that others may be given. digest: of its files. start: what its training began from, resolved, with
    its digest; None for the base."""

    name: str
    location: str
    digest: str
    start: str | None = None
    start_digest: str | None = None


@dataclass(frozen=True, eq=False)
class RouterInputs:
    """experts: in the order of `space.experts`. groups: the examples of each of `space.personas`, none where it is held
    out or has none. mean: what centring took away, float32 (d,). key: of the router that they make."""

    shape: RouterShape
    settings: RouterSettings
    space: Space
    experts: tuple[Expert, ...]
    groups: Mapping[str, GroupInputs]
    mean: NDArray[np.float32]
    notes: tuple[str, ...]
    key: str

    @property
    def anchor(self) -> str:
        """The `anchor` of recipes whose merges measure these experts as their router was taught: `none` where they
        began from several adapters."""
        return "none" if _have_several_starts(self.experts) else "auto"

    @property
    def start(self) -> tuple[str, str] | None:
        """Location and digest of what all experts began from; None for the base, or if they began from several."""
        first = self.experts[0]
        if self.anchor == "none" or first.start is None or first.start_digest is None:
            return None
        return first.start, first.start_digest


def gather_router_inputs(task: RouterTask, personas: Personas, dtype: str) -> RouterInputs:
    """Read what decides a task's router; weights of adapters are digested and not read.

    dtype: of the base on this worker. Raises PersonaError if nobody has training examples, RoutingError if there are
    not two experts, or somebody has no embedding or no cluster; AdapterError, StorageError.
    """
    embeddings = read_embeddings(storage.join(task.placing, VECTORS))
    space, mean, notes = _place(task, embeddings)
    vectors = embeddings.take([*space.personas, *space.experts])
    locations = dict(task.experts)
    experts = tuple(_describe(name, locations[name], task.workspace) for name in space.experts)
    shape, settings = _settings(task.settings, space)
    teaching = set(personas.names) - set(task.held_out)
    groups = {
        name: _examples(personas, name, task.tuning_examples if name in teaching else None) for name in space.personas
    }
    if not any(group.rows for group in groups.values()):
        where = personas.location or "personas"
        raise PersonaError(f"{where}: nobody whom the router may learn from has training examples.\nAdd some.")
    labels = space.persona_labels
    found = {
        "personas": [[name, labels[i], groups[name].key] for i, name in enumerate(space.personas)],
        "experts": [[e.name, _digest(e, task.base), e.start_digest] for e in experts],
        "members": {label: numbers.tolist() for label, numbers in space.by_label.items()},
        "vectors": storage.digest_bytes(vectors.tobytes()),
        "mean": storage.digest_bytes(mean.tobytes()),
        "shape": shape.as_record(),
        "settings": asdict(settings),
        "prompt_format": task.prompt_format,
        "base": task.base_digest,
        "dtype": dtype,
        "experts_bytes": task.experts_bytes,
    }
    notes += _notes_of_starts(experts)
    return RouterInputs(shape, settings, space, experts, groups, mean, tuple(notes), storage.digest_value(found))


def _place(task: RouterTask, embeddings: Embeddings) -> tuple[Space, NDArray[np.float32], list[str]]:
    mean = np.array(storage.read_json(storage.join(task.placing, MEAN)), dtype=np.float32)
    labels = storage.read_json(storage.join(task.placing, LABELS))
    inputs = RoutingInputs(
        personas=task.names,
        experts=[name for name, _ in task.experts if name not in task.held_out],
        embeddings=embeddings,
        clusters=Clusters(labels) if labels else None,
        mean=mean,
    )
    space, notes = make_space(check_inputs(inputs), centred=True)
    if len(space.experts) < 2:
        raise RoutingError(
            f"router: there are {len(space.experts)} experts to choose from.\n"
            "Expected two or more adapters with an embedding: a persona learns from the experts of others."
        )
    return space, mean, notes


def _settings(given: Mapping[str, Any], space: Space) -> tuple[RouterShape, RouterSettings]:
    shape = {name: given[name] for name in RouterShape.__dataclass_fields__ if name in given}
    settings = {name: given[name] for name in RouterSettings.__dataclass_fields__ if name in given}
    outputs = space.experts if shape.get("network") == "mlp" else ()
    shape |= {"size": space.keys.shape[1], "experts": outputs}
    return RouterShape(**shape), RouterSettings(**settings)


def _examples(personas: Personas, name: str, tuning: int | None) -> GroupInputs:
    """What a persona teaches: nothing without a number of validation examples that are left to tuning."""
    if tuning is None:
        return NOTHING
    rows, validation = personas.examples(name, "train"), personas.examples(name, "validation")[tuning:]
    key = storage.digest_value([[e.content for e in part] for part in (rows, validation)])
    return GroupInputs(rows, validation, key)


def _describe(name: str, location: str, workspace: str) -> Expert:
    digest = adapter_digest(location, name)
    named = describe(location, name, digest).started_from
    if named is None:
        return Expert(name, location, digest)
    start = storage.resolve(workspace, named)
    return Expert(name, location, digest, start, adapter_digest(start, f"{name}: what it was started from"))


def _digest(expert: Expert, base: str | None) -> list[str]:
    """What decides an expert's deltas: its files, and for DoRA those of the base."""
    if not describe(expert.location, expert.name, expert.digest).dora:
        return [expert.digest]
    return [expert.digest, base_digest(base_of_dora(expert.name, base))]


def _have_several_starts(experts: Sequence[Expert]) -> bool:
    return len({expert.start_digest for expert in experts}) > 1


def _notes_of_starts(experts: Sequence[Expert]) -> list[str]:
    started = [expert for expert in experts if expert.start is not None]
    if not started:
        return []
    several = "experts were started from different adapters: all are measured from the base"
    return [
        *([several] if _have_several_starts(experts) else []),
        f"{len(started)} of {len(experts)} experts were started from an adapter ({started[0].name} from "
        f"{started[0].start}): what that has learned of a persona's training rows is in all of them, though the "
        "persona's own adapter is hidden from it. Validation rows are not touched by it",
    ]
