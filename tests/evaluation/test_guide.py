"""The decision guide: what it says of comparisons that were made for it."""

import re
import shlex

import click
import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from raymerge.cli import app
from raymerge.evaluation.comparison import Comparison, compare
from raymerge.evaluation.guide.facts import Step
from raymerge.evaluation.scores import Costs, RunScores

from .conftest import SOFT, at_seed, recipe, run

TRAINED = {"unified": Costs(600, 0, 30, 1 << 20, 1), "own": Costs(3600, 0, 40, 80 << 20, 80),
           "base": Costs(0, 0, 30, 0, 0), "cluster_trained": Costs(900, 0, 35, 5 << 20, 5)}  # fmt: skip
MERGED = Costs(3600, 20, 30, 60 << 20, 80)
RETRIEVAL = {"examples": 3, "format": "{prompt} {response}"}
TOP = {"strategy": "top_k", "k": 5}


def row(name: str, level: float, seed: int, *, noise: float = 0.05, made_by: dict | None = None, **more) -> RunScores:
    generator = np.random.default_rng([seed, len(name)])
    similarity = np.clip(level + generator.normal(0, noise, size=(80, 6)), 0, 1)
    written = made_by or recipe(name, name)
    return run(name, written, similarity, costs=TRAINED.get(name, MERGED), **more)


def soft(level: float, name: str = "soft", seed: int = 5, noise: float = 0.05, **more) -> RunScores:
    keys = {key: more.pop(key) for key in ("retrieval", "scale") if key in more}
    return row(name, level, seed, noise=noise, made_by={**recipe(name, "soft", **SOFT), **keys}, **more)


def references(unified: float = 0.5, own: float = 0.45, cluster_trained: float | None = 0.55) -> list[RunScores]:
    rows = [row("base", 0.3, 1), row("unified", unified, 2), row("own", own, 3)]
    return rows if cluster_trained is None else [*rows, row("cluster_trained", cluster_trained, 4)]


def control(level: float) -> RunScores:
    return row("random_soft", level, 9, made_by=recipe("random_soft", "random_k", of={"strategy": "soft", **SOFT}))


def guided(*runs: RunScores) -> Comparison:
    return compare(list(runs), resamples=500, project="p.yaml")


def step(comparison: Comparison, begin: str) -> Step | None:
    return next((s for s in comparison.guide.steps if s.what.startswith(begin)), None)


def test_merging_comes_first_where_nothing_was_merged() -> None:
    comparison = guided(*references())
    first = comparison.guide.steps[0]
    assert first.what.startswith("Merge neighbours")
    assert not first.training
    assert first.command.startswith("raymerge merge p.yaml --strategy top_k")
    assert first.gain[0] == 0
    assert 4 < first.gain[1] < 7  # what training per cluster has over unified
    assert "cluster_trained has over unified" in first.sentence


def test_without_the_reference_it_is_what_to_run() -> None:
    comparison = guided(references()[2], soft(0.6))
    assert comparison.guide.steps[0].command == "raymerge run p.yaml --recipe unified"


def test_a_merge_that_loses_to_training_on_clusters_asks_for_training_on_neighbours() -> None:
    best = row("top", 0.55, 5, made_by=recipe("top", "top_k", k=5))
    comparison = guided(*references(cluster_trained=0.62), best, control(0.4))
    found = step(comparison, "Train one adapter per persona on the rows of its experts in top")
    rows = {row.name: row.similarity for row in comparison.rows}
    assert found.training
    assert found.gain is None  # clusters are trained on other rows: what they have is background
    assert f"is at +{rows['cluster_trained'] - rows['top']:.1f} [" in found.sentence
    assert "likely" not in found.sentence
    assert found.seconds == pytest.approx(5 * 3600 + 35, rel=0.01)  # five times the rows of own adapters
    assert "of: top" in found.what
    free = [s for s in comparison.guide.steps if not s.training and not s.tells]
    assert free
    assert comparison.guide.steps.index(free[0]) < comparison.guide.steps.index(found)


def test_a_merge_that_beats_training_on_clusters_does_not() -> None:
    comparison = guided(*references(cluster_trained=0.55), soft(0.65), control(0.4))
    assert step(comparison, "Train one adapter per persona") is None
    assert step(guided(*references(cluster_trained=None), soft(0.65)), "Train one adapter per cluster").training


