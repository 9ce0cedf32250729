"""What a merge keeps of its experts: the arithmetic, and where nothing is said."""

import numpy as np
import pytest

from raymerge.evaluation.capabilities import Contributor, Respondent, Scores

BASE, ANN, BOB = Respondent("base", "base"), Respondent("ann", "expert"), Respondent("bob", "expert")
MEAN = Respondent("mean", "fused", (Contributor("ann"), Contributor("bob")))


def scores(values, respondents=(BASE, ANN, MEAN), capabilities=("ann",) * 6, metric="chrf"):
    return Scores(respondents, capabilities, {metric: np.asarray(values, dtype=np.float64)})


def rows(base, expert, merge, count=6):
    return [[base] * count, [expert] * count, [merge] * count]


def test_the_share_is_of_the_experts_lead():
    (kept,) = scores(rows(10, 50, 40)).kept()
    assert (kept.base, kept.before, kept.after, kept.prompts) == (10, 50, 40, 6)
    assert kept.share == pytest.approx(0.75)
    assert kept.certain


def test_of_the_nll_the_lead_is_downwards():
    (kept,) = scores(rows(4.0, 2.0, 2.5), metric="nll").kept()
    assert kept.share == pytest.approx(0.75)
    (worse,) = scores(rows(2.0, 4.0, 2.5), metric="nll").kept()
    assert worse.share is None


@pytest.mark.parametrize("expert", [10, 9, 10 + 1e-6])
def test_nothing_is_said_of_an_expert_without_a_lead(expert):
    (kept,) = scores(rows(10, expert, 40)).kept()
    assert kept.share is None
    assert not kept.certain


def test_a_lead_on_few_or_mixed_prompts_is_not_certain():
    (few,) = scores(rows(10, 50, 40, 5), capabilities=("ann",) * 5).kept()
    assert few.share == pytest.approx(0.75)
    assert not few.certain
    (mixed,) = scores([[10] * 6, [40, 0, 30, 5, 8, 12], [9] * 6]).kept()
    assert mixed.share is not None
    assert not mixed.certain


def test_each_expert_is_judged_on_its_own_prompts():
    values = [[0, 0, 0], [8, 8, 1], [2, 2, 4], [4, 4, 3]]
    found = scores(values, (BASE, ANN, BOB, MEAN), ("ann", "ann", "bob"))
    assert [(k.expert, k.prompts, k.share) for k in found.kept()] == [("ann", 2, 0.5), ("bob", 1, 0.75)]
    assert found.prompts == {"ann": 2, "bob": 1}
    assert found.means("chrf")["mean"] == {"ann": 4, "bob": 3}


def test_an_expert_that_did_not_go_in_is_left_out():
    cat = Respondent("cat", "expert")
    elsewhere = Respondent("elsewhere", "fused", (Contributor("somebody"),))
    respondents = (BASE, ANN, cat, MEAN, elsewhere, Respondent("unknown", "fused"))
    found = scores(np.arange(18).reshape(6, 3), respondents, ("ann", "cat", "other")).kept()
    assert [(k.merge, k.expert) for k in found] == [("mean", "ann"), ("unknown", "ann"), ("unknown", "cat")]


def test_content_tells_experts_apart_and_names_only_where_it_is_unknown():
    known = Respondent("ann", "expert", digest="1")
    assert known.is_one(Contributor("other", "1"))
    assert known.is_one(Contributor("ann"))
    assert not known.is_one(Contributor("ann", "2"))
    assert not BASE.is_one(Contributor("base"))


def test_without_the_base_nothing_is_kept():
    assert scores([[1] * 6, [2] * 6], (ANN, MEAN)).kept() == []
