"""How the kept entries of all experts become one: the second half of the sparse methods.

Sums over experts are planes of one tensor, (planes, rows, columns): zero at first, then each expert adds its entries
times its weight, and at last the result is read from them. Entries come multiplied by the weight, and `cut` is what
sparsifies them in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MajoritySign = Literal["total", "frequency"]

_EVEN = {torch.float32: 1e-6, torch.float64: 1e-12}  # relative difference at which two sums are even


@dataclass(frozen=True)
class Total:
    """sum(w_i x_i)."""

    @property
    def planes(self) -> int:
        """One sum."""
        return 1

    def add(self, sums: Tensor, entries: Tensor, weight: float, spare: Tensor, cut: Callable[[Tensor], None]) -> None:
        """Add what is left of an expert's entries."""
        cut(entries)
        sums[0].add_(entries)

    def result(self, sums: Tensor, whole: float) -> Tensor:
        """The sum as it is."""
        return sums[0]


@dataclass(frozen=True)
class SignElection:
    """The mean of those entries whose sign is elected (the disjoint mean of TIES, arXiv:2306.01708), times the sum of
    all |w_i|, so that twice the weights give twice the result.

    With c_i = w_i x_i: the sign of sum(c_i) is elected (total), or that of sum(|w_i| sign(c_i)) (frequency), and of
    sum(c_i) where that is 0; where both are 0, up to rounding, the entry is 0. Those that agree have c_i of that sign;
    their mean is sum(c_i) / sum(|w_i|). So a negative weight subtracts.

    early: signs and divisors come from the entries before they are cut at random, and only the sums above the
    divisors from what is left. The result is then right in expectation, as neither depends on the draw.
    """

    majority_sign: MajoritySign = "total"
    early: bool = False

    @property
    def planes(self) -> int:
        """Sums of positive and of negative c_i, of the |w_i| of each; and of what is left of both, if early."""
        return 6 if self.early else 4

    def add(self, sums: Tensor, entries: Tensor, weight: float, spare: Tensor, cut: Callable[[Tensor], None]) -> None:
        """Add an expert's entries to the sums of their signs, and |w| to the divisors."""
        if not self.early:
            cut(entries)
        above, below, above_weight, below_weight = sums[:4]
        above.add_(torch.clamp_min(entries, 0, out=spare))
        above_weight.add_(spare.sign_(), alpha=abs(weight))
        below.add_(torch.clamp_max(entries, 0, out=spare))
        below_weight.add_(spare.sign_(), alpha=-abs(weight))
        if self.early:
            cut(entries)
            sums[4].add_(torch.clamp_min(entries, 0, out=spare))
            sums[5].add_(torch.clamp_max(entries, 0, out=spare))

    def result(self, sums: Tensor, whole: float) -> Tensor:
        """The disjoint mean, times the sum of all |w_i|."""
        above, below, above_weight, below_weight = sums[:4]
        sign = _larger(above, -below)
        if self.majority_sign == "frequency":
            votes = _larger(above_weight, below_weight)
            sign = votes.add_(sign.mul_(1 - votes.abs()))
        positive, negative = sign.clamp_min(0), sign.clamp_max(0).neg_()
        numerators = sums[4:] if self.early else sums[:2]
        elected = numerators[0].mul_(positive).addcmul_(numerators[1], negative)
        divisor = above_weight.mul_(positive).addcmul_(below_weight, negative)
        divisor.clamp_min_(torch.finfo(divisor.dtype).tiny)  # 0 where none is elected, and then the sum is 0 too
        return elected.div_(divisor).mul_(whole)


Consensus = Total | SignElection


def _larger(left: Tensor, right: Tensor) -> Tensor:
    """1 where the left one of two positive sums is larger, -1 where the right one is, 0 where they are even."""
    difference = left - right
    margin = difference.abs().sub_(left + right, alpha=_EVEN[left.dtype])
    return difference.sign_().mul_(margin.sign_().clamp_min_(0))