def test_within_noise_more_test_data_is_asked_for() -> None:
    comparison = guided(*references(), soft(0.503, noise=0.2), control(0.3))
    difference = comparison.rows[comparison.row("soft")].difference
    assert abs(difference.mean) < difference.smallest_detectable
    found = step(comparison, "Write about") or step(comparison, "Test on about")
    assert found.tells
    assert found.command == "raymerge run p.yaml --recipe soft --recipe unified"
    assert f"now {difference.smallest_detectable:.1f} is the least" in found.sentence
    clear = guided(*references(), soft(0.65), control(0.3))
    assert not any(s.what.startswith(("Write about", "Test on about")) for s in clear.guide.steps)


def test_the_number_of_examples_asked_for_would_show_the_difference() -> None:
    """The answer's noise is all there is: the data asked for has to bring the smallest difference down to the gap."""
    comparison = guided(*references(), soft(0.53, noise=0.2), control(0.3))
    difference = comparison.rows[comparison.row("soft")].difference
    found = step(comparison, "Write about")
    examples = int(re.findall(r"about (\d+) test examples", found.what)[0])
    reach = difference.smallest_detectable * np.sqrt(6 / examples)
    assert reach == pytest.approx(max(abs(difference.mean), difference.smallest_detectable / 5), rel=0.4)


def test_personas_that_differ_need_more_personas() -> None:
    generator = np.random.default_rng(0)
    level = 0.5 + 0.2 * generator.choice([-1, 1], size=(80, 1)) + 0.01
    differing = run("soft", recipe("soft", "soft", **SOFT), np.repeat(level, 6, axis=1), costs=MERGED)
    unified = run("unified", recipe("unified", "unified"), np.full((80, 6), 0.5), costs=TRAINED["unified"])
    assert step(compare([unified, differing], resamples=200), "Test on about") is not None


def test_retrieval_that_helped_unified_is_asked_for_with_the_best_merge() -> None:
    rag = row("rag_unified", 0.56, 6, made_by={**recipe("rag_unified", "unified"), "retrieval": RETRIEVAL})
    comparison = guided(*references(), soft(0.6), control(0.4), rag)
    found = step(comparison, "Put similar training examples into the prompts of soft")
    assert 4 < found.gain[0] < 6 < found.gain[1] < 8
    assert "as they brought unified" in found.sentence
    assert "no training" in found.sentence
    assert found.command == "raymerge run p.yaml --recipe rag_soft"
    hurt = row("rag_unified", 0.42, 6, made_by={**recipe("rag_unified", "unified"), "retrieval": RETRIEVAL})
    assert step(guided(*references(), soft(0.6), control(0.4), hurt), "Put similar") is None


def test_rows_that_examples_in_the_prompt_harm_are_named() -> None:
    def harmed(level: float) -> list[str]:
        rag = row("rag_unified", level, 6, made_by={**recipe("rag_unified", "unified"), "retrieval": RETRIEVAL})
        return [note for note in guided(*references(unified=0.5), rag).notes if "several in one context" in note]

    assert harmed(0.35) == [
        "rag_unified: the base answers worse with examples in its prompt than without: it may never have seen several "
        "in one context."
    ]
    assert harmed(0.45) == []


def test_retrieval_that_wins_asks_for_more_of_it_and_is_not_merging() -> None:
    rag = soft(0.7, "rag_soft", seed=7, retrieval=RETRIEVAL)
    comparison = guided(*references(), soft(0.6), control(0.4), rag)
    assert comparison.verdict.row == "soft"
    assert any("with training examples in the prompt too: rag_soft 69.6" in d for d in comparison.verdict.details)
    found = step(comparison, "Put more training examples into the prompts of rag_soft")
    assert "`retrieval: 6`" in found.what
    assert comparison.guide.in_hand.startswith("Best in hand: rag_soft 69.6, +")


def test_what_tuning_brought_elsewhere_is_what_it_may_bring() -> None:
    tuned = soft(0.62, "soft_tuned", seed=8, scale="tuned", tuned={"chosen": {"factor": 1.4}, "tried": []})
    best = row("top", 0.66, 10, made_by=recipe("top", "top_k", k=5))
    comparison = guided(*references(), soft(0.58), tuned, best)
    found = step(comparison, "Tune the scale of top")
    assert "as it brought soft" in found.sentence
    assert found.gain[0] < 4 < found.gain[1]
    assert step(guided(*references(), soft(0.58), tuned), "Tune the scale") is None


