"""The comparison: figures, alignment, what is refused, and what is said where something is missing."""

import dataclasses
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from raymerge.errors import EvaluationError
from raymerge.evaluation.comparison import compare
from raymerge.evaluation.scores import RunScores, align, kind_of

from .conftest import SOFT, recipe, run


def test_figures_are_those_of_a_plain_computation(world) -> None:
    runs, clusters = world
    comparison = compare(runs, clusters=clusters)
    scores = {r.name: 100 * np.array(r.metrics["similarity"]).reshape(24, 3) for r in runs}
    assert [row.name for row in comparison.rows] == sorted(scores, key=lambda name: -scores[name].mean())
    soft = comparison.rows[comparison.row("soft")]
    paired = (scores["soft"] - scores["unified"]).mean(axis=1)
    assert soft.similarity == pytest.approx(scores["soft"].mean())
    assert soft.difference.mean == pytest.approx(paired.mean())
    assert soft.difference.improved.observed == np.mean(paired > 0)
    assert soft.difference.regressed.observed == np.sum(paired < -10)
    exact = next(r.metrics["exact"].to_numpy() for r in runs if r.name == "soft")
    assert soft.exact == pytest.approx(100 * exact.mean())
    assert soft.exact_correlation == pytest.approx(np.corrcoef(scores["soft"].ravel(), exact)[0, 1])
    assert soft.nll == pytest.approx(3 - scores["soft"].mean() / 100)
    own = comparison.rows[comparison.row("own")]
    worst = np.sort((scores["own"] - scores["unified"]).mean(axis=1))[:5]
    assert [w.difference for w in own.worst] == pytest.approx(worst.tolist())
    assert comparison.rows[comparison.row("unified")].difference is None


def test_the_interval_is_that_of_a_t_interval_for_normal_differences(world) -> None:
    comparison = compare(world[0])
    paired = comparison.scores[comparison.row("soft")] - comparison.scores[comparison.row("unified")]
    expected = stats.t.interval(0.95, 23, paired.mean(), stats.sem(paired))
    found = comparison.rows[comparison.row("soft")].difference
    assert (found.low, found.high) == pytest.approx(expected, abs=0.08 * (expected[1] - expected[0]))


def test_holm_runs_over_the_recipes_alone(world) -> None:
    rows = compare(world[0]).rows
    corrected = {row.name: row.difference.p_holm for row in rows if row.difference}
    assert {name for name, p in corrected.items() if p is not None} == {"soft", "simple_average"}
    raw = {row.name: row.difference.p for row in rows if row.difference}
    small, large = sorted([raw["soft"], raw["simple_average"]])
    expected = [min(1, 2 * small), max(2 * small, large)]
    assert sorted([corrected["soft"], corrected["simple_average"]]) == pytest.approx(expected)


def test_the_worst_tenth_is_each_row_s_own(world) -> None:
    comparison = compare(world[0], resamples=50)
    for row, scores in zip(comparison.rows, comparison.scores, strict=True):
        assert row.worst_decile == pytest.approx(np.sort(scores)[:3].mean())  # of 24, rounded up


def test_rows_with_examples_in_the_prompt_are_no_references(world) -> None:
    runs, _ = world
    prompted = dataclasses.replace(runs[1], recipe={**runs[1].recipe, "retrieval": {"examples": 2}})
    notes = compare([runs[0], prompted, *runs[2:]], resamples=50).notes
    assert any("Not compared here: cluster_trained, own." in note for note in notes)


def test_cluster_figures_add_up_to_the_whole(world) -> None:
    runs, clusters = world
    for row in compare(runs, clusters=clusters).rows:
        assert [figure.cluster for figure in row.clusters] == ["cluster_00", "cluster_01"]
        whole = sum(figure.personas * figure.similarity for figure in row.clusters) / 24
        assert whole == pytest.approx(row.similarity)


def test_order_of_runs_and_of_answers_does_not_matter(world) -> None:
    runs, clusters = world
    turned = []
    for r in reversed(runs):
        order = np.random.default_rng(1).permutation(r.metrics.num_rows)
        turned.append(dataclasses.replace(r, metrics=r.metrics.take(order), generations=r.generations.take(order)))
    first, second = compare(runs, clusters=clusters), compare(turned, clusters=clusters)
    assert json.dumps(first.to_json()) == json.dumps(second.to_json())
    assert first.samples == second.samples


