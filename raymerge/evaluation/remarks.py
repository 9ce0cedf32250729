"""What a reader of the comparison must be told beside its figures."""

from collections.abc import Sequence

from raymerge.evaluation.scores import REFERENCES, Aligned, RunScores, examples_in_prompt, same_but
from raymerge.evaluation.seeds import seed_means

LARGE_ERROR = 0.2
WORSE = 10.0  # points that examples in the prompt may cost before a reader is told why
NAMED = 10  # personas named before the rest are counted


def remarks(
    runs: Sequence[RunScores],
    aligned: Aligned,
    reference: str,
    similarity_model: str | None,
    routing_model: str | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Warnings, which may change what the figures mean, and notes, which help to read them."""
    warnings = [_missing(name, personas) for name, personas in aligned.missing.items()]
    if aligned.missing:
        warnings.append(f"All rows stand on the {len(aligned.personas)} personas that every run answered in full.")
    if aligned.differing is not None:
        sides = " against others than ".join(", ".join(side) for side in aligned.by_references)
        persona, example = aligned.differing
        warnings.append(
            f"The examples have changed between evaluations, so these rows cannot be compared: {sides} "
            f"(first difference: {persona}, example {example}). Evaluate all of them again."
        )
    names = [run.name for run in runs]
    if reference not in names:
        warnings.append(
            f"No run named {reference} is here, so no difference, no p value and no regression can be shown. "
            f"Evaluate it and compare again."
        )
    warnings += [
        f"{run.name}: compression lost {100 * run.compression_error:.0f} % of the merged deltas "
        f"(above {100 * LARGE_ERROR:.0f} %). A higher rank would keep more."
        for run in runs
        if run.compression_error is not None and run.compression_error > LARGE_ERROR
    ]
    if len(aligned.personas) < 20:
        warnings.append(f"{len(aligned.personas)} personas are few: intervals are wide, and only approximate.")
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    notes += [
        f"{run.name}: seed {seed} is left out, since it lacks answers of {count} personas that this table stands on."
        for run in runs
        for seed, count in seed_means(run, aligned)[1].items()
    ]
    notes += _harmed_by_examples(runs, aligned)
    if similarity_model and similarity_model == routing_model:
        notes.append(
            f"{similarity_model} both routes and scores, so it judges its own choice. chrF and the likelihood do not."
        )
    absent = sorted(REFERENCES - {str(run.recipe.get("strategy")) for run in runs if run.kind == "reference"})
    if absent:
        notes.append(f"Not compared here: {', '.join(absent)}.")
    if not any(run.kind == "control" for run in runs):
        notes.append("No control was compared: random_k, random_cluster or shuffled say what any merge would gain.")
    return tuple(warnings), tuple(notes)


def _harmed_by_examples(runs: Sequence[RunScores], aligned: Aligned) -> list[str]:
    """What may be behind rows that fall far below the same recipe with plain prompts."""
    means = 100 * aligned.persona_means("similarity").mean(axis=1)
    fell = [
        run.name
        for i, run in enumerate(runs)
        if examples_in_prompt(run.recipe)
        and any(
            not examples_in_prompt(plain.recipe)
            and same_but(run.recipe, plain.recipe, "retrieval")
            and means[i] < means[j] - WORSE
            for j, plain in enumerate(runs)
        )
    ]
    if not fell:
        return []
    return [
        f"{', '.join(fell)}: the base answers worse with examples in its prompt than without: it may never have seen "
        "several in one context."
    ]


def _missing(name: str, personas: Sequence[str]) -> str:
    rest = f" and {len(personas) - NAMED} more" if len(personas) > NAMED else ""
    named = ", ".join(personas[:NAMED])
    return f"{name}: {len(personas)} personas lack answers and are left out of all rows: {named}{rest}."
