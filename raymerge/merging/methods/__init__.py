"""The methods by name: how the contributors' deltas combine. One file per family; no torch is imported here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from raymerge.errors import MergeError, unknown
from raymerge.merging.methods import parameters as p

if TYPE_CHECKING:
    from raymerge.merging.site import Combined

    Combine = Callable[..., Combined]

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """A method of merging.

    summary: one line, with the paper. load: imports its function, which takes a `Site` and the parameters as they are
    there, and answers with the merged delta, measured from the anchor. parameters: the model of its own. fewest, most:
    how many experts it takes; crowd: why no more. signed: whether weights may be negative. degree: 1 where weights
    twice as large give a delta twice as large, 0 where only their ratios count. note: what its users should know.
    """

    name: str
    summary: str
    load: Callable[[], Combine]
    parameters: type[p.Parameters] = p.NoParameters
    fewest: int = 1
    most: int | None = None
    crowd: str = ""
    signed: bool = True
    degree: int = 1
    note: str | None = None

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The parameters' names and defaults."""
        return p.plain(self.parameters())

    def resolve(self, given: Mapping[str, Any]) -> p.Parameters:
        """Parameters as written, checked, with defaults. Raises MergeError that names the wrong one and its range."""
        fields = self.parameters.model_fields
        wrong = next((name for name in sorted(given) if name not in fields), None)
        if wrong is not None:
            raise MergeError(unknown(f"parameter of method {self.name}", wrong, fields))
        try:
            return self.parameters(**given)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            if name not in given:
                raise MergeError(f"method {self.name}: {name} is missing, and has no default.") from error
            what = str(first["msg"]).removeprefix("Value error, ").replace("Input should be", "expected a value")
            raise MergeError(
                f"method {self.name}: {name} {given[name]!r} cannot be used.\n{what[0].upper()}{what[1:]}."
            ) from error

    def check_experts(self, count: int) -> None:
        """Raise MergeError if it does not take so many experts."""
        if count < self.fewest or (self.most is not None and count > self.most):
            wanted = f"{self.fewest}" if self.fewest == self.most else f"at least {self.fewest}"
            raise MergeError(
                f"method {self.name} takes {wanted} adapters, not {count}."
                + (f"\n{self.crowd}" if self.crowd and count > self.fewest else "")
            )


def _spherical() -> Any:
    import raymerge.merging.methods.spherical as spherical

    return spherical


def _sparse() -> Any:
    import raymerge.merging.methods.sparse as sparse

    return sparse


def _subspace() -> Any:
    import raymerge.merging.methods.subspace as subspace

    return subspace


def _linear() -> Combine:
    from raymerge.merging.methods.linear import linear

    return linear


def _model_stock() -> Combine:
    from raymerge.merging.methods.model_stock import model_stock

    return model_stock


_RATIOS = "Only the ratios of the weights count: weights twice as large give the same result."
_MEAN = "Where signs are elected the result is a mean of those that agree, times the sum of the weights' sizes."
_FOLDED = (
    "A SLERP folded over many depends on their order: over 200 nearly orthogonal deltas the cosine of forward against "
    "reverse order is 0.09.\nUse karcher, the mean on the sphere, which equals slerp for two."
)

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("linear", "weighted sum, exact; with an anchor task arithmetic (2212.04089)", _linear),
        Method(
            "slerp",
            "along the arc between two",
            lambda: _spherical().slerp,
            p.Slerp,
            2,
            2,
            _FOLDED,
            signed=False,
            degree=0,
            note=_RATIOS,
        ),
        Method(
            "karcher",
            "Riemannian mean of directions",
            lambda: _spherical().karcher,
            p.Karcher,
            signed=False,
            degree=0,
            note=_RATIOS,
        ),
        Method(
            "model_stock",
            "the mean, shrunk by how little the experts agree (2403.19522)",
            _model_stock,
            signed=False,
            degree=0,
            note=f"{_RATIOS} Nearly orthogonal experts shrink to almost nothing, as the paper's formula says.",
        ),
        Method(
            "magnitude_prune", "largest entries of each, summed", lambda: _sparse().magnitude_prune, p.MagnitudePrune
        ),
        Method("ties", "largest entries, elected signs (2306.01708)", lambda: _sparse().ties, p.Ties, note=_MEAN),
        Method(
            "dare_linear", "random drop and rescale, summed (2311.03099)", lambda: _sparse().dare_linear, p.DareLinear
        ),
        Method(
            "dare_ties", "random drop, elected signs (2311.03099)", lambda: _sparse().dare_ties, p.DareTies, note=_MEAN
        ),
        Method(
            "della_linear",
            "drop by rank of magnitude, summed (2406.11617)",
            lambda: _sparse().della_linear,
            p.DellaLinear,
        ),
        Method(
            "della",
            "drop by rank of magnitude, elected signs (2406.11617)",
            lambda: _sparse().della,
            p.Della,
            note=_MEAN,
        ),
        Method(
            "breadcrumbs",
            "without largest and smallest entries, summed (2312.06795)",
            lambda: _sparse().breadcrumbs,
            p.Breadcrumbs,
        ),
        Method(
            "breadcrumbs_ties",
            "without largest and smallest entries, elected signs (2312.06795)",
            lambda: _sparse().breadcrumbs_ties,
            p.BreadcrumbsTies,
            note=_MEAN,
        ),
        Method(
            "sce",
            "entries that vary most, weighted by energy, signs elected (2408.07990)",
            lambda: _sparse().sce,
            p.Sce,
            note=_MEAN,
        ),
        Method(
            "knots",
            "TIES in the basis that the experts share (2410.19735)",
            lambda: _subspace().knots,
            p.Knots,
            note=_MEAN,
        ),
        Method(
            "tsv",
            "singular vectors of all experts made orthogonal (2412.00081)",
            lambda: _subspace().tsv,
            note="Directions that experts share are made orthogonal: N copies at weights 1/N give 1/N of the adapter.",
        ),
        Method(
            "iso_c",
            "the sum with all singular values made equal (2502.04959)",
            lambda: _subspace().iso_c,
            note="The sum is cut to the rank asked for, then all its singular values are set to their mean.",
        ),
    )
}
