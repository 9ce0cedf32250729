"""A fused adapter in numbers: norms and cosines of what went in and of what came out, and what to beware of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from raymerge.evaluation.wording import percent
from raymerge.merging.methods import Method
from raymerge.merging.settings import Setting

if TYPE_CHECKING:
    from raymerge.adapters import LoraAdapter

SCHEMA = 2  # of the manifest: one of another number is another fuse
MOST_SIMILARITIES = 64  # inputs above which not all pairs are compared
_ROW = 8  # inputs compared with a result at once, where they are not compared with each other
_LOST = 0.2  # relative error that is worth a warning
_SHRUNK = 0.75  # norm, against the inputs' weighted mean, that is worth one


@dataclass(frozen=True)
class Contributor:
    """An adapter that went in. rank: the least and the largest of its modules. norm: of its delta, measured from the
    anchor. cosine: of its delta with the result's; None where one is zero."""

    name: str
    location: str
    digest: str
    weight: Setting
    base_model: str | None
    rank: tuple[int, int]
    norm: float
    cosine: float | None


@dataclass(frozen=True)
class Figures:
    """The result. norm: of its delta, measured from the anchor. ratio: norm / sum(|w_i| |a_i|); None where a weight
    differs by layer or the sum is zero. error: what rank and rounding lost, relative. size: of its files in bytes."""

    norm: float
    ratio: float | None
    error: float
    rank: tuple[int, int]
    size: int


@dataclass(frozen=True)
class Fused:
    """A fused adapter as its manifest and its report tell of it.

    experts: in the order of their names. merges: method, method_parameters (with defaults), dialect, scale, rank,
    anchor (as written), dtype, format. anchor: its digest. base: of the base's files, or None where nothing depends on
    them. similarities: cosines of the inputs, or None where they
    are too many. command: makes it again.
    """

    name: str
    experts: tuple[Contributor, ...]
    merges: Mapping[str, Any]
    anchor: str | None
    base: str | None
    figures: Figures
    errors: Mapping[str, float]
    ranks: Mapping[str, int]
    similarities: Sequence[Sequence[float | None]] | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    command: str

    def to_json(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return {**asdict(self), "schema": SCHEMA, "error": self.figures.error}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Fused:
        """From a manifest."""
        fields = {name: value[name] for name in cls.__dataclass_fields__}
        fields["experts"] = tuple(Contributor(**expert) for expert in value["experts"])
        fields["figures"] = Figures(**value["figures"])
        return cls(**fields)


@dataclass(frozen=True)
class Measured:
    """Deltas in numbers, all measured from the anchor. squares: of each input with itself. similarities: cosines of all
    pairs of inputs, or None where they are too many. norm: of the result. cosines: of each input with the result."""

    squares: tuple[float, ...]
    similarities: list[list[float | None]] | None
    norm: float
    cosines: tuple[float | None, ...]


def measure(
    experts: Sequence[LoraAdapter], merged: LoraAdapter, anchor: LoraAdapter | None, known: Measured | None = None
) -> Measured:
    """Measure a result and its inputs. known: what was measured with the same inputs and another result, so that the
    inputs need not be compared with each other again."""
    together = known is None and len(experts) <= MOST_SIMILARITIES
    step = max(len(experts), 1) if together else _ROW
    similarities = None if known is None else known.similarities
    squares: list[float] = []
    cosines: list[float | None] = []
    norm = 0.0
    for start in range(0, len(experts), step):
        table = _inner_products([*experts[start : start + step], merged], anchor)
        own = [table[i][i] for i in range(len(table))]
        found = [[_cosine(one, own[i], own[j]) for j, one in enumerate(row)] for i, row in enumerate(table)]
        squares += own[:-1]
        cosines += [row[-1] for row in found[:-1]]
        norm = math.sqrt(max(own[-1], 0.0))
        if together:
            similarities = [row[:-1] for row in found[:-1]]
    return Measured(tuple(squares), similarities, norm, tuple(cosines))


def _inner_products(adapters: Sequence[LoraAdapter], anchor: LoraAdapter | None) -> list[list[float]]:
    """Of deltas from the anchor. These are small beside the adapters themselves, so with an anchor it takes float64."""
    from raymerge.merging.gram import gram

    if anchor is None:
        return gram(adapters, "float32").tolist()
    whole = gram([*adapters, anchor])
    back = whole[:-1, -1]
    return (whole[:-1, :-1] - back[:, None] - back + whole[-1, -1]).tolist()


def norm_ratio(norm: float, weights: Sequence[Setting], squares: Sequence[float]) -> float | None:
    """norm / sum(|w_i| |a_i|); None where a weight is no number, or the sum is zero."""
    numbers = [abs(weight) for weight in weights if isinstance(weight, int | float)]
    if len(numbers) < len(weights):
        return None
    wanted = math.fsum(w * math.sqrt(max(square, 0.0)) for w, square in zip(numbers, squares, strict=True))
    return norm / wanted if wanted > 0 else None


def span(ranks: Sequence[int]) -> tuple[int, int]:
    """The least and the largest; 0 of none."""
    return min(ranks, default=0), max(ranks, default=0)


def cautions(figures: Figures, merges: Mapping[str, Any], weights: Sequence[Setting], degree: int) -> list[str]:
    """What somebody who takes this result for the merge would be wrong about. degree: the method's."""
    found = []
    if figures.error > _LOST:
        more = (
            "" if merges["rank"] == "exact" else " A larger --rank, a share such as --rank 0.99, or exact keeps more."
        )
        found.append(f"The rank loses {percent(figures.error)} of the merge (relative Frobenius error).{more}")
    asked = merges["scale"] != 1 or any(weight < 0 for weight in weights if isinstance(weight, int | float))
    averaged = degree == 1 and merges["dialect"] == "delta" and not asked
    before = (figures.ratio or 0.0) / math.sqrt(max(1 - figures.error**2, 1e-12))  # the rank took its part of the norm
    if averaged and 0 < before < _SHRUNK:
        found.append(
            f"The merge's norm is {before:.2f} of the inputs' weighted norms: deltas that point apart shrink when they "
            "are combined. --scale match_norm restores it."
        )
    return found


def remarks(
    weights: Sequence[Setting], method: Method, names: Sequence[str], starts: Sequence[str | None]
) -> list[str]:
    """What is as it was asked for, and good to know. names: sorted. starts: what the inputs were trained from, where
    no anchor was given."""
    found = []
    numbers = [weight for weight in weights if isinstance(weight, int | float)]
    total = math.fsum(numbers)
    if method.degree == 1 and len(numbers) == len(weights) and abs(total - 1) > 1e-6:
        found.append(f"The weights sum to {total:.4g} and are used as given; --normalize scales them to sum to 1.")
    if "t" in method.parameters.model_fields and len(names) == 2:
        found.append(f"t = 0 is {names[0]}, t = 1 is {names[1]}: names are sorted.")
    if starts and starts[0] is not None and len(set(starts)) == 1:
        found.append(f"All were trained from {starts[0]}: --anchor with its location merges what they learnt since.")
    return found


def _cosine(product: float, square: float, other: float) -> float | None:
    if square <= 0 or other <= 0:
        return None
    return max(-1.0, min(1.0, product / math.sqrt(square * other)))
