"""Which trial a search takes, what is known of it, and how that is written down and told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from raymerge import storage
from raymerge.errors import EvaluationError
from raymerge.evaluation.search_panel import said
from raymerge.evaluation.statistics import Against
from raymerge.evaluation.wording import size
from raymerge.pipelines.searching.aim import Aim
from raymerge.pipelines.searching.scorer import RecipeScorer
from raymerge.recipes import parse_recipe
from raymerge.runtime.broker import CarryOut
from raymerge.search.choice import complexity, importances, optimism, pareto_front, simplest
from raymerge.search.records import Trial
from raymerge.search.results import RECIPE, Scores, Summary, write_recipe, write_scores, write_summary, write_trials
from raymerge.search.study import Study


@dataclass(frozen=True)
class Chosen:
    """The trial that is taken, its values as a person reads them, its recipe as one writes it, and what is known of
    the search."""

    trial: Trial
    told: Mapping[str, Any]
    written: Mapping[str, Any]
    summary: Summary
    scores: Scores


def choose(scorer: RecipeScorer, study: Study) -> Chosen:
    """The simplest recipe within one standard error of the best. Raises EvaluationError if no trial is complete."""
    space, search = scorer.space, scorer.aim.section
    complete = [trial for trial in study.trials if trial.state == "complete"]
    if not complete:
        why = next((trial.error for trial in study.trials if trial.error), "none was begun: the budget is too small")
        raise EvaluationError(
            f"{scorer.opened.project.location}: no trial of the search was carried out.\nFirst: {why}"
        )
    recipes = [space.recipe(trial.values) for trial in complete]
    values = np.array([scorer.scores(recipe) for recipe in recipes])
    experts = [trial.rungs[-1].values["experts"] for trial in complete]
    kinds = [complexity(recipe, count) for recipe, count in zip(recipes, experts, strict=True)]
    number = simplest(complete, values, kinds)
    best = study.best or complete[0]
    taken = next(trial for trial in complete if trial.number == number)
    penalties = np.array([[trial.rungs[-1].penalty] for trial in complete])
    reached = np.array([[t.rungs[-1].values[name] for name in search.objectives] for t in complete])
    front = pareto_front(reached, [name == "similarity" for name in search.objectives])
    summary = Summary(
        winner=number,
        best=best.number,
        similarity=taken.rungs[-1].values["similarity"],
        optimism=optimism(values - penalties) if len(complete) > 1 else None,  # of one, nothing was chosen here
        recipe=space.written(taken.values),
        objectives=search.objectives,
        importances=importances(study.trials, space),
        front=[complete[i].number for i in front],
        log=[parameter.name for parameter in space.parameters if parameter.log],
        budget=_spent(study),
        notes=_failures(study),
    )
    numbers = tuple(trial.number for trial in complete)
    return Chosen(
        taken, space.told(taken.values), space.written(taken.values), summary, Scores(numbers, scorer.names, values)
    )


def score_at_ranks(scorer: RecipeScorer, chosen: Chosen, carry_out: CarryOut) -> Chosen:
    """The same with the winner at each rank of `search.ranks`: its similarity on validation examples and the bytes of
    an adapter. A rank that it cannot be had at becomes a note."""
    found: list[dict[str, Any]] = []
    notes = list(chosen.summary.notes)
    searched = scorer.space.recipe(chosen.trial.values).rank
    for rank in scorer.aim.section.ranks:
        recipe = parse_recipe(scorer.aim.run, {**chosen.written, "rank": rank}, centred=scorer.space.centred)
        try:
            if rank == searched:  # as it was searched: no worker is asked
                values = chosen.trial.rungs[-1].values
            else:
                values = scorer.score_recipe(recipe, len(scorer.rungs) - 1, carry_out).values
        except EvaluationError as error:
            notes.append(f"at rank {rank} the winner cannot be scored: {str(error).splitlines()[0]}")
            continue
        found.append({"rank": rank, "similarity": values["similarity"], "bytes": values["bytes"]})
    return replace(chosen, summary=replace(chosen.summary, ranks=found, notes=notes))


def beside_others(
    chosen: Chosen, aim: Aim, test: float | None, beside: Sequence[Against], notes: Sequence[str]
) -> Chosen:
    """The same with its score on test examples beside other rows, and warnings where it is not better."""
    warnings = [] if test is None else [*_not_beaten(aim, beside)]
    summary = replace(
        chosen.summary,
        run=None if test is None else aim.run,
        test=test,
        beside=[asdict(one) for one in beside],
        notes=[*chosen.summary.notes, *notes, *warnings],
    )
    return replace(chosen, summary=summary)


def _not_beaten(aim: Aim, beside: Sequence[Against]) -> Iterator[str]:
    for one in beside:  # the controls have to be beaten by more than the interval
        if one.name in (aim.random, aim.unified) and one.outcome != "better":
            yield (
                f"the winner does not beat {one.name} beyond its interval: {one.difference:+.2f} points on test "
                f"examples, {one.low:+.2f} to {one.high:+.2f}"
            )
    ahead = [f"{one.name} ({one.similarity:.1f})" for one in beside if one.difference <= 0]
    if ahead:
        yield f"on test examples the winner does not beat {', '.join(ahead)}"


def write_results(scorer: RecipeScorer, study: Study, chosen: Chosen) -> None:
    """Write trials, scores by persona, the summary, and the winner's recipe."""
    folder = scorer.aim.folder
    write_trials(folder, study.trials, scorer.space)
    write_scores(folder, chosen.scores)
    write_recipe(folder, scorer.aim.run, chosen.written)
    write_summary(folder, chosen.summary)


