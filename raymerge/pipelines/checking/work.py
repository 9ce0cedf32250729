"""The steps of a run, counted: what is missing of trainings, merges and evaluations, and what each costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from raymerge import storage
from raymerge.evaluation.scores import kind_of
from raymerge.manifest import read_manifest
from raymerge.personas import Split
from raymerge.pipelines import tuning
from raymerge.pipelines.checking import operations
from raymerge.pipelines.checking.estimate import ITEM_S, Step, measured_items
from raymerge.pipelines.checking.known import Known
from raymerge.pipelines.checking.merges import joined, merge_step
from raymerge.pipelines.checking.operations import padded, rows_of
from raymerge.pipelines.checking.trainings import own_training_step, training_step
from raymerge.pipelines.placing import job_needs_embeddings
from raymerge.pipelines.planning import PERSONAS_PER_EMBEDDING, TRAINS_ITS_OWN, embedding_source
from raymerge.pipelines.trainings import all_groupings
from raymerge.recipes import Recipe

SAMPLE = 2_000  # rows that are encoded to see how many bytes texts take
EMBEDDING = 2_200  # bytes of a persona's vector
METRICS = 14  # bytes of a row's figures
TABLES = 2_300  # bytes of a part's two tables besides its rows, and of its marker
COMPARE_S, COMPARE_BYTES = 10.0, 1_500_000  # the table, five plots, one page


def steps_of_run(known: Known) -> tuple[Step, ...]:
    """The steps of `raymerge run`, in their order; those with nothing to do are there too."""
    project, groupings = known.opened.project, all_groupings(known.opened)
    trainings = [training_step(known, grouping) for grouping in groupings]
    recipes = list(known.opened.recipes.values())
    own = [own_training_step(known, recipe) for recipe in recipes if recipe.strategy in TRAINS_ITS_OWN]
    merges = [merge_step(known, recipe) for recipe in recipes]
    embedding = [_embedding(known)] if job_needs_embeddings(project, recipes, groupings) else []
    compare = Step("compare", "driver", 1, 1, 0, 0.0, COMPARE_BYTES, 1.0, fixed_s=COMPARE_S)
    return (*embedding, *trainings, *own, joined(merges), _evaluating(known, recipes), compare)


def _embedding(known: Known) -> Step:
    if embedding_source(known.opened) != "texts":
        return Step("embed", "merge", known.bank.readable, math.ceil(known.bank.readable / 50), 0, 0.0, 0)
    lengths = known.lengths.of("train")
    tokens = float(lengths.weight @ (lengths.prompt + lengths.answer))
    people = len(known.training_rows)
    items = math.ceil(people / PERSONAS_PER_EMBEDDING)
    there = storage.exists(storage.join(known.opened.project.shared_folder(), "embeddings", "texts-0000"))
    done = 0.0 if there else 2 * operations.ENCODER_WEIGHTS * tokens
    measured = measured_items([known.timings], ("embed/",), items)
    if there:
        return Step("embed", "model", 0, 0, people, 0.0, 0)
    nbytes = EMBEDDING * people
    return Step("embed", "model", people, items, 0, 0.0, nbytes, 1 / items, encoding=done, measured_s=measured)


def _evaluating(known: Known, recipes: Sequence[Recipe]) -> Step:
    """Answers and scores of all runs that are not scored yet."""
    project = known.opened.project
    there = [r for r in recipes if read_manifest(storage.join(project.run_folder(r.name), "evaluation")) is not None]
    to_do = [recipe for recipe in recipes if recipe not in there]
    passes = [(recipe, split, share) for recipe in to_do for split, share in _scored(known, recipe)]
    done = sum(_answering(known, recipe, split) * share for recipe, split, share in passes)
    encoded = sum(_encoding(known, split) * share for _, split, share in passes)
    items = sum(math.ceil(_people(known, split) / project.evaluation.personas_per_item) for _, split, _ in passes)
    nbytes = round(sum(_text_bytes(known, split) for _, split, share in passes if share == 1.0))
    measured = measured_items(known.run_timings, ("evaluate/", "validate/"), items)
    return Step(
        "evaluate", "model", len(to_do), items, len(there), done, nbytes, 1 / max(items, 1),
        encoding=encoded, fixed_s=ITEM_S * items, measured_s=measured,
    )  # fmt: skip


def _scored(known: Known, recipe: Recipe) -> Iterator[tuple[Split, float]]:
    """The splits that a recipe is scored on, and how many times; what is tuned is tried on a part."""
    settings = known.opened.project.evaluation
    yield settings.split, 1.0
    if not _people(known, "validation"):
        return
    if settings.split == "test" and kind_of(recipe.name, recipe.as_dict()) == "recipe":
        yield "validation", 1.0
    if recipe.tuned:
        people = min(settings.tuning_personas, len(known.personas.names))
        share = people * settings.tuning_examples / max(_rows(known, "validation"), 1)
        yield "validation", len(tuning.grid(known.opened, recipe)) * min(share, 1.0)


def _rows(known: Known, split: Split) -> float:
    return float(known.lengths.of(split).weight.sum())


def _people(known: Known, split: Split) -> int:
    return len(known.personas.names) - len(known.personas.missing(split))


def _answering(known: Known, recipe: Recipe, split: Split) -> float:
    """Operations of one pass over a split: answers and likelihoods."""
    project, lengths = known.opened.project, known.lengths.of(split)
    batch = project.evaluation.batch_size
    adapted = 0 if recipe.strategy == "base" else known.adapted(project.training.of("persona"))
    answers = np.minimum(lengths.answer, project.generation.max_new_tokens)
    prompts = padded(lengths.prompt, lengths.owner, batch, together=True)
    new = padded(answers, lengths.owner, batch, together=True)
    widths = padded(lengths.prompt + lengths.answer, lengths.owner, batch, together=True)
    generated = operations.answering_operations(known.layers, adapted, prompts, new, lengths.weight)
    scored = operations.scoring_operations(known.layers, adapted, rows_of(widths, lengths.answer, lengths.weight))
    return generated + scored


def _encoding(known: Known, split: Split) -> float:
    """Operations of the encoder over the answers of a split and their references."""
    lengths = known.lengths.of(split)
    return 2 * operations.ENCODER_WEIGHTS * 2 * float(lengths.weight @ lengths.answer)


def _text_bytes(known: Known, split: Split) -> float:
    """Bytes that the answers and figures of a split take, in parts and joined: as those of a sample, encoded."""
    table = known.personas.table.filter(pa.compute.equal(known.personas.table["split"], split))
    sample = table.slice(0, SAMPLE)
    if not len(sample):
        return 0.0
    texts = {"prompt": sample["prompt"], "reference": sample["response"], "generated": sample["response"]}
    nbytes = len(storage.encode_parquet(pa.table({"persona": sample["persona"], **texts})))
    parts = math.ceil(_people(known, split) / known.opened.project.evaluation.personas_per_item)
    return 2 * (nbytes / len(sample) + METRICS) * len(table) + TABLES * (parts + 1)
