"""How small a gain the data can show, before anything is run."""

from __future__ import annotations

import math

import numpy as np

from raymerge import storage
from raymerge.config import NOT_RUNS, Project
from raymerge.errors import EvaluationError
from raymerge.evaluation.scores import RunScores, align
from raymerge.evaluation.statistics import smallest_detectable
from raymerge.manifest import read_manifest
from raymerge.personas import Personas, Split
from raymerge.pipelines.checking.finding import Finding, Section, counted

ASKED = 3.0  # points of similarity that merging is asked to gain over the unified adapter
# Standard deviations of differences between two rows of the comparison, in points of similarity, as measured on the
# demo's world: of an answer around its persona's mean, and of personas' true means. Free answers spread less.
ANSWER_SD, PERSONA_SD = 40.0, 18.0
_REFERENCES = ("unified", "own", "base")  # what earlier runs are compared with, the first that is there


def check_power(project: Project, personas: Personas) -> Section:
    """The smallest difference of a recipe to the unified adapter that these personas and examples can show."""
    split: Split = project.evaluation.split
    examples = [count[split] for count in personas.counts().values() if count[split]]
    if len(examples) < 2:
        text = f"{counted(len(examples), 'persona')} with {split} rows: nothing can be shown"
        return Section("power", (Finding("bad", text, "a comparison needs two personas at least, better hundreds"),))
    measured = _measured_sd(project)
    if measured is None:
        spread = math.sqrt(PERSONA_SD**2 + ANSWER_SD**2 * float(np.mean([1 / n for n in examples])))
        how = f"assumed spread: {ANSWER_SD:g} points an answer, {PERSONA_SD:g} a persona, as on the demo's world"
    else:
        spread, runs = measured
        how = f"spread between personas as measured in {counted(runs, 'earlier run')}: {spread:.1f} points"
    found = detectable(spread, len(examples))
    people = f"{counted(len(examples), 'persona')} with {np.mean(examples):.3g} {split} rows each"
    text = f"{people} show a difference of {found:.1f} points or more"
    facts = {"detectable": found, "asked": ASKED, "spread": spread, "measured": measured is not None}
    if found <= ASKED:
        return Section("power", (Finding("ok", f"{text}; asked are {ASKED:g}"),), (how,), facts)
    wanted = math.ceil(len(examples) * (found / ASKED) ** 2)
    todo = f"a gain of {ASKED:g} points may go unseen: it takes about {wanted:,} personas, or more {split} rows each"
    return Section("power", (Finding("warn", f"{text}; asked are {ASKED:g}", todo),), (how,), facts)


def detectable(spread: float, personas: int) -> float:
    """The smallest mean difference that so many personas show, whose differences have this standard deviation."""
    line = np.arange(personas, dtype=np.float64)
    standard = (line - line.mean()) / line.std(ddof=1)
    return float(smallest_detectable(spread * standard[:, None])[0])


def _measured_sd(project: Project) -> tuple[float, int] | None:
    """Median standard deviation over personas of the differences of earlier runs to a reference, and how many runs."""
    output = project.path(project.output)
    names = [n for n in storage.list_folders(output) if n not in NOT_RUNS and not n.startswith("_")]
    runs = [run for name in names if (run := _scores(project, name)) is not None]
    place = next((i for kind in _REFERENCES for i, run in enumerate(runs) if run.recipe["strategy"] == kind), None)
    others = [i for i, run in enumerate(runs) if run.kind == "recipe"]
    if place is None or not others:
        return None
    try:
        means = 100 * align(runs).persona_means("similarity")
    except EvaluationError:  # of runs on different examples
        return None
    if means.shape[1] < 2:
        return None
    return float(np.median((means[others] - means[place]).std(axis=1, ddof=1))), len(others)


def _scores(project: Project, name: str) -> RunScores | None:
    folder = project.run_folder(name)
    evaluation = storage.join(folder, "evaluation")
    if read_manifest(evaluation) is None or not storage.exists(storage.join(folder, "recipe.json")):
        return None
    recipe = storage.read_json(storage.join(folder, "recipe.json"))
    return RunScores(name, recipe, storage.read_parquet(storage.join(evaluation, "metrics.parquet")))
