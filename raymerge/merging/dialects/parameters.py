"""The parameters of the dialects, with the names and defaults of those libraries. No torch is imported here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, StrictBool, StrictInt

from raymerge.merging.methods.parameters import Blend, Density, Parameters, Share


class PeftPruned(Parameters):
    """density: share of entries that is kept; PEFT has no default."""

    density: Density | None = None


class PeftTies(PeftPruned):
    """density: share of entries that is kept; PEFT has no default. majority_sign_method: of the sum (total) or of the
    count (frequency)."""

    majority_sign_method: Literal["total", "frequency"] = "total"


class PeftDareLinear(PeftPruned):
    """density: probability with which an entry is kept; PEFT has no default. seed: of the random drop."""

    seed: StrictInt = Field(0, ge=0)


class PeftDareTies(PeftTies):
    """density, majority_sign_method: as in TIES, with a random drop. seed: of that drop."""

    seed: StrictInt = Field(0, ge=0)


class Linear(Parameters):
    """normalize: whether to divide by the sum of the weights."""

    normalize: StrictBool = True


class TaskArithmetic(Parameters):
    """normalize: whether to divide by the sum of the weights."""

    normalize: StrictBool = False


class Slerp(Parameters):
    """t: 0 is the first expert by name, 1 the second; without it, from the weights: w_2 / (w_1 + w_2)."""

    t: Blend | None = None


class Karcher(Parameters):
    """max_iter: steps at most; tol: length of the step (radians), and of a delta, that counts as nothing."""

    max_iter: StrictInt = Field(10, ge=1)
    tol: float = Field(1e-5, gt=0, lt=1)


class ModelStock(Parameters):
    """filter_wise: a ratio for each row of the delta, instead of one."""

    filter_wise: StrictBool = False


class Sce(Parameters):
    """select_topk: share of the entries that vary between the experts which is kept."""

    select_topk: Density = 1.0


class Ties(Parameters):
    """density: share of entries that is kept. normalize: whether to divide by the weights of those that agree.
    rescale: whether what is left of a delta is given its L1 norm back."""

    density: Density = 1.0
    normalize: StrictBool = True
    rescale: StrictBool = False


class Dare(Parameters):
    """density: probability with which an entry is kept. normalize: whether to divide by the sum of the weights (of
    those that agree). rescale: whether what is left of a delta is given its L1 norm back. seed: of the drop."""

    density: Density = 1.0
    normalize: StrictBool = False
    rescale: StrictBool = True
    seed: StrictInt = Field(0, ge=0)


class DellaLinear(Dare):
    """epsilon: the probability to keep an entry rises with its rank in its row from density - epsilon to
    density + epsilon, which both lie within (0, 1) unless the density is 1."""

    epsilon: Share = 0.15


class Della(DellaLinear):
    """As DELLA without elected signs, but divided by the weights of those that agree."""

    normalize: StrictBool = True


class Breadcrumbs(Parameters):
    """density: share that is kept of all entries. gamma: share of the largest that is dropped as outliers. normalize,
    rescale: as in TIES."""

    density: Density = 1.0
    gamma: Share = 0.01
    normalize: StrictBool = False
    rescale: StrictBool = False
