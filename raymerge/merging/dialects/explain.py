"""How a merge differs from what PEFT and mergekit compute for the same adapters and weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raymerge.adapters.adapter import LoraAdapter
from raymerge.errors import MergeError
from raymerge.merging.dialects.calls import Call, calls
from raymerge.merging.exact import formed
from raymerge.merging.factors import Factor
from raymerge.merging.prepare import Merge, prepare
from raymerge.merging.settings import Setting
from raymerge.merging.site import Combined, Dense, Factored, Site, Weighted

SAME = 1e-5  # relative difference up to which two results are one


@dataclass(frozen=True)
class Explanation:
    """What another library computes instead of a method, before it is compressed.

    library: peft or mergekit. call: what its user writes. difference: |theirs - ours| / |ours|, norm_ratio: |theirs| /
    |ours|, Frobenius over all modules; None where it refuses, or nothing is left of ours. reason: one sentence.
    """

    library: str
    call: str
    difference: float | None
    norm_ratio: float | None
    reason: str

    def __str__(self) -> str:
        """Two lines for people."""
        if self.difference is None or self.norm_ratio is None:
            return f"{self.library} {self.call}\n  {self.reason}"
        figures = f"differs by {self.difference:.2g}, norm {self.norm_ratio:.3g} times ours: "
        return f"{self.library} {self.call}\n  {'' if self.difference <= SAME else figures}{self.reason}"


class Explanations(tuple[Explanation, ...]):
    """Explanations of one merge, in the order of the libraries. As text, a few lines for people."""

    def __str__(self) -> str:
        """All of them, or that there are none."""
        return "\n".join(map(str, self)) or "Neither PEFT nor mergekit has this method."


@dataclass
class _Tally:
    """Squared norms of theirs, and of their difference from ours, summed over modules; or why they refuse."""

    call: Call
    theirs: Merge | None = None
    square: float = 0.0
    apart: float = 0.0
    refused: str | None = None


def explain(
    adapters: Sequence[LoraAdapter], weights: Sequence[Setting], *, method: str = "linear", **parameters: Any
) -> Explanations:
    """Compare a method, in its own sense, with those calls of PEFT and mergekit that a user would have made for it.

    adapters, weights, method, parameters: as for `merge`; trained biases and whole tensors are left out. Computed
    exactly, module by module, with two dense modules in memory at most; random drops are the same on both sides.
    Empty where neither library has the method. Raises MergeError for what `merge` refuses.
    """
    ours = prepare(adapters, weights, method=method, rank="keep", **parameters)
    tallies = [_begun(call, adapters, weights, ours) for call in calls(ours.method.name)]
    square = 0.0
    with torch.no_grad():
        for path in ours.inputs.headers if tallies else ():
            square += _compare(ours, path, tallies)
    return Explanations(_explained(tally, square, ours) for tally in tallies)


def _begun(call: Call, adapters: Sequence[LoraAdapter], weights: Sequence[Setting], ours: Merge) -> _Tally:
    refused = call.refuses(ours.parameters) or (_unlike_peft(ours) if call.library == "peft" else None)
    if refused is not None:
        return _Tally(call, refused=refused)
    given = call.translate(ours.parameters)
    try:
        theirs = prepare(adapters, weights, method=call.name, dialect=call.library, rank="keep", **given)
    except MergeError as error:
        return _Tally(call, refused=_sentence(error))
    return _Tally(call, theirs)


def _unlike_peft(ours: Merge) -> str | None:
    """What PEFT does not merge at all."""
    present = [header for headers in ours.inputs.headers.values() for header in headers if header is not None]
    if any(header.nominal is not None for header in present):
        return "PEFT merges DoRA without its magnitudes, which is another delta"
    whole = [name for expert in ours.inputs.experts for name in expert.whole]
    if len(whole) > len(set(whole)):
        return "PEFT refuses tensors that several adapters store whole (modules_to_save)"
    return None


def _compare(ours: Merge, path: str, tallies: Sequence[_Tally]) -> float:
    """Add what one module contributes to all tallies, and answer with the squared norm of ours."""
    site = ours.site(path)
    combined = ours.combined(site)
    square: float | None = None
    gram = dense = None
    for tally in tallies:
        if tally.theirs is None or tally.refused is not None:
            continue
        try:
            other = tally.theirs.combined(tally.theirs.site(path))
        except MergeError as error:
            tally.refused = _sentence(error).removeprefix(f"{path}: ")
            continue
        if isinstance(combined, Weighted) and isinstance(other, Weighted):
            gram = site.gram() if gram is None else gram
            one, two = (torch.tensor(c.coefficients, dtype=torch.float64) for c in (combined, other))
            square = float(one @ gram @ one) if square is None else square
            tally.square += float(two @ gram @ two)
            tally.apart += max(float((two - one) @ gram @ (two - one)), 0.0)
        else:
            dense = _dense(site, combined) if dense is None else dense
            found = _dense(site, other)
            tally.square += float(found.square().sum())
            tally.apart += float(found.sub_(dense).square_().sum())
    if square is None:
        square = float((_dense(site, combined) if dense is None else dense).square().sum())
    return max(square, 0.0)


def _dense(site: Site, combined: Combined) -> Tensor:
    """A merged delta in float64, never one that somebody else holds."""
    if isinstance(combined, Dense):
        return combined.delta.to(torch.float64, copy=True)
    if isinstance(combined, Factored):
        return formed(site.shape, combined.factors)[0]
    deltas = zip(site.deltas(), combined.coefficients, strict=True)
    weighted = (Factor(f.B, f.A, f.weight * c) for delta, c in deltas for f in delta)
    return formed(site.shape, weighted)[0]


def _explained(tally: _Tally, square: float, ours: Merge) -> Explanation:
    call = tally.call
    written = call.written(ours.parameters)
    if tally.refused is not None:
        return Explanation(call.library, written, None, None, tally.refused)
    if square == 0:
        return Explanation(call.library, written, None, None, "nothing is left of the merge to compare with")
    difference, ratio = math.sqrt(tally.apart / square), math.sqrt(max(tally.square, 0.0) / square)
    reason = "the same delta" if difference <= SAME else call.reason
    if "seed" in type(ours.parameters).model_fields:
        reason += "; with the random draws of ours, which that library would not make"
    if call.library == "peft" and any(h.biased for row in ours.inputs.headers.values() for h in row if h is not None):
        reason += "; trained biases are lost"
    return Explanation(call.library, written, difference, ratio, reason)


def _sentence(error: MergeError) -> str:
    return " ".join(str(error).splitlines())
