"""Steps of the decision guide that train, or that need more data.

Each function looks at the facts and makes its step, or none where it would gain nothing or was done.
"""

from raymerge.evaluation.guide.facts import Facts, Step, plus, scaled
from raymerge.evaluation.scores import LEARNED
from raymerge.evaluation.wording import signed

SEEDS = 3
ROUTER_TRAININGS = 4  # of the unified adapter, which has the same rows and fewer epochs of them, without mixtures
ROUTER_ROWS = 10  # evaluations that its tuning costs


def compare_reference(facts: Facts) -> Step | None:
    """The reference, without which no difference is known."""
    if facts.place is not None:
        return None
    return Step(
        what="Compare with one adapter trained on everybody",
        gain=None,
        because="no difference is known without it",
        training=True,
        seconds=plus(facts.training("cluster_trained"), facts.evaluating()),
        command=facts.run("unified"),
        tells=True,
        first=True,
    )


def train_on_neighbours(facts: Facts) -> Step | None:
    """Training where merging stops: per cluster, and on the rows of a persona's experts where clusters do better."""
    start = facts.start
    if start is None:
        return None
    clusters = facts.find("cluster_trained")
    if clusters is None:
        return Step(
            what="Train one adapter per cluster",
            gain=None,
            because="the same rows as unified, dealt to clusters",
            training=True,
            seconds=plus(facts.training("unified"), facts.evaluating()),
            command=facts.run("cluster_trained"),
        )
    if facts.merge is None or facts.find("neighbours_trained") is not None:
        return None
    mean, low, high = facts.gap(clusters, facts.merge)
    if not high > 0:
        return None
    best = facts.rows[facts.merge]
    k = best.recipe.get("strategy_parameters", {}).get("k")
    own = facts.training("own")
    seconds = None if own is None or k is None else plus(own * k, facts.evaluating())
    return Step(
        what=f"Train one adapter per persona on the rows of its experts in {best.name} (add neighbours_trained with "
        f"`of: {best.name}`)",
        gain=None,
        because=f"cluster_trained, trained in another way, is at {signed(mean)} [{signed(low)} {signed(high)}]",
        training=True,
        seconds=seconds,
        command=facts.run("neighbours_trained"),
    )


def train_router(facts: Facts) -> Step | None:
    """A network that says whose adapters serve a persona, where similarity alone says it."""
    if facts.merge is None or facts.named(LEARNED) is not None or not facts.validated:
        return None
    unified = scaled(ROUTER_TRAININGS, facts.training("unified"))
    return Step(
        what="Train a router, which learns from training rows whom each persona should ask",
        gain=None,
        because="it is tuned on validation examples, and what it is worth beside similarity is said",
        training=True,
        seconds=plus(unified, scaled(ROUTER_ROWS, facts.evaluating())),
        command=facts.command("router"),
    )


def start_from_unified(facts: Facts) -> Step | None:
    """Own adapters that begin from the unified one, where they are worse than it and no merge makes up for that."""
    own, unified = facts.find("own"), facts.find("unified")
    gains = facts.verdict.reference is not None and facts.verdict.reference.outcome == "gains"
    if own is None or unified is None or gains or facts.start is None:
        return None
    merge = facts.merge
    mean, low, _ = facts.gap(unified, own)
    if not low > 0:
        return None
    return Step(
        what="Train the personas' own adapters from the unified one, so that merges start where it stands",
        gain=None,
        because=f"own is {mean:.1f} points below it",
        training=True,
        seconds=plus(facts.training("own"), facts.evaluating(), 0.0 if merge is None else facts.merging()),
        command=facts.command("train", "--group-by", "persona", "--start-from", facts.unified)
        + "` and `"
        + facts.run(*([] if merge is None else [facts.rows[merge].name]), facts.rows[own].name),
    )


def more_test_data(facts: Facts) -> Step | None:
    """More test examples, or more personas, where the difference is smaller than what this data can show."""
    needed = facts.needed
    if facts.merge is None or facts.place is None or needed is None:
        return None
    best, reference = facts.rows[facts.merge], facts.rows[facts.place].name
    assert best.difference is not None
    own = scaled(needed.times - 1, facts.training("own")) if needed.more_personas else 0.0
    return Step(
        what=f"{'Test on' if needed.more_personas else 'Write'} about {needed.words}",
        gain=(0.0, needed.shown),
        because=f"no gain in itself, but {signed(needed.shown)} over {reference} would show; now "
        f"{best.difference.smallest_detectable:.1f} is the least",
        training=needed.more_personas,
        seconds=plus(scaled(needed.times, facts.evaluating(2)), own),
        command=facts.run(best.name, reference),
        tells=True,
        needed=True,
    )


def train_with_other_seeds(facts: Facts) -> Step | None:
    """The best merge trained again with other seeds, where it gains and that was not done."""
    gain = facts.verdict.reference
    if facts.merge is None or gain is None or gain.outcome != "gains" or facts.rows[facts.merge].over_seeds is not None:
        return None
    rows = [facts.rows[facts.merge], *(row for row in facts.rows if row.name == gain.over)]
    seconds = plus(*(row.costs.train_s for row in rows), facts.merging(), facts.evaluating())
    return Step(
        what=f"Train with {SEEDS} seeds",
        gain=(0.0, 0.0),
        because=f"no gain, but it says whether {signed(gain.mean)} outlives another training",
        training=True,
        seconds=None if seconds is None else (SEEDS - 1) * seconds,
        command=f"{facts.run(*(row.name for row in rows))} --seeds {SEEDS}",
        tells=True,
    )
