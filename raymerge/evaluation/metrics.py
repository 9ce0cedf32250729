"""Figures for one answer against its reference. All take whole batches and return one figure per answer."""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.chrf import CHRF

from raymerge.errors import EvaluationError
from raymerge.routing.embeddings import Encoder, encode


def similarity(encoder: Encoder, generated: Sequence[str], references: Sequence[str]) -> NDArray[np.float32]:
    """Cosine similarity of the sentence embeddings of answers and references: float32 (n,), -1 to 1.

    Both sides are embedded in one call, so a text that occurs often is embedded once.
    Raises EvaluationError if the lengths differ.
    """
    _require_pairs(generated, references)
    if not generated:
        return np.zeros(0, dtype=np.float32)
    rows = encode(encoder, [*generated, *references])
    products = rows[: len(generated)].astype(np.float64) * rows[len(generated) :].astype(np.float64)
    return np.asarray(products.sum(axis=1), dtype=np.float32)


def chrf(generated: Sequence[str], references: Sequence[str]) -> NDArray[np.float32]:
    """chrF of each answer against its reference, as sacrebleu computes it: float32 (n,), 0 to 100 (Popović 2015).

    Raises EvaluationError if the lengths differ.
    """
    _require_pairs(generated, references)
    scorer = CHRF()
    known: dict[tuple[str, str], float] = {}
    for pair in zip(generated, references, strict=True):
        if pair not in known:
            known[pair] = scorer.sentence_score(pair[0], [pair[1]]).score
    return np.array([known[pair] for pair in zip(generated, references, strict=True)], dtype=np.float32)


def exact_match(generated: Sequence[str], references: Sequence[str]) -> NDArray[np.bool_]:
    """Whether answer and reference say the same, whatever their case, spacing and punctuation: bool (n,).

    Raises EvaluationError if the lengths differ.
    """
    _require_pairs(generated, references)
    same = [normalised(a) == normalised(b) for a, b in zip(generated, references, strict=True)]
    return np.array(same, dtype=np.bool_)


@lru_cache(maxsize=65536)
def normalised(text: str) -> str:
    """The text in one case and one Unicode form, words one space apart, without punctuation.

    A text that is nothing but punctuation stays as it is, so that "!" and "?" remain two answers.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c for c in folded if not unicodedata.category(c).startswith("P")).split()
    return " ".join(words or folded.split())


def _require_pairs(generated: Sequence[str], references: Sequence[str]) -> None:
    if len(generated) != len(references):
        raise EvaluationError(
            f"{len(generated)} answers cannot be scored against {len(references)} references.\n"
            "Each answer needs the reference at the same place."
        )
