"""How small a gain the data can show, before anything is run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from raymerge import storage
from raymerge.config import NOT_RUNS, Project
from raymerge.errors import EvaluationError
from raymerge.evaluation.rows import row_of
from raymerge.evaluation.scores import RunScores, align, kind_of
from raymerge.evaluation.statistics import smallest_detectable
from raymerge.manifest import read_manifest
from raymerge.personas import Personas, Split
from raymerge.pipelines.checking.finding import Finding, Section, counted
from raymerge.pipelines.opening import Opened

ASKED = 3.0  # points of similarity that merging is asked to gain over the unified adapter
# Standard deviations of differences between two rows of the comparison, in points of similarity, as measured on the
# demo's world: of an answer around its persona's mean, and of personas' true means. Free answers spread less.
ANSWER_SD, PERSONA_SD = 40.0, 18.0
_REFERENCES = ("unified", "own", "base")  # what earlier runs are compared with, the first that is there


@dataclass(frozen=True)
class _Measured:
    """What earlier runs show. spread: median standard deviation over personas of the differences to a reference.
    hypotheses: names of the runs that are tested against it."""

    spread: float
    runs: int
    hypotheses: frozenset[str]


def check_power(opened: Opened, personas: Personas) -> Section:
    """The smallest difference of a recipe to the unified adapter that these personas and examples can show.

    It is the comparison's: found with power 0.8 at 0.05 divided by the number of recipes that are hypotheses, those of
    the project and of earlier runs.
    """
    project = opened.project
    split: Split = project.evaluation.split
    examples = [count[split] for count in personas.counts().values() if count[split]]
    if len(examples) < 2:
        text = f"{counted(len(examples), 'persona')} with {split} rows: nothing can be shown"
        return Section("power", (Finding("bad", text, "a comparison needs two personas at least, better hundreds"),))
    measured = _measured(project)
    planned = {name for name, recipe in opened.recipes.items() if kind_of(name, recipe.as_dict()) == "recipe"}
    hypotheses = len(planned if measured is None else planned | measured.hypotheses)
    if measured is None:
        spread = math.sqrt(PERSONA_SD**2 + ANSWER_SD**2 * float(np.mean([1 / n for n in examples])))
        how = f"assumed spread: {ANSWER_SD:g} points an answer, {PERSONA_SD:g} a persona, as on the demo's world"
    else:
        spread = measured.spread
        how = f"spread between personas as measured in {counted(measured.runs, 'earlier run')}: {spread:.1f} points"
    found = detectable(spread, len(examples), hypotheses)
    people = f"{counted(len(examples), 'persona')} with {np.mean(examples):.3g} {split} rows each"
    text = f"{people} show a difference of {found:.1f} points or more"
    facts = {"detectable": found, "asked": ASKED, "spread": spread, "measured": measured is not None,
             "hypotheses": hypotheses}  # fmt: skip
    if found <= ASKED:
        return Section("power", (Finding("ok", f"{text}; asked are {ASKED:g}"),), (how,), facts)
    wanted = math.ceil(len(examples) * (found / ASKED) ** 2)
    todo = f"a gain of {ASKED:g} points may go unseen: it takes about {wanted:,} personas, or more {split} rows each"
    return Section("power", (Finding("warn", f"{text}; asked are {ASKED:g}", todo),), (how,), facts)


def detectable(spread: float, personas: int, hypotheses: int = 1) -> float:
    """The smallest mean difference that so many personas show, whose differences have this standard deviation, where so
    many recipes are tested."""
    line = np.arange(personas, dtype=np.float64)
    standard = (line - line.mean()) / line.std(ddof=1)
    return float(smallest_detectable(spread * standard[:, None], alpha=0.05 / max(1, hypotheses))[0])


def _measured(project: Project) -> _Measured | None:
    """What earlier runs say of the spread between personas; None where none can be compared."""
    output = project.path(project.output)
    names = [n for n in storage.list_folders(output) if n not in NOT_RUNS and not n.startswith((".", "_"))]
    runs = [run for name in names if (run := _scores(project, name)) is not None]
    place = next((i for kind in _REFERENCES if (i := row_of(runs, kind)) is not None), None)
    tested = [i for i, run in enumerate(runs) if run.kind == "recipe"]
    compared = tested or [i for i in range(len(runs)) if i != place]
    if place is None or not compared:
        return None
    try:
        means = 100 * align(runs).persona_means("similarity")
    except EvaluationError:  # of runs on different examples
        return None
    if means.shape[1] < 2:
        return None
    spread = float(np.median((means[compared] - means[place]).std(axis=1, ddof=1)))
    return _Measured(spread, len(compared), frozenset(runs[i].name for i in tested))


def _scores(project: Project, name: str) -> RunScores | None:
    folder = project.run_folder(name)
    evaluation = storage.join(folder, "evaluation")
    if read_manifest(evaluation) is None or not storage.exists(storage.join(folder, "recipe.json")):
        return None
    recipe = storage.read_json(storage.join(folder, "recipe.json"))
    return RunScores(name, recipe, storage.read_parquet(storage.join(evaluation, "metrics.parquet")))
