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

MOST_SIMILARITIES = 64  # inputs above which not all pairs are compared
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
    anchor (as written), dtype, format. anchor: its digest. similarities: cosines of the inputs, or None where they
    are too many. command: makes it again.
    """

    name: str
    experts: tuple[Contributor, ...]
    merges: Mapping[str, Any]
    anchor: str | None
    figures: Figures
    errors: Mapping[str, float]
    ranks: Mapping[str, int]
    similarities: Sequence[Sequence[float | None]] | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    command: str

    def to_json(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return {**asdict(self), "error": self.figures.error}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Fused:
        """From a manifest."""
        fields = {name: value[name] for name in cls.__dataclass_fields__}
        fields["experts"] = tuple(Contributor(**expert) for expert in value["experts"])
        fields["figures"] = Figures(**value["figures"])
        return cls(**fields)


@dataclass(frozen=True)
class Products:
    """Inner products of the inputs' deltas, measured from the anchor. squares: of each with itself. with_anchor: of
    each with the anchor, measured from the base; anchor: of the anchor with itself. cosines: of all pairs, or None."""

    squares: tuple[float, ...]
    with_anchor: tuple[float, ...]
    anchor: float
    cosines: list[list[float | None]] | None


def measure(experts: Sequence[LoraAdapter], anchor: LoraAdapter | None) -> Products:
    """Inner products of adapters: of all pairs, or of each with itself where they are more than 64."""
    from raymerge.merging.gram import gram

    count = len(experts)
    if count > MOST_SIMILARITIES:
        back = [0.0 if anchor is None else _inner(expert, anchor) for expert in experts]
        square = 0.0 if anchor is None else float(gram([anchor])[0, 0])
        own = [float(gram([e])[0, 0]) - 2 * b + square for e, b in zip(experts, back, strict=True)]
        return Products(tuple(own), tuple(back), square, None)
    whole = gram([*experts, *([anchor] if anchor is not None else [])])
    back = whole[:count, count].tolist() if anchor is not None else [0.0] * count
    square = float(whole[count, count]) if anchor is not None else 0.0
    table = [[float(whole[i, j]) - back[i] - back[j] + square for j in range(count)] for i in range(count)]
    own = [table[i][i] for i in range(count)]
    cosines = [[_cosine(table[i][j], own[i], own[j]) for j in range(count)] for i in range(count)]
    return Products(tuple(own), tuple(back), square, cosines)


def compare(
    experts: Sequence[LoraAdapter], products: Products, merged: LoraAdapter, anchor: LoraAdapter | None
) -> tuple[float, list[float | None]]:
    """The result's norm, and its cosine with each input."""
    from raymerge.merging.gram import gram

    square = float(gram([merged])[0, 0])
    back = 0.0 if anchor is None else _inner(merged, anchor)
    norm = square - 2 * back + products.anchor
    cosines = []
    for expert, own, with_anchor in zip(experts, products.squares, products.with_anchor, strict=True):
        cosines.append(_cosine(_inner(expert, merged) - with_anchor - back + products.anchor, own, norm))
    return math.sqrt(max(norm, 0.0)), cosines


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
    if averaged and figures.ratio is not None and figures.ratio < _SHRUNK:
        found.append(
            f"The result's norm is {figures.ratio:.2f} of the inputs' weighted norms: deltas that point apart shrink "
            "when they are averaged. --scale match_norm restores it."
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


def _inner(adapter: LoraAdapter, other: LoraAdapter) -> float:
    from raymerge.merging.gram import gram

    return float(gram([adapter, other])[0, 1])


def _cosine(product: float, square: float, other: float) -> float | None:
    if square <= 0 or other <= 0:
        return None
    return max(-1.0, min(1.0, product / math.sqrt(square * other)))
