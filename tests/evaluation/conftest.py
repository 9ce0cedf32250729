"""Runs made of arrays, for the tests of the comparison and its report."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raymerge.evaluation.scores import Costs, RunScores

MakeRun = Callable[..., RunScores]
SOFT = {"temperature": 0.1, "self_weight": 0}


def recipe(name: str, strategy: str, **parameters: Any) -> dict[str, Any]:
    return {"name": name, "strategy": strategy, "strategy_parameters": parameters, "method": "linear", "scale": 1.0}


def run(
    name: str,
    made_by: Mapping[str, Any],
    similarity: np.ndarray,
    *,
    personas: Sequence[str] | None = None,
    exact: np.ndarray | None = None,
    texts: Sequence[str] | None = None,
    **more: Any,
) -> RunScores:
    """similarity: (personas, examples), -1 to 1. texts: an answer per persona and example."""
    count, examples = similarity.shape
    names = list(personas or [f"persona_{i:03d}" for i in range(count)])
    columns = {"persona": np.repeat(names, examples), "example": np.tile(np.arange(examples), count)}
    metrics = {**columns, "similarity": similarity.ravel(), "chrf": 50 * similarity.ravel()}
    metrics["nll"] = 3 - similarity.ravel()
    if exact is not None:
        metrics["exact"] = exact.ravel().astype(bool)
    generations = None
    if texts is not None:
        said = {"prompt": [f"q{i}?" for i in columns["example"]], "reference": ["right"] * len(texts)}
        generations = pa.table({**columns, **said, "generated": list(texts)})
    return RunScores(name, made_by, pa.table(metrics), generations, **more)


def at_seed(level: float, personas: int = 24, examples: int = 3) -> pa.Table:
    """Metrics of a row trained with another seed: every answer has the same similarity, 0 to 100."""
    return run("x", {}, np.full((personas, examples), level / 100)).metrics


@pytest.fixture
def world() -> tuple[list[RunScores], dict[str, str]]:
    """Seven runs of 24 personas with three examples in two clusters; `soft` asks its neighbours and gains."""
    return make_world()


def make_world(hostile: str = "") -> tuple[list[RunScores], dict[str, str]]:
    """hostile: text that is put into every name, label, answer and note."""
    generator = np.random.default_rng(0)
    ability = generator.normal(0, 0.06, size=(24, 1))
    names = [f"persona_{i:03d}{hostile}" for i in range(24)]
    clusters = {name: f"cluster_{i % 2:02d}{hostile}" for i, name in enumerate(names)}
    of_soft = {"strategy": "soft", **SOFT}
    made = [
        ("base", recipe("base", "base"), 0.4),
        ("own", recipe("own", "own"), 0.5),
        ("unified", recipe("unified", "unified"), 0.6),
        (f"soft{hostile}", recipe("soft", "soft", **SOFT), 0.72),
        ("simple_average", recipe("simple_average", "simple_average"), 0.55),
        ("shuffled", recipe("shuffled", "shuffled", of=of_soft), 0.58),
        ("oracle", recipe("oracle", "soft", **SOFT), 0.8),
    ]
    runs = []
    for name, made_by, level in made:
        similarity = np.clip(level + ability + generator.normal(0, 0.06, size=(24, 3)), 0, 1)
        exact = similarity > 0.75
        texts = [f"{name} says {i}{hostile}" for i in range(72)]
        routing = None
        if "soft" in name or name in ("oracle", "shuffled"):
            step = 1 if name == "shuffled" else 2  # even steps stay in the cluster
            experts = [names[(i + step * j) % 24] for i in range(24) for j in (1, 2)]
            routing = pa.table({"persona": np.repeat(names, 2), "expert": experts, "weight": [0.7, 0.3] * 24})
        runs.append(
            run(name, made_by, similarity, personas=names, exact=exact, texts=texts, routing=routing,
                costs=Costs(30.0, 2.0, 1.5, 1 << 20, 24), compression_error=0.3 if "soft" in name else None,
                notes=(f"a note{hostile}",) if "soft" in name else ())
        )  # fmt: skip
    return runs, clusters