def test_a_search_is_asked_for_once_and_where_examples_can_choose() -> None:
    rows = [*references(), control(0.4)]
    asked = step(guided(*rows, soft(0.6, validation_similarity=60.0)), "Search")
    assert asked is not None
    assert (asked.command, asked.gain, asked.seconds) == ("raymerge search p.yaml", None, 20 * 30)
    assert step(guided(*rows, soft(0.6)), "Search") is None  # nobody has validation examples
    assert step(guided(*rows, soft(0.6, name="searched", validation_similarity=60.0)), "Search") is None
    assert step(guided(*references()), "Search") is None  # what is merged by hand costs less, and comes first


def test_a_router_is_asked_for_once_and_where_examples_can_tune_it() -> None:
    rows = [*references(), control(0.4)]
    asked = step(guided(*rows, soft(0.6, validation_similarity=60.0)), "Train a router")
    assert asked is not None
    assert (asked.command, asked.gain, asked.training) == ("raymerge router p.yaml", None, True)
    assert asked.seconds == 4 * 600 + 10 * 30
    assert step(guided(*rows, soft(0.6)), "Train a router") is None  # nobody has validation examples
    learned = soft(0.6, name="learned_router", validation_similarity=60.0)
    assert step(guided(*rows, learned), "Train a router") is None
    assert step(guided(*references()), "Train a router") is None


@pytest.mark.parametrize(("chosen", "asks"), [(2.0, "above 2"), (0.5, "below 0.5"), (1.0, None)])
def test_a_scale_at_the_end_of_the_grid_asks_for_a_wider_one(chosen: float, asks: str | None) -> None:
    tried = [{"factor": f, "similarity": 60 - 3 * abs(f - chosen)} for f in (0.5, 1.0, 2.0)]
    best = soft(0.62, scale="tuned", tuned={"chosen": {"factor": chosen}, "tried": tried})
    found = step(guided(*references(), best), "Let soft try scales")
    assert (found is None) == (asks is None)
    if asks is not None:
        assert asks in found.what
        assert found.gain[1] == pytest.approx(3 if chosen == 2.0 else 1.5)


def test_a_choice_per_persona_is_asked_for_where_it_repeats() -> None:
    even = np.arange(80)[:, None] % 2 == 0
    made = {"unified": np.where(even, 0.7, 0.4), "own": np.where(even, 0.4, 0.7)}
    noise = np.random.default_rng(0).normal(0, 0.03, size=(80, 6))
    runs = [run(name, recipe(name, name), level + noise, costs=TRAINED[name]) for name, level in made.items()]
    found = step(guided(*runs, soft(0.56)), "Choose among the adapters as trained")
    assert 10 < found.gain[1] < 16
    assert step(guided(*references(), soft(0.56)), "Choose among") is None


def test_no_control_asks_for_one() -> None:
    assert step(guided(*references(), soft(0.6)), "Ask random experts").command.endswith("--recipe random_soft")
    assert step(guided(*references(), soft(0.6), control(0.4)), "Ask random experts") is None


def test_a_control_of_another_recipe_asks_for_one_of_its_own() -> None:
    other = row("random_soft", 0.4, 9, made_by=recipe("random_soft", "random_k", of=TOP))
    found = step(guided(*references(), soft(0.6), other), "Ask random experts")
    assert "without a control of its own" in found.sentence
    assert found.command.endswith("--recipe random_experts_for_soft")  # the plain name is taken


def test_the_headline_asks_for_the_data_that_the_guide_asks_for() -> None:
    comparison = guided(*references(), soft(0.53, noise=0.4), control(0.3))
    found = step(comparison, "Write about") or step(comparison, "Test on about")
    assert comparison.verdict.undecided
    assert comparison.verdict.headline.endswith(f"that takes {found.what[found.what.index('about') :]}.")


def test_bad_own_adapters_ask_to_start_from_unified_while_no_merge_gains() -> None:
    found = step(guided(*references(own=0.2), soft(0.45), control(0.3)), "Train the personas' own adapters from")
    assert found.command == (
        "raymerge train p.yaml --group-by persona --start-from unified` and `raymerge run p.yaml --recipe soft "
        "--recipe own"
    )
    assert found.gain is None
    assert step(guided(*references(own=0.2), soft(0.6), control(0.3)), "Train the personas' own") is None


def test_a_gain_asks_for_other_seeds_until_they_are_there() -> None:
    comparison = guided(*references(), soft(0.6), control(0.4))
    assert comparison.guide.steps[-1].command == "raymerge run p.yaml --recipe soft --recipe unified --seeds 3"
    seeded = [soft(0.6, by_seed={1: at_seed(60, 80, 6)}), *references()]
    assert step(guided(*seeded, control(0.4)), "Train with 3 seeds") is None


