"""Who has examples of which split, and which clusters are too small."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from raymerge.personas import SPLITS, Personas, Split
from raymerge.pipelines.checking.finding import Finding, Section, Sign, counted, listed
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.own_trainings import settings_of
from raymerge.pipelines.planning import TRAINS_ITS_OWN
from raymerge.pipelines.trainings import all_groupings, to_train

FEW = 5  # training rows below which an adapter learns little


def check_splits(opened: Opened, personas: Personas, clusters: Mapping[str, str]) -> Section:
    """What is to be said of splits and clusters. clusters: persona -> label, as far as it is known."""
    counts = personas.counts()
    totals = {split: sum(count[split] for count in counts.values()) for split in SPLITS}
    findings = [_overview(personas, counts, totals)]
    findings += [f for split in SPLITS if (f := _lacking(opened, personas, split)) is not None]
    few = [name for name, count in counts.items() if 0 < count["train"] < FEW]
    if few:
        text = f"fewer than {FEW} training rows: {listed(few)} ({counted(len(few), 'persona')})"
        findings.append(Finding("warn", text, "neighbours help them most; do not judge their own adapters"))
    sizes = Counter(label for name, label in clusters.items() if name in counts)
    alone = sorted(label for label, size in sizes.items() if size == 1)
    if alone:
        text = f"clusters of one persona: {listed(alone)} ({len(alone)} of {len(sizes)})"
        findings.append(Finding("warn", text, "nobody is there to learn from: join them to others, or fewer clusters"))
    facts = {"personas": len(counts), "rows": totals, "few": few, "clusters": dict(sizes), "clusters_of_one": alone}
    return Section("splits", tuple(findings), (), {**facts, "lacking": {s: list(personas.missing(s)) for s in SPLITS}})


def _overview(personas: Personas, counts: Mapping[str, Mapping[Split, int]], totals: Mapping[Split, int]) -> Finding:
    spans = []
    for split in SPLITS:
        own = [count[split] for count in counts.values()]
        span = f"{min(own)}" if min(own) == max(own) else f"{min(own)} to {max(own)}"
        spans.append(f"{totals[split]:,} {split} ({span})")
    return Finding("ok", f"{counted(len(personas.names), 'persona')}; rows: {', '.join(spans)} each")


def _lacking(opened: Opened, personas: Personas, split: Split) -> Finding | None:
    missing = personas.missing(split)
    if not missing:
        return None
    everybody = len(missing) == len(personas.names)
    who = f"{listed(missing)} ({counted(len(missing), 'persona')})"
    text = f"nobody has {split} rows" if everybody else f"without {split} rows: {who}"
    sign: Sign = "bad" if everybody else "warn"
    if split == "train":
        return Finding(sign, text, "no adapter is trained for them; add rows with split train")
    if split == opened.project.evaluation.split:
        return Finding(sign, text, f"nothing of theirs is scored; add rows with split {split}")
    if split == "test":
        return None
    return _without_validation(opened, text, missing, everybody)


def _without_validation(opened: Opened, text: str, missing: Sequence[str], everybody: bool) -> Finding:
    """What chooses on validation examples leaves out who has none; it cannot where nobody has any. Early stopping of
    personas' own adapters is the exception: each looks at its own rows."""
    needs = [need for need, is_asked in _needs(opened, missing, everybody).items() if is_asked]
    if needs:
        return Finding("bad", f"{text}, and {' and '.join(needs)}", "add rows with split validation, or leave that out")
    stopped = _stopped_alone(opened, missing)
    if stopped:
        who = f"{listed(stopped)} ({counted(len(stopped), 'persona')})"
        text = f"without validation rows: {who}, and training.patience stops each persona's own adapter on them"
        return Finding("bad", text, "add rows with split validation for them, or leave patience out")
    if not everybody:
        return Finding("warn", text, "recipes are chosen without them")
    return Finding("warn", text, "recipes are chosen on test rows then, with wider intervals: add validation rows")


def _needs(opened: Opened, missing: Sequence[str], everybody: bool) -> dict[str, bool]:
    """What cannot be done without the validation rows that are missing, and whether the project asks for it. A training
    cannot where nobody whose rows it takes has any."""
    recipes = opened.recipes.values()
    trainings = [(opened.project.training.of(one), to_train(opened, one)) for one in all_groupings(opened)]
    trainings += [(settings_of(opened, r), list(opened.trainable)) for r in recipes if r.strategy in TRAINS_ITS_OWN]
    blind = [settings for settings, names in trainings if names and set(names) <= set(missing)]
    return {
        "training.patience stops on them": any(settings.patience is not None for settings in blind),
        "several epochs are chosen among on them": any(len(settings.choices) > 1 for settings in blind),
        "tuned recipes are chosen on them": everybody and any(recipe.tuned for recipe in recipes),
        "selective recipes choose on them": everybody and any(recipe.strategy == "selective" for recipe in recipes),
    }


def _stopped_alone(opened: Opened, missing: Sequence[str]) -> list[str]:
    """Those of them whose own adapter is trained, with early stopping."""
    if opened.project.training.patience is None or "persona" not in all_groupings(opened):
        return []
    without = set(missing)
    return [name for name in to_train(opened, "persona") if name in without]