def show(chosen: Chosen, aim: Aim) -> None:
    """Print what a search found."""
    for line in lines_of(chosen, aim):
        print(line, flush=True)


def lines_of(chosen: Chosen, aim: Aim) -> list[str]:
    """What a search found, for people: the winner, what its score is worth, what mattered, what it costs."""
    summary = chosen.summary
    worth = "" if summary.optimism is None or not np.isfinite(summary.optimism) else (
        f"; of it about {summary.optimism:.2f} points are the luck of the best of {summary.budget['complete']}"
    )  # fmt: skip
    lines = [
        f"Winner: trial {summary.winner}, {said(chosen.told)}",
        f"Validation similarity {summary.similarity:.2f} over {len(chosen.scores.personas)} personas{worth}.",
    ]
    if summary.winner != summary.best:
        best = chosen.scores.of([summary.best])[0].mean()
        lines.append(f"It is the simplest within one standard error of the best, trial {summary.best} ({best:.2f}).")
    if summary.importances:
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in summary.importances.items())
        lines.append(f"What mattered: {shares}.")
    if summary.ranks:
        ranks = ", ".join(f"{r['rank']}: {r['similarity']:.1f} ({size(r['bytes'])})" for r in summary.ranks)
        lines.append(f"By rank: {ranks}.")
    if summary.test is not None:
        lines.append(f"Test similarity {summary.test:.2f}; the difference from others, with its 95 % interval:")
        lines += [
            f"  {one['name']:<24} {one['similarity']:6.2f}  {one['difference']:+6.2f}  "
            f"({one['low']:+.2f} to {one['high']:+.2f})"
            for one in summary.beside
        ]
    lines += [f"note: {note}" for note in summary.notes]
    return [*lines, f"Recipe: {storage.join(aim.folder, RECIPE)}"]


def _spent(study: Study) -> dict[str, Any]:
    states = [trial.state for trial in study.trials]
    rungs = [figures for trial in study.trials for figures in trial.rungs]
    return {
        "trials": len(states),
        **{state: states.count(state) for state in ("complete", "stopped", "failed")},
        "answers": sum(figures.answers for figures in rungs),
        "seconds": round(sum(figures.seconds for figures in rungs), 3),
    }


def _failures(study: Study) -> list[str]:
    failed = [trial for trial in study.trials if trial.state == "failed"]
    if not failed:
        return []
    first = (failed[0].error or "no reason given").splitlines()[0]
    return [f"{len(failed)} trials could not be carried out; trial {failed[0].number}: {first}"]
