"""Signs elected entry by entry while experts come one after the other: what both libraries call disjoint merging."""

from __future__ import annotations

import torch
from torch import Tensor

from raymerge.merging.consensus import MajoritySign

_TILE = 2**15  # entries that stay in the cache through all steps, and that torch does not deal out to threads


class WeightedSum:
    """The sum of weighted tensors of one shape, added one after the other."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, x: Tensor, weight: float) -> None:
        """Add weight * x."""
        if self._sum is None:
            self._sum = x * weight
        elif self._sum.dtype != x.dtype:
            self._sum = self._sum + x * weight
        else:
            self._sum.add_(x, alpha=weight)

    def total(self) -> Tensor:
        """What was added up."""
        if self._sum is None:
            raise RuntimeError("nothing was added")
        return self._sum


class Election:
    """Sums of positive and of negative entries kept apart, with how many, or how much, voted for each.

    The sign of an entry is that of the sum of its votes (total), or of their number (frequency); a tie is positive and
    zeros have no vote.
    """

    def __init__(self, majority: MajoritySign) -> None:
        self._majority = majority
        self._tallies: list[Tensor] | None = None  # votes, sum and share of the positive, sum and share of the negative

    def add(self, x: Tensor, weight: float = 1.0, share: float = 1.0) -> None:
        """Add weight * x to the sums, and share to those that voted for its sign. The votes are x itself."""
        if self._tallies is None:
            self._tallies = [torch.zeros_like(x).view(-1) for _ in range(5)]
            self._shape = x.shape
        elif x.dtype != self._tallies[0].dtype:
            self._tallies = [tally.double() for tally in self._tallies]
        flat = x.reshape(-1).to(self._tallies[0].dtype)
        spare = flat.new_empty(min(_TILE, flat.numel()))
        for start in range(0, flat.numel(), _TILE):
            part, *tallies = (tensor[start : start + _TILE] for tensor in (flat, *self._tallies))
            self._count(part, tallies, weight, share, spare[: part.numel()])

    def _count(self, x: Tensor, tallies: list[Tensor], weight: float, share: float, spare: Tensor) -> None:
        votes, up, ups, down, downs = tallies
        votes.add_(x if self._majority == "total" else torch.sign(x, out=spare))
        up.add_(torch.clamp(x, min=0, out=spare), alpha=weight)
        ups.add_(spare.sign_(), alpha=share)
        down.add_(torch.clamp(x, max=0, out=spare), alpha=weight)
        downs.sub_(spare.sign_(), alpha=share)

    def result(self) -> tuple[Tensor, Tensor]:
        """The sum of the entries that agree with the elected sign, and the shares of those that voted for it. To be
        asked once, at the end."""
        if self._tallies is None:
            raise RuntimeError("nothing was added")
        votes, up, ups, down, downs = self._tallies
        positive = votes.ge(0).to(votes.dtype)  # lerp at 0 and at 1 is exact, and quicker than where
        agreed, shares = torch.lerp(down, up, positive, out=up), torch.lerp(downs, ups, positive, out=ups)
        return agreed.view(self._shape), shares.view(self._shape)
