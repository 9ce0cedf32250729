"""What an item asks of a worker: small frozen records of names, locations and numbers. No tensors, no texts.

A task says where its result goes. Whether the result is there already is decided by the worker from the digests of
the inputs as they are when the item starts, because an input may be another item's result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from raymerge.personas import PersonaSource, Split


@dataclass(frozen=True)
class ExpertRef:
    """A contributor to a merge: its name, where its adapter lies, its weight."""

    name: str
    location: str
    weight: float


@dataclass(frozen=True)
class MergeTask:
    """One merge group of a recipe, to be written to `folder`.

    merges: `Recipe.merges`. workspace: where relative locations that adapters record (`started_from`) begin. base:
    where the base model lies, or its hub id, for experts whose deltas depend on its weights; None where there is none.
    """

    name: str
    folder: str
    experts: tuple[ExpertRef, ...]
    merges: Mapping[str, Any]
    workspace: str
    base: str | None = None


@dataclass(frozen=True)
class TrainGroup:
    """One adapter to train: its name, its folder, and the personas whose training examples are its rows."""

    name: str
    folder: str
    personas: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """A number of epochs that was tried: folders of its adapters, and of their evaluation on validation examples."""

    epochs: int
    adapters: str
    evaluation: str


@dataclass(frozen=True)
class TrainTask:
    """Adapters trained together against one resident base.

    training: the settings of one grouping (`config.Training.of`), as a mapping. base_digest: of the base model's files.
    folder: for what is known while it runs: checkpoints, and progress for those who watch. trials: where `epochs` is
    not a number but several, the evaluations that choose among them.
    """

    groups: tuple[TrainGroup, ...]
    grouping: str
    personas: PersonaSource | str
    training: Mapping[str, Any]
    prompt_format: str
    base_digest: str
    workspace: str
    folder: str
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True)
class PrefixTask:
    """Prefixes for PEFT trained side by side, each written to its group's folder.

    tokens: the virtual tokens of a prefix. training, trials: as of a TrainTask. folder: for progress, for those who
    watch.
    """

    groups: tuple[TrainGroup, ...]
    tokens: int
    personas: PersonaSource | str
    training: Mapping[str, Any]
    prompt_format: str
    base_digest: str
    folder: str
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True)
class RouterTask:
    """A router to train on the answers of personas, with the adapters of others mixed as it says.

    names: who is to be routed. held_out: those of them who are treated as if they had no adapter and no examples.
    experts: name and location of adapters. placing: a folder with `vectors.parquet` (of names and experts),
    `mean.json` (what centring takes away) and `labels.json` (name -> cluster). settings: `config.Router` as a mapping.
    tuning_examples: how many validation examples of a persona are left to what tunes the router. experts_bytes: of
    experts in memory at a time, None for all of them; results depend on it where it is too little for all. embedding:
    what the vectors are made of, in words. workspace, base: as of a MergeTask. folder: for the router, and for
    checkpoints and progress while it is trained.
    """

    folder: str
    names: tuple[str, ...]
    held_out: tuple[str, ...]
    experts: tuple[tuple[str, str], ...]
    placing: str
    personas: PersonaSource | str
    settings: Mapping[str, Any]
    tuning_examples: int
    prompt_format: str
    base_digest: str
    workspace: str
    embedding: str
    base: str | None = None
    experts_bytes: int | None = None


@dataclass(frozen=True)
class Retrieval:
    """Prompts that begin with the persona's own training examples, those whose prompts are most similar by `model`.

    examples: how many, the most similar last. format: of one example, a text with {prompt} and {response} in it; with
    prompt_format `chat` they are turns before the prompt.
    """

    examples: int
    format: str
    model: str


@dataclass(frozen=True)
class AnswerSource:
    """What answers for one persona: an adapter or a prefix in a folder, a merge made in memory, a mixture, or the base.

    base: where the base model lies, for an adapter in a folder that is DoRA. anchor: what such an adapter is measured
    from where it is multiplied, as recipes name it (`auto`, `none`, a location); None for the base. workspace: as of a
    MergeTask.
    """

    persona: str
    kind: Literal["base", "adapter", "prefix", "merge", "mixture"]
    location: str | None = None
    merge: MergeTask | None = None
    base: str | None = None
    anchor: str | None = None
    workspace: str = ""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Which examples are answered, and how answers are made and scored: all that decides them but who answers.

    generation: `config.Generation` as a mapping. base_digest: of the base model's files. retrieval: what prompts begin
    with, None for plain ones. most: of a persona's examples only the first so many.
    """

    personas: PersonaSource | str
    split: Split
    generation: Mapping[str, Any]
    similarity_model: str
    batch_size: int
    base_digest: str
    retrieval: Retrieval | None = None
    most: int | None = None


@dataclass(frozen=True)
class EvaluateTask(Asking):
    """Answers and scores for a part of a run's personas, written as one part of the evaluation."""

    folder: str
    sources: tuple[AnswerSource, ...]


@dataclass(frozen=True)
class Candidate:
    """One set of values that tuning tries.

    label: the values as JSON, such as {"factor": 1.4}. sources: what answers for each persona. factor: multiplies what
    an adapter, a merge or a mixture adds to its anchor, or to the base where it has none; 1 for a prefix.
    """

    label: str
    sources: tuple[AnswerSource, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class TuneTask(Asking):
    """Candidates tried side by side on a part of the personas: answers and their similarity, and no adapter is written.

    Candidates that differ in their factor alone share what is merged.
    """

    folder: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class GatherTask:
    """Join the parts of a run's evaluation into `generations.parquet`, `metrics.parquet` and `summary.json`."""

    folder: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class EmbedTask:
    """Embeddings of a part of the personas: the mean over their training examples of the encoder's unit vectors."""

    folder: str
    personas: PersonaSource | str
    names: tuple[str, ...]
    model: str


@dataclass(frozen=True)
class SketchTask:
    """Embeddings of adapters by their deltas, for a folder of adapters without texts. base: as in MergeTask."""

    folder: str
    adapters: tuple[tuple[str, str], ...]
    dimensions: int
    seed: int
    base: str | None = None


@dataclass(frozen=True)
class CheckTask:
    """Losses of a base and of some own adapters on training answers, a few answers, and the worker's speed.

    names: of personas whose training rows are looked at. adapters: name and folder of those of them that have one.
    training: the settings of personas, for a few real steps. answers: prompts that are answered.
    """

    personas: PersonaSource
    names: tuple[str, ...]
    adapters: tuple[tuple[str, str], ...]
    generation: Mapping[str, Any]
    training: Mapping[str, Any]
    answers: int = 3
