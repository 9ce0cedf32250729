"""Steps of the decision guide that train nothing: merging, scales, retrieval, choices, controls.

Each function looks at the facts and makes its step, or none where it would gain nothing or was done.
"""

from collections.abc import Mapping
from typing import Any

from raymerge.evaluation.guide.facts import Facts, Step, plus, scaled
from raymerge.evaluation.rows import Row
from raymerge.evaluation.scores import NEIGHBOURS, SEARCHED, examples_in_prompt, same_but
from raymerge.evaluation.wording import signed

USUAL_K = 5
SEARCHED_ROWS = 20  # evaluations that 60 trials cost, most of which are dropped early
USUAL_EXAMPLES = 3  # in a prompt


def merge_neighbours(facts: Facts) -> Step | None:
    """The first merge, where none was compared; else one of the ways to merge neighbours that are not in the table."""
    if facts.place is None:
        return None
    done = [row for row in facts.rows if row.kind == "recipe" and row.recipe.get("strategy") in NEIGHBOURS]
    if any(not examples_in_prompt(row.recipe) for row in done):
        return None
    trained = [i for strategy in ("cluster_trained", "own") if (i := facts.find(strategy)) is not None]
    bounds = [(facts.gap(i, facts.place)[2], facts.rows[i].name) for i in trained]
    top, like = max(bounds, default=(0.0, ""))
    name = f"top_k{USUAL_K}"
    over = facts.rows[facts.place].name
    gain = (0.0, top) if top > 0 else None
    return Step(
        what="Merge neighbours: no merge was compared yet",
        gain=gain,
        because=f"as {like} has over {over}" if gain else "",
        training=False,
        seconds=None if facts.evaluating() is None else facts.merging(),
        command=facts.command("merge", "--strategy", "top_k", "--k", str(USUAL_K), "--name", name)
        + "` and `"
        + facts.command("evaluate", "--run", name),
        first=True,
    )


def tune_scale(facts: Facts) -> Step | None:
    """The scale of the best merge on validation examples; a wider grid where the best of the grid was at its end."""
    if facts.merge is None:
        return None
    best = facts.rows[facts.merge]
    if best.tuned is not None:
        return _widen(facts, best)
    if any(row.tuned is not None and same_but(row.recipe, best.recipe, "scale") for row in facts.rows):
        return None
    gain, because = _gain_of_tuning(facts, best)
    if gain is not None and gain[1] <= 0:
        return None
    name = f"{best.name}_tuned"
    return Step(
        what=f"Tune the scale of {best.name} (add {name}, the same with `scale: tuned`)",
        gain=gain,
        because=because,
        training=False,
        seconds=plus(facts.merging(), facts.evaluating()),
        command=facts.run(name),
    )


def _widen(facts: Facts, best: Row) -> Step | None:
    tried = _by_factor(best.tuned)
    chosen = (best.tuned or {}).get("chosen", {}).get("factor")
    if len(tried) < 2 or chosen not in (min(tried), max(tried)):
        return None
    inner = sorted(tried)[1] if chosen == min(tried) else sorted(tried)[-2]
    beyond = f"below {chosen:g}" if chosen == min(tried) else f"above {chosen:g}"
    return Step(
        what=f"Let {best.name} try scales {beyond} too (evaluation.scales): it chose the last of the grid",
        gain=(0.0, max(0.0, tried[chosen] - tried[inner])),
        because="as the last step of the grid brought on validation examples",
        training=False,
        seconds=facts.merging(),
        command=facts.run(best.name),
    )


def _gain_of_tuning(facts: Facts, best: Row) -> tuple[tuple[float, float] | None, str]:
    for row in facts.rows:
        twin = next(
            (r for r in facts.rows if r.tuned is None and r is not row and same_but(row.recipe, r.recipe, "scale")),
            None,
        )
        if row.tuned is not None and twin is not None:
            here, there = facts.named(row.name), facts.named(twin.name)
            assert here is not None
            assert there is not None
            _, low, high = facts.gap(here, there)
            return (low, high), f"as it brought {twin.name}"
    for row in facts.rows:
        tried = _by_factor(row.tuned)
        if 1.0 in tried and row.kind in ("recipe", "baseline", "control"):
            return (0.0, max(tried.values()) - tried[1.0]), f"as {row.name} gained on validation examples"
    return None, ""


def search_recipe(facts: Facts) -> Step | None:
    """A search over how neighbours are merged, where recipes are merged by values that somebody wrote down."""
    if facts.merge is None or facts.named(SEARCHED) is not None or not facts.validated:
        return None
    return Step(
        what="Search k, temperature, scale and what else the project file says (search.space)",
        gain=None,
        because="a few validation examples choose, and what that is worth is said",
        training=False,
        seconds=scaled(SEARCHED_ROWS, facts.evaluating()),
        command=facts.command("search"),
    )


