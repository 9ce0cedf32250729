"""What `rank` means: how small a merged module must be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from raymerge.errors import RankError

ROUNDING = 5e-7  # relative Frobenius norm that counts as nothing: half of what a merge may lose besides the optimum
_FORMS = "keep, exact, a whole number above 0, a share such as 0.95, or {energy: 0.95, max: 64}"


@dataclass(frozen=True)
class RankRule:
    """Rank of each merged module.

    keep: the largest among the experts. exact: the numerical rank of the sum. fixed: `value`. energy: the smallest
    that holds the share `value` of the squared Frobenius norm, at most `maximum`; a number below 1 asks for it. None
    exceeds min(out, in). uniform: all modules are padded with zeros to the largest rank among them.
    """

    kind: Literal["keep", "exact", "fixed", "energy"]
    value: float = 0.0
    maximum: int | None = None
    uniform: bool = False

    def ceiling(self, shape: tuple[int, int], kept: int) -> int:
        """The largest rank a module of shape (out, in) can get; kept: the largest rank among its experts."""
        limit = min(shape)
        if self.kind == "keep":
            return min(kept, limit)
        if self.kind == "fixed":
            return min(int(self.value), limit)
        return limit if self.maximum is None else min(self.maximum, limit)


def parse_rank(value: Any) -> RankRule:
    """Give a written rank its meaning. Raises RankError, naming what is allowed."""
    if isinstance(value, RankRule):
        return value
    if isinstance(value, Mapping):
        return _parse_mapping(value)
    if value in ("keep", "exact"):
        return RankRule(value)
    if isinstance(value, float) and 0 < value < 1:
        return RankRule("energy", value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RankError(f"rank {value!r} is no rank.\nExpected {_FORMS}.")
    return RankRule("fixed", value)


def _parse_mapping(value: Mapping[str, Any]) -> RankRule:
    unknown = sorted(set(value) - {"energy", "max", "uniform", "rank"})
    if unknown or ("energy" in value) == ("rank" in value):
        what = f"unknown {unknown[0]!r} in rank" if unknown else f"rank {dict(value)!r} is no rank"
        raise RankError(
            f"{what}.\nExpected {_FORMS}, with `uniform: true` where wanted ({{rank: keep, uniform: true}})."
        )
    uniform = value.get("uniform", False)
    if not isinstance(uniform, bool):
        raise RankError(f"rank: uniform is true or false; found {uniform!r}.")
    maximum = value.get("max")
    if maximum is not None and (isinstance(maximum, bool) or not isinstance(maximum, int) or maximum < 1):
        raise RankError(f"rank: max {maximum!r} is no rank.\nExpected a whole number above 0.")
    if "rank" in value:
        plain = parse_rank(value["rank"])
        if maximum is not None:
            raise RankError("rank: max goes with energy only.")
        return RankRule(plain.kind, plain.value, None, uniform)
    energy = value["energy"]
    if isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy <= 1:
        raise RankError(f"rank: energy {energy!r} is no share.\nExpected a number above 0 and at most 1.")
    return RankRule("energy", float(energy), maximum, uniform)


def chosen_rank(rule: RankRule, ceiling: int, energies: list[float], total: float) -> int:
    """Rank a rule asks for. energies: squared singular values, largest first (at least `ceiling` of them, or all);
    total: the sum of all of them, known apart. At least 1."""
    if rule.kind in ("keep", "fixed"):
        return ceiling
    lost = ROUNDING**2 if rule.kind == "exact" else max(1.0 - rule.value + 1e-12, ROUNDING**2)  # 1 - 0.8 < 0.2
    left = math.fsum([total, *(-e for e in energies[:ceiling])])
    rank = min(ceiling, len(energies))
    while rank > 1 and left + energies[rank - 1] <= lost * total:  # from the small end, where sums are accurate
        rank -= 1
        left += energies[rank]
    return max(rank, 1)
