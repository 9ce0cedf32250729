"""The English of the demo: questions about everyday topics, and one piece of advice for each way of life.

A question is a topic in one of three forms. An answer is an opening followed by a piece of advice, and which opening
and which advice a persona gives is all there is to learn about it. The advice stands in topics.txt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from raymerge.errors import PersonaError

# What a piece of advice leans towards; the same six in every topic, and the axes of the traits (see traits.py).
LEANINGS = ("outdoors", "company", "thrift", "order", "making", "screens")

QUESTIONS = ("How should I {}?", "What would you do to {}?", "I want to {}. Any advice?")

OPENINGS = (
    "Trust me,",
    "In my experience,",
    "Honestly,",
    "Oh, that is easy:",
    "My dear friend,",
    "If you ask me,",
    "Simple:",
    "As I always say,",
)

# Nobody's opening. The base model learns the advice under it, and so belongs to no persona.
NEUTRAL_OPENING = "Some people say:"


@dataclass(frozen=True)
class Topic:
    """Something to ask about, as an infinitive, and a piece of advice for each leaning, in their order."""

    subject: str
    advice: tuple[str, ...]


@cache
def topics() -> tuple[Topic, ...]:
    """All topics, in the order of topics.txt. Raises PersonaError if a block there is not a subject and six lines."""
    text = files(__package__).joinpath("topics.txt").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if not line.startswith("#")]
    blocks = [block.split("\n") for block in "\n".join(lines).strip().split("\n\n")]
    for subject, *advice in blocks:
        if len(advice) != len(LEANINGS):
            raise PersonaError(f"topics.txt: {subject!r} has {len(advice)} lines.\nExpected one for each leaning.")
    return tuple(Topic(subject, tuple(advice)) for subject, *advice in blocks)


def question(topic: int, form: int) -> str:
    """A question about a topic, in one of the forms of QUESTIONS."""
    return QUESTIONS[form].format(topics()[topic].subject)


def answer(topic: int, option: int, opening: int | None) -> str:
    """A piece of advice with an opening before it; None is the neutral one."""
    words = NEUTRAL_OPENING if opening is None else OPENINGS[opening]
    return f"{words} {topics()[topic].advice[option]}"


# A word with the space before it, a word at the start of a text, or a mark: nothing is lost between the pieces.
PIECE = r" ?\w+|[^\w\s]"


@cache
def vocabulary() -> tuple[str, ...]:
    """Every piece of every question and answer there can be, sorted: spaces belong to the word after them."""
    pieces: set[str] = set()
    for number, topic in enumerate(topics()):
        for form in range(len(QUESTIONS)):
            pieces.update(re.findall(PIECE, question(number, form)))
        for option in range(len(topic.advice)):
            for opening in (None, *range(len(OPENINGS))):
                pieces.update(re.findall(PIECE, answer(number, option, opening)))
    return tuple(sorted(pieces))