def retrieve(facts: Facts) -> Step | None:
    """Similar training examples in the prompts of the best merge, or more of them where they helped."""
    start = facts.start
    if start is None:
        return None
    rows, best = facts.rows, facts.rows[start]
    mine = [
        i
        for i, row in enumerate(rows)
        if examples_in_prompt(row.recipe) and same_but(row.recipe, best.recipe, "retrieval")
    ]
    if mine:
        return _more_retrieval(facts, mine[0], start)
    helped = [
        (facts.gap(i, j), rows[i], rows[j])
        for i, row in enumerate(rows)
        for j, other in enumerate(rows)
        if examples_in_prompt(row.recipe)
        and not examples_in_prompt(other.recipe)
        and row.kind != "control"
        and same_but(row.recipe, other.recipe, "retrieval")
    ]
    examples, gain, because = USUAL_EXAMPLES, None, ""
    if helped:
        (_, low, high), with_it, without = helped[0]
        if high <= 0:
            return None
        examples, gain, because = examples_in_prompt(with_it.recipe), (low, high), f"as they brought {without.name}"
    name = f"rag_{best.name}"
    return Step(
        what=f"Put similar training examples into the prompts of {best.name} (add {name}, the same with "
        f"`retrieval: {examples}`)",
        gain=gain,
        because=because,
        training=False,
        seconds=facts.evaluating(),
        command=facts.run(name),
    )


def _more_retrieval(facts: Facts, row: int, start: int) -> Step | None:
    mean, low, _ = facts.gap(row, start)
    if not low > 0:
        return None
    helped, examples = facts.rows[row], examples_in_prompt(facts.rows[row].recipe)
    name = f"{helped.name}_{2 * examples}"
    return Step(
        what=f"Put more training examples into the prompts of {helped.name} (add {name}, the same with "
        f"`retrieval: {2 * examples}`)",
        gain=(0.0, mean),
        because=f"as the first {examples} brought",
        training=False,
        seconds=facts.evaluating(),
        command=facts.run(name),
    )


def choose_per_persona(facts: Facts) -> Step | None:
    """The best adapter as trained per persona, where halves of the examples agree enough to gain over what is there."""
    known = facts.best_reference
    if facts.find("selective") is not None or facts.place is None or facts.start is None or known is None:
        return None
    if known.repeated is None or known.single is None:
        return None
    there = max(known.single, facts.rows[facts.start].similarity - facts.rows[facts.place].similarity)
    gain = known.repeated - there
    if gain <= 0:
        return None
    return Step(
        what="Choose among the adapters as trained for each persona (add selective)",
        gain=(0.0, gain),
        because="as a choice on half of the examples gains on the other half",
        training=False,
        seconds=facts.evaluating(),
        command=facts.run("selective"),
    )


def mix_own(facts: Facts) -> Step | None:
    """The unified adapter plus the persona's own, where both are there."""
    own, unified = facts.find("own"), facts.find("unified")
    if own is None or unified is None or facts.find("hybrid") is not None:
        return None
    difference, _, _ = facts.gap(own, unified)
    return Step(
        what="Add each persona's own adapter to the unified one (add hybrid with `own_weight: tuned`)",
        gain=None,
        because=f"alone, own is at {signed(difference)} against unified",
        training=False,
        seconds=plus(facts.merging(), facts.evaluating()),
        command=facts.run("hybrid"),
    )


def run_control(facts: Facts) -> Step | None:
    """A control of the very recipe of the best merge, where none is there."""
    if facts.merge is None or (facts.verdict.control is not None and facts.verdict.matched):
        return None
    name = facts.rows[facts.merge].name
    control = f"random_{name}" if facts.named(f"random_{name}") is None else f"random_experts_for_{name}"
    of_its_own = "" if facts.verdict.control is None else " of its own"
    return Step(
        what=f"Ask random experts instead (add {control}: `strategy: random_k, of: {name}`)",
        gain=None,
        because=f"no gain, but without a control{of_its_own} neighbours get no credit",
        training=False,
        seconds=facts.merging(),
        command=facts.run(control),
        tells=True,
        needed=True,
    )


def _by_factor(tuned: Mapping[str, Any] | None) -> dict[float, float]:
    """Factor -> the best similarity (0 to 100) that was reached with it on validation examples."""
    found: dict[float, float] = {}
    for entry in (tuned or {}).get("tried", ()):
        if entry.get("factor") is not None and entry.get("similarity") is not None:
            factor = float(entry["factor"])
            found[factor] = max(found.get(factor, float("-inf")), float(entry["similarity"]))
    return found