def test_a_place_and_a_project_are_named_as_they_are() -> None:
    rows = [*references(own=0.2), soft(0.45), control(0.3)]
    comparison = compare(rows, resamples=200, project="all rows.yaml", unified_adapter="all/unified")
    found = step(comparison, "Train the personas' own adapters from")
    assert found.command.startswith(
        "raymerge train 'all rows.yaml' --group-by persona --start-from all/unified` and `raymerge run 'all rows.yaml'"
    )


def test_a_recipe_that_the_project_file_lacks_is_to_be_added() -> None:
    """`soft` may have been merged on the command line."""
    rows = [*references(), soft(0.6), control(0.4)]
    known = compare(rows, resamples=200, recipes=["soft", "unified", "own"]).guide.steps
    lacking = compare(rows, resamples=200, recipes=["unified", "own"]).guide.steps
    assert not any("add soft to the recipes" in s.what for s in known)
    seeds = next(s for s in lacking if s.what.startswith("Train with 3 seeds"))
    assert seeds.what.endswith("(add soft to the recipes of the project file)")
    tuned = next(s for s in lacking if s.what.startswith("Tune the scale"))
    assert "to the recipes" not in tuned.what  # it says what to add itself


def parses(command: str) -> tuple[str, dict]:
    """What the command line makes of a command: its name and its parameters. Nothing is carried out."""
    words = shlex.split(command)
    assert words.pop(0) == "raymerge"
    cli = typer.main.get_command(app)
    context = click.Context(cli)
    name, subcommand, rest = cli.resolve_command(context, words)
    return name, subcommand.make_context(name, rest, parent=context).params


def test_every_command_is_one_that_the_command_line_knows() -> None:
    rag = row("rag_unified", 0.56, 6, made_by={**recipe("rag_unified", "unified"), "retrieval": RETRIEVAL})
    top = row("top", 0.55, 5, made_by=recipe("top", "top_k", k=5))
    worlds = [
        references(),
        [references()[2], soft(0.6)],
        [*references(cluster_trained=0.62), top, control(0.4), rag],
        [*references(cluster_trained=None), soft(0.65)],
        [*references(own=0.2), soft(0.45), control(0.3)],
        [*references(), soft(0.503, noise=0.2), control(0.3)],
        [*references(), soft(0.6), control(0.4)],
    ]
    seen = set()
    for rows in worlds:
        for found in compare(rows, resamples=100, project="p q.yaml", unified_adapter="all/unified").guide.steps:
            there = {r.name for r in rows}
            for command in found.command.split("` and `"):
                name, given = parses(command)
                seen.add(name)
                assert given["project"] == "p q.yaml"
                if name == "merge":
                    there.add(given["name"])
                named = [*(given.get("run") or ()), *(given.get("recipe") or ())]
                assert all(n in there or n in found.what or n == "unified" or "cluster" in n for n in named), command
                if name == "train":
                    assert given["start_from"] == "all/unified"
    assert seen == {"merge", "evaluate", "run", "train"}


LEVELS = st.lists(st.floats(0.2, 0.8), min_size=5, max_size=5)


@given(levels=LEVELS, kept=st.sets(st.integers(0, 6)), seed=st.integers(0, 3))
def test_steps_are_few_ordered_and_name_a_command(levels: list[float], kept: set[int], seed: int) -> None:
    rag = {**recipe("rag", "base"), "retrieval": RETRIEVAL}
    made = [row(name, level, seed) for name, level in zip(("base", "unified", "own"), levels, strict=False)]
    made += [soft(levels[3], seed=seed), soft(levels[4], "rag_soft", seed=seed + 1, retrieval=RETRIEVAL)]
    made += [row("rag", levels[0], seed, made_by=rag), control(levels[1])]
    runs = [r for i, r in enumerate(made) if i not in kept] or made
    steps = compare(runs, resamples=60).guide.steps
    assert len(steps) <= 5
    later = [s.worth for s in steps if not s.first]
    assert later == sorted(later, reverse=True)
    assert [s.first for s in steps] == sorted((s.first for s in steps), reverse=True)
    for s in steps:
        assert "`raymerge " in s.sentence
        assert "training" in s.sentence
        assert s.gain is None or s.gain[1] >= 0
        assert "nan" not in s.sentence
