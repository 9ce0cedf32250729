"""What `raymerge prompt` is asked, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raymerge.config import DEFAULT_ENCODER
from raymerge.evaluation.capabilities import Kept, Respondent, Scores
from raymerge.pipelines.prompting.file import Prompt


@dataclass(frozen=True)
class Question:
    """What is asked of whom, as written on the command line. Locations are relative to the working directory.

    adapters: locations or NAME=LOCATION; those whose files say that they were made by merging count as fused. fused:
    likewise, made by merging elsewhere. prompts: texts; or file: where they are. prompt_format: a text with {prompt}
    in it, or `chat`. similarity_model: a sentence encoder, or `none`. device: as torch writes it, or `auto` for the
    GPU where there is one.
    """

    base: str
    adapters: Sequence[str] = ()
    fused: Sequence[str] = ()
    prompts: Sequence[str] = ()
    file: str | None = None
    prompt_format: str = "{prompt}"
    max_new_tokens: int = 64
    stop: Sequence[str] = ()
    similarity_model: str = DEFAULT_ENCODER
    with_base: bool = True
    batch_size: int = 64
    device: str = "auto"
    dtype: str = "auto"
    allow_pickle: bool = False


@dataclass(frozen=True, eq=False)
class Answers:
    """What came of a question.

    respondents: the base, experts, fused adapters. locations: of the adapters, by name, as written. answers: by
    respondent, one text for each prompt. scored: numbers of the prompts that have a reference, for which the columns of
    `scores` stand; scores is None where there is none. notes: what a reader should know.
    """

    question: Question
    prompts: tuple[Prompt, ...]
    respondents: tuple[Respondent, ...]
    locations: Mapping[str, str]
    answers: Mapping[str, Sequence[str]]
    scored: tuple[int, ...]
    scores: Scores | None
    kept: tuple[Kept, ...]
    notes: tuple[str, ...]

    def figures(self, number: int) -> dict[str, dict[str, float]]:
        """Every metric of each respondent's answer to a prompt; empty for a prompt without a reference."""
        if self.scores is None or number not in self.scored:
            return {}
        column = self.scored.index(number)
        return {
            respondent.name: {metric: float(values[row, column]) for metric, values in self.scores.values.items()}
            for row, respondent in enumerate(self.respondents)
        }

    def to_json(self) -> dict[str, Any]:
        """As --json prints it: similarity -1 to 1, chrF 0 to 100, nll in nats per token of the reference."""
        value = {
            "question": asdict(self.question),
            "respondents": [{**asdict(r), "location": self.locations.get(r.name)} for r in self.respondents],
            "prompts": [self._prompt(number) for number in range(len(self.prompts))],
            "notes": list(self.notes),
        }
        if self.scores is not None:
            value["scored"] = self.scores.prompts
            value["scores"] = {metric: self.scores.means(metric) for metric in self.scores.values}
            value["kept"] = [asdict(one) for one in self.kept]
        return value

    def _prompt(self, number: int) -> dict[str, Any]:
        asked = self.prompts[number]
        return {
            "prompt": asked.text,
            "reference": asked.reference,
            "capability": asked.capability,
            "answers": {name: texts[number] for name, texts in self.answers.items()},
            "scores": self.figures(number),
        }