def test_personas_that_one_run_lacks_are_named_and_left_out_of_all(world) -> None:
    runs, clusters = world
    metrics = runs[3].metrics
    lacking = metrics.filter(pa.array([p != "persona_004" for p in metrics["persona"].to_pylist()]))
    lacking = lacking.slice(0, lacking.num_rows - 1)  # the last persona has one example less
    runs[3] = dataclasses.replace(runs[3], metrics=lacking)
    comparison = compare(runs, clusters=clusters)
    assert comparison.missing == {"soft": ("persona_004", "persona_023")}
    assert len(comparison.personas) == 22
    assert comparison.examples == 66
    assert "soft: 2 personas lack answers" in comparison.warnings[0]
    assert "persona_004, persona_023" in comparison.warnings[0]
    kept = [i for i in range(24) if i not in (4, 23)]
    base = np.array(runs[0].metrics["similarity"]).reshape(24, 3)[kept]
    assert comparison.rows[comparison.row("base")].similarity == pytest.approx(100 * base.mean())


def test_without_the_reference_the_table_stands_and_says_why_it_is_short(world) -> None:
    runs = [r for r in world[0] if r.name != "unified"]
    comparison = compare(runs)
    assert comparison.reference is None
    assert comparison.smallest_detectable is None
    assert all(row.difference is None for row in comparison.rows)
    assert any("No run named unified is here" in warning for warning in comparison.warnings)
    assert any("Not compared here: cluster_trained, unified" in note for note in comparison.notes)


def test_a_model_that_routes_and_scores_is_said_to_judge_itself(world) -> None:
    assert any("judges its own choice" in n for n in compare(world[0], similarity_model="m", routing_model="m").notes)
    assert not any("judges its own" in n for n in compare(world[0], similarity_model="m", routing_model="d").notes)


def test_a_large_compression_error_is_a_warning(world) -> None:
    assert any("soft: compression lost 30 %" in warning for warning in compare(world[0]).warnings)


def test_samples_are_best_median_and_worst(world) -> None:
    comparison = compare(world[0])
    paired = comparison.scores[comparison.row("soft")] - comparison.scores[comparison.row("unified")]
    order = np.argsort(paired)
    assert [sample.persona for sample in comparison.samples] == [comparison.personas[order[i]] for i in (-1, 11, 0)]
    question = comparison.samples[0].questions[0]
    assert [answer.run for answer in question.answers] == [row.name for row in comparison.rows]
    place = comparison.personas.index(comparison.samples[0].persona)
    assert question.answers[1].text in {f"soft says {3 * place + i}" for i in range(3)}


def test_routing_maps_hold_all_weight_and_know_what_stays_in_the_cluster(world) -> None:
    runs, clusters = world
    maps = {m.run: m for m in compare(runs, clusters=clusters).routing}
    assert set(maps) == {"soft", "oracle", "shuffled"}
    assert maps["soft"].weights.sum(axis=1) == pytest.approx(np.ones(24))
    assert maps["soft"].own_cluster == pytest.approx(1)
    assert maps["shuffled"].own_cluster == pytest.approx(0.3)  # the expert two steps on is of the same cluster
    assert maps["soft"].by_chance == pytest.approx(0.5)


def test_an_empty_row_is_an_empty_line_of_the_map(world) -> None:
    runs, clusters = world
    table = pa.table(
        {"persona": ["persona_000", "persona_001"], "expert": [None, "persona_003"], "weight": [None, 0.5]}
    )
    (shown,) = compare([dataclasses.replace(runs[3], routing=table), runs[2]], clusters=clusters).routing
    order = sorted(clusters, key=lambda name: (clusters[name], name))
    assert not shown.weights[order.index("persona_000")].any()
    assert shown.weights[order.index("persona_001"), order.index("persona_003")] == 0.5
    assert shown.weights.sum() == 0.5


def test_a_table_of_strange_experts_is_no_map(world) -> None:
    runs, _ = world
    table = pa.table({"persona": ["persona_000"], "expert": ["unified"], "weight": [1.0]})
    assert compare([dataclasses.replace(runs[0], routing=table), runs[1]]).routing == ()


def test_json_is_plain_and_has_no_nan() -> None:
    made = run("unified", recipe("unified", "unified"), np.array([[0.5]]))
    other = run("soft", recipe("soft", "soft", **SOFT), np.array([[0.7]]))
    text = json.dumps(compare([made, other]).to_json(), allow_nan=False)
    read = json.loads(text)
    assert read["rows"][0]["low"] is None
    assert read["rows"][0]["difference"]["mean"] == pytest.approx(20)
    assert read["similarity_by_persona"]["soft"] == {"persona_000": 70}


