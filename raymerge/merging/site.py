"""One module of all experts, as a method of merging sees it; and the three forms in which a method may answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from raymerge.adapters.adapter import LoraModule
from raymerge.merging.factors import Factor
from raymerge.merging.gram import gram_module
from raymerge.merging.rank import RankRule


@dataclass(frozen=True)
class Site:
    """One module of all experts. Experts are in the order of their names.

    path: of the module in the base model. shape: of the delta, (out_features, in_features). names, weights: of the
    experts, the weights as they are at this module. ranks: of the experts' modules, 0 where one lacks it. anchor: its
    module, or None. rule: the rank asked for. read: the experts' modules one after the other, None where one lacks it;
    each call reads them anew, so that no more than one need be in memory. nominal: the rank that `rank: keep` means,
    where it is not the largest of the factors' (dense deltas written as products).
    """

    path: str
    shape: tuple[int, int]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    ranks: tuple[int, ...]
    anchor: LoraModule | None
    rule: RankRule
    read: Callable[[], Iterator[LoraModule | None]]
    nominal: int | None = None

    @property
    def kept(self) -> int:
        """What `rank: keep` means here: the largest rank among the experts and the anchor."""
        if self.nominal is not None:
            return self.nominal
        return max(*self.ranks, 0 if self.anchor is None else self.anchor.rank)

    def deltas(self) -> Iterator[list[Factor]]:
        """Each expert's delta, measured from the anchor, as a sum of products; an empty list where it is zero.

        One expert is in memory at a time, as long as the caller keeps none.
        """
        back = [] if self.anchor is None else [Factor(self.anchor.B, self.anchor.A, -self.anchor.scaling)]
        for module in self.read():
            own = [] if module is None else [Factor(module.B, module.A, module.scaling)]
            yield [*own, *back]

    def gram(self) -> Tensor:
        """Frobenius inner products of the experts' deltas, measured from the anchor: float64 (N, N)."""
        ranks = [*self.ranks, 0 if self.anchor is None else self.anchor.rank]
        whole = gram_module(self.shape, ranks, lambda: chain(self.read(), (self.anchor,)))
        anchored = whole[:-1, -1:]
        return whole[:-1, :-1] - anchored - anchored.T + whole[-1, -1]


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of the experts' deltas; coefficients in the order of the experts. Nothing is formed."""

    coefficients: Sequence[float]


@dataclass(frozen=True)
class Factored:
    """A sum of low-rank products, of the shape of the site. cut: it has been cut to the rank asked for."""

    factors: Sequence[Factor]
    cut: bool = False


@dataclass(frozen=True)
class Dense:
    """A delta with nothing low-rank about it: (out_features, in_features), float32 or float64."""

    delta: Tensor


Combined = Weighted | Factored | Dense
