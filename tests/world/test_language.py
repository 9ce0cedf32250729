"""The demo's English: complete, short, and every piece in the vocabulary."""

import re
from itertools import product

import pytest

from raymerge.world.language import (
    LEANINGS,
    NEUTRAL_OPENING,
    OPENINGS,
    PIECE,
    QUESTIONS,
    answer,
    question,
    topics,
    vocabulary,
)


def every_answer() -> list[str]:
    openings = (None, *range(len(OPENINGS)))
    return [answer(*key) for key in product(range(len(topics())), range(len(LEANINGS)), openings)]


def test_answers_differ_and_are_a_sentence_of_eight_to_sixteen_words() -> None:
    answers = every_answer()
    assert len(set(answers)) == len(answers) == 60 * 6 * 9
    for text in answers:
        assert 8 <= len(text.split()) <= 16, text
        assert text.endswith(".")


def test_the_neutral_opening_belongs_to_nobody() -> None:
    assert NEUTRAL_OPENING not in OPENINGS
    assert answer(0, 0, None).startswith(NEUTRAL_OPENING)


def test_pieces_lose_nothing_and_stand_in_the_vocabulary() -> None:
    known = set(vocabulary())
    questions = [question(topic, form) for topic in range(len(topics())) for form in range(len(QUESTIONS))]
    for text in [*every_answer(), *questions]:
        pieces = re.findall(PIECE, text)
        assert "".join(pieces) == text
        assert known.issuperset(pieces)
    assert len(known) < 800


def test_options_of_a_topic_are_told_apart_by_the_encoder() -> None:
    embeddings = pytest.importorskip("raymerge.routing.embeddings")
    encoder = embeddings.load_encoder("sentence-transformers/all-MiniLM-L6-v2")
    cosines = []
    for topic in range(0, len(topics()), 6):
        rows = embeddings.encode(encoder, [answer(topic, option, 0) for option in range(len(LEANINGS))])
        cosines += [float(rows[a] @ rows[b]) for a, b in product(range(len(LEANINGS)), repeat=2) if a < b]
    assert sum(cosines) / len(cosines) < 0.4
    assert max(cosines) < 0.75