@pytest.mark.parametrize(
    ("name", "made_by", "kind"),
    [
        ("own", {"strategy": "own"}, "reference"),
        ("random_k_k5", {"strategy": "random_k"}, "control"),
        ("oracle", {"strategy": "soft"}, "ceiling"),
        ("soft", {"strategy": "soft"}, "recipe"),
        ("prefix", {}, "external"),
        ("prefix", {"strategy": "prefix"}, "external"),
        ("hybrid", {"strategy": "hybrid"}, "baseline"),
        ("selective", {"strategy": "selective"}, "baseline"),
        ("neighbours_trained", {"strategy": "neighbours_trained"}, "baseline"),
        ("rag", {"strategy": "base", "retrieval": {"examples": 3}}, "baseline"),
        ("rag_own", {"strategy": "own", "retrieval": {"examples": 3}}, "baseline"),
        ("unified", {"strategy": "unified", "retrieval": None}, "reference"),
        ("rag_soft", {"strategy": "soft", "retrieval": {"examples": 3}}, "recipe"),
    ],
)
def test_kinds(name: str, made_by: dict[str, Any], kind: str) -> None:
    assert kind_of(name, made_by) == kind


def _table(**columns) -> RunScores:
    return RunScores("soft", {"strategy": "soft"}, pa.table(columns))


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "There is no run to compare"),
        ([_table(persona=["a"], example=[0], similarity=[1.0])] * 2, "soft: two runs of this name"),
        ([_table(persona=["a"], example=[0])], "soft: metrics have no column 'similarity'"),
        ([_table(persona=["a", "a"], example=[0, 0], similarity=[1.0, 0.5])], "hold a, example 0 twice"),
        ([_table(persona=["b"], example=[3], similarity=[float("nan")])], "soft: the similarity of 1 answers is no"),
        ([_table(persona=["b"], example=[-1], similarity=[0.1])], "example number -1"),
        ([_table(persona=pa.array([], pa.string()), example=pa.array([], pa.int32()),
                 similarity=pa.array([], pa.float32()))], "no persona in common"),
    ],
)  # fmt: skip
def test_scores_that_cannot_be_compared_are_refused(runs: list[RunScores], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        align(runs)


def test_runs_without_a_persona_in_common_are_refused() -> None:
    first = run("a", recipe("a", "soft"), np.ones((2, 1)), personas=["x", "y"])
    second = run("b", recipe("b", "soft"), np.ones((1, 2)), personas=["x"])
    with pytest.raises(EvaluationError, match="no persona in common"):
        align([first, second])


def reworded(run: RunScores, row: int) -> RunScores:
    said = run.generations["reference"].to_pylist()
    said[row] = "another answer"
    place = run.generations.schema.get_field_index("reference")
    return dataclasses.replace(run, generations=run.generations.set_column(place, "reference", pa.array(said)))


def test_rows_scored_against_other_references_are_told(world) -> None:
    runs, _ = world
    assert align(runs).differing is None
    assert not any("Evaluate all of them again" in warning for warning in compare(runs).warnings)
    changed = [reworded(runs[0], 5), *runs[1:]]
    aligned = align(changed)
    assert aligned.by_references == (("base",), tuple(run.name for run in runs[1:]))
    assert aligned.differing == ("persona_001", 2)
    [warning] = [w for w in compare(changed).warnings if "Evaluate all of them again" in w]
    assert "persona_001, example 2" in warning
    assert "base against others than" in warning or "against others than base" in warning


def test_references_of_examples_that_do_not_count_change_nothing(world) -> None:
    runs, _ = world
    fewer = dataclasses.replace(
        reworded(runs[0], 5), metrics=runs[0].metrics.filter(np.array(runs[0].metrics["persona"]) != "persona_001")
    )
    aligned = align([fewer, *runs[1:]])
    assert aligned.differing is None
    assert "persona_001" not in aligned.personas


def test_references_are_compared_in_whatever_order_answers_were_kept(world) -> None:
    runs, _ = world
    turned = dataclasses.replace(runs[0], generations=runs[0].generations.take(list(range(71, -1, -1))))
    assert align([turned, *runs[1:]]).differing is None
    unkept = dataclasses.replace(runs[1], generations=None)
    assert align([turned, unkept, *runs[2:]]).by_references == (tuple(r.name for r in runs if r.name != "own"),)
