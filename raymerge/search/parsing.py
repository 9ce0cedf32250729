"""One entry of a search space, as written in the project file, and the parameters it stands for.

    k: {min: 2, max: 30, log: true}                       # a range; `step: 2` instead of log for a grid
    method: [linear, ties]                                # choices; {choices: [..], when: ..} with a condition
    temperature: {min: 0.02, max: 1, when: {strategy: [top_k]}}
    scale: {min: 0.5, max: 3, log: true}                  # times match_norm
    weights: {experts: [ann, bob, eve]}                   # of strategy named: on the simplex, in a grid with a step
    weights: {experts: [ann, bob], min: -1, max: 1}       # or free; `per: persona` for a set of each persona's own
    scale_by_cluster: {max: 0.5, penalty: 1.0}            # offsets d from scale, a factor exp(d), |d| at most max
    scale_by_layers: {groups: 3, max: 0.5, penalty: 1.0}  # spread over the depth of the model

A parameter that only some of the tried strategies or methods have counts only there, whether or not `when` says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, NoReturn

from raymerge.errors import ProjectError, unknown
from raymerge.merging.methods import METHODS
from raymerge.routing.parameters import TUNED
from raymerge.routing.strategies import CONTROLS, STRATEGIES

FREE_EXAMPLES = 50  # validation examples of a persona below which it gets no weights of its own
FIXED = frozenset(CONTROLS) | {"base", "selective", "neighbours_trained", "prefix"}  # not searched: nothing is merged
SEARCHED = {name: strategy for name, strategy in STRATEGIES.items() if name not in FIXED}
OF_ALL: Mapping[str, Any] = {"strategy": "", "method": "", "scale": 1.0, "rank": 1}  # their defaults say the kind
EVERYBODY = ("simple_average", "unified")  # one row for all personas, which lie in several clusters
SMALLEST = 1e-6  # of the uniform number behind a weight of the simplex
RANGE = ("min", "max", "log", "step", "when")
OFFSETS = {"scale_by_cluster": "clusters", "scale_by_layers": "layers"}


@dataclass(frozen=True)
class Parameter:
    """One thing that is searched.

    low, high: bounds of a number, both included; log: searched evenly on a log scale; step: from low on, None for any
    number. choices: scalars; a list or a mapping stands as its JSON text, since samplers take only scalars. when: other
    parameter -> its values at which this one counts; empty: always. path: where in the recipe the value is written.
    simplex: its values are numbers u in (0, 1], and -log u over the sum of these is the weight.
    """

    name: str
    kind: Literal["float", "int", "choice"]
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    simplex: bool = False

    def counts(self, values: Mapping[str, Any]) -> bool:
        """Whether it is searched beside these values of others."""
        return all(other in values and values[other] in allowed for other, allowed in self.when.items())

    @property
    def bounds(self) -> tuple[float, float]:
        """low, high. Raises ValueError for a choice."""
        if self.low is None or self.high is None:
            raise ValueError(f"{self.name} is a choice and has no bounds")
        return self.low, self.high


@dataclass(frozen=True)
class Entry:
    """What `search.space.NAME` says, read beside what the whole search tries.

    location: of the project file. strategies, methods: those tried. validation: persona -> number of examples. grid:
    whether all points are enumerated.
    """

    location: str
    name: str
    written: Any
    strategies: Sequence[str]
    methods: Sequence[str]
    clusters: Sequence[str]
    validation: Mapping[str, int]
    grid: bool

    def refuse(self, text: str) -> NoReturn:
        """Raise ProjectError that names the entry."""
        refuse(self.location, self.name, text)

    def keys(self, allowed: Sequence[str], expected: str = "a mapping") -> Mapping[str, Any]:
        """What is written, a mapping without unknown keys."""
        if not isinstance(self.written, Mapping):
            self.refuse(f"found {self.written!r}.\nExpected {expected}.")
        for key in self.written:
            if key not in allowed:
                self.refuse(unknown("key", str(key), allowed))
        return self.written

    def parameters(self) -> list[Parameter]:
        """The parameters, with the conditions that follow from strategies and methods. Raises ProjectError."""
        if self.name == "weights":
            return self._weights()
        if self.name in OFFSETS:
            return self._offsets()
        kind = _kind(self.name)
        if isinstance(self.written, list) or (isinstance(self.written, Mapping) and "choices" in self.written):
            given = self.written if isinstance(self.written, list) else self.keys(("choices", "when"))["choices"]
            return [
                Parameter(self.name, "choice", choices=self._choices(given), when=self._owners(), path=(self.name,))
            ]
        if not isinstance(self.written, Mapping):
            self.refuse(
                f"found {self.written!r}.\nExpected a list of choices, or a range {{min: .., max: ..}}; what is not "
                "searched stands in search.recipe."
            )
        if kind == "choice":
            self.refuse(f"is not a number, so it has no range: {dict(self.written)}.\nExpected a list of choices.")
        return [Parameter(self.name, kind, **self._range(kind), when=self._owners(), path=(self.name,))]

    def _choices(self, given: Any) -> tuple[Any, ...]:
        if not isinstance(given, list) or not given:
            self.refuse(f"has no choices; found {given!r}.\nExpected a list of one value or more.")
        choices = [as_scalar(one) for one in given]
        for i, one in enumerate(choices):
            if one in choices[:i]:
                self.refuse(f"has the choice {one!r} twice.\nName each once.")
        return tuple(choices)

    def _number(self, key: str, default: Any = None) -> float:
        value = self.written.get(key, default)
        try:
            number = float("nan" if isinstance(value, bool) else value)  # YAML reads 1e-3 as text
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            self.refuse(f"{key} is {'missing' if value is None else repr(value)}.\nExpected a finite number.")
        return number

    def _flag(self, key: str, default: bool = False) -> bool:
        value = self.written.get(key, default)
        if not isinstance(value, bool):
            self.refuse(f"{key} is {value!r}.\nExpected true or false.")
        return value

    def _range(self, kind: Literal["float", "int"], also: Sequence[str] = ()) -> dict[str, Any]:
        """low, high, log and step of a range; high is moved down to the last step."""
        written = self.keys((*RANGE, *also), "a range {min: .., max: ..}")
        low, high, log = self._number("min"), self._number("max"), self._flag("log")
        step = self._number("step") if "step" in written else 1.0 if kind == "int" and not log else None
        if low >= high:
            why = "is empty" if low > high else "holds one value, which belongs into search.recipe"
            self.refuse(f"the range from {low:g} to {high:g} {why}.\nExpected min below max.")
        if log and low <= 0:
            self.refuse(f"a log scale from {low:g} on.\nExpected min above 0.")
        if log and step is not None:
            self.refuse("has both log and step.\nLeave one out, or list the choices.")
        if step is not None and not 0 < step <= high - low:
            self.refuse(f"step is {step:g}.\nExpected above 0 and at most max - min, {high - low:g}.")
        if kind == "int":
            for number in (low, high, step or 1.0):
                if not number.is_integer():
                    self.refuse(f"found {number:g}.\nExpected whole numbers.")
            low, high, step = int(low), int(high), None if step is None else int(step)
        if step is not None:
            start, stop, by = (Decimal(str(number)) for number in (low, high, step))
            last = start + by * ((stop - start) // by)  # in decimals, as samplers have it
            high = int(last) if kind == "int" else float(last)
        return {"low": low, "high": high, "log": log, "step": step}

    def _owners(self) -> dict[str, tuple[Any, ...]]:
        """The condition that follows from which of the tried strategies and methods have the parameter."""
        if self.name in OF_ALL:
            return {}
        return self._counts_for(
            [name for name in self.strategies if self.name in STRATEGIES[name].parameters],
            [name for name in self.methods if self.name in METHODS[name].defaults],
        )

    def _counts_for(self, strategies: Sequence[str], methods: Sequence[str]) -> dict[str, tuple[Any, ...]]:
        if not strategies and not methods:
            having = [name for name, one in SEARCHED.items() if self.name in one.parameters]
            having += [name for name, one in METHODS.items() if self.name in one.defaults]
            tried = ", ".join([*self.strategies, *self.methods])
            self.refuse(
                f"counts for nothing that is tried ({tried}).\n"
                + (f"It is a parameter of {', '.join(having)}." if having else "Try another strategy or method.")
            )
        if strategies:
            return {} if len(strategies) == len(self.strategies) else {"strategy": tuple(strategies)}
        return {} if len(methods) == len(self.methods) else {"method": tuple(methods)}

    def _weights(self) -> list[Parameter]:
        """Of named experts, for all personas or for each by itself."""
        self.keys(
            (*RANGE, "experts", "simplex", "per"),
            "{experts: [A, B, C], simplex: true} or {experts: .., min: .., max: ..}",
        )
        experts = self.written.get("experts")
        if not isinstance(experts, list) or len({str(one) for one in experts}) != len(experts) or len(experts) < 2:
            self.refuse(f"experts are {experts!r}.\nExpected a list of two names or more, each once.")
        personas: list[tuple[str, ...]] = [()]
        if "per" in self.written:
            if self.written["per"] != "persona":
                self.refuse(f"per is {self.written['per']!r}.\nExpected persona, or nothing for one set of weights.")
            self._enough_examples()
            personas = [(persona,) for persona in self.validation]
        simplex = self._flag("simplex", not {"min", "max"} & set(self.written))
        if simplex and (wrong := sorted({"min", "max", "log"} & set(self.written))):
            self.refuse(f"weights on the simplex have no {wrong[0]}.\nLeave it out, or say simplex: false.")
        if simplex:
            bounds = self._simplex()
        else:
            bounds = self._range("float", ("experts", "simplex", "per"))
            if bounds["high"] <= 0:
                self.refuse(f"max is {bounds['high']:g}: no weights sum to more than 0.\nExpected max above 0.")
        paths = [("weights", *persona, str(expert)) for persona in personas for expert in experts]
        when = self._owners()
        return [Parameter(".".join(p), "float", **bounds, when=when, path=p, simplex=simplex) for p in paths]

    def _simplex(self) -> dict[str, Any]:
        step = self._number("step") if "step" in self.written else None
        if step is not None and not self.grid:
            self.refuse("weights on the simplex have steps in a grid alone.\nLeave step out, or say sampler: grid.")
        if step is not None and not (0 < step <= 0.5 and math.isclose(round(1 / step) * step, 1.0)):
            self.refuse(f"step is {step:g}.\nExpected a part of 1, such as 0.25 or 0.1.")
        return {"low": SMALLEST, "high": 1.0, "step": step}

    def _enough_examples(self) -> None:
        few = {persona: count for persona, count in self.validation.items() if count < FREE_EXAMPLES}
        if few:
            persona, count = min(few.items(), key=lambda pair: pair[1])
            self.refuse(
                f"free weights of each persona, of whom {len(few)} have fewer than {FREE_EXAMPLES} validation examples"
                f" ({persona}: {count}).\nWeights chosen on so few fit their noise. Leave `per` out: one set for all."
            )

    def _offsets(self) -> list[Parameter]:
        """Logarithms of factors on the scale, by cluster or over the depth of the model."""
        by_cluster = self.name == "scale_by_cluster"
        self.keys(
            ("max", "penalty", "when", *(() if by_cluster else ("groups",))),
            "{max: 0.5, penalty: 1.0}" if by_cluster else "{groups: 3, max: 0.5, penalty: 1.0}",
        )
        most = self._number("max", 0.5)
        if most <= 0 or self.penalty < 0:
            self.refuse(f"max is {most:g}, penalty {self.penalty:g}.\nExpected max above 0, penalty 0 or more.")
        groups = list(self.clusters) if by_cluster else [str(i) for i in range(self._groups())]
        if len(groups) < 2:
            self.refuse(f"there are {len(groups)} clusters.\nExpected two or more; with one, search `scale`.")
        # a row that is everybody's has no cluster; where only ratios of weights count, their size by layer does not
        when = self._counts_for(
            [s for s in self.strategies if s not in EVERYBODY] if by_cluster else [],
            [] if by_cluster else [m for m in self.methods if METHODS[m].degree == 1],
        )
        paths = [("scale_offsets", OFFSETS[self.name], group) for group in groups]
        return [Parameter(".".join(p), "float", -most, most, when=when, path=p) for p in paths]

    def _groups(self) -> int:
        groups = self._number("groups", 3)
        if not groups.is_integer() or groups < 2:
            self.refuse(f"groups is {groups:g}.\nExpected a whole number, 2 or more.")
        return int(groups)

    @property
    def penalty(self) -> float:
        """Of offsets, in points of similarity for a mean square of 1."""
        return self._number("penalty", 1.0)


def refuse(location: str, name: str, text: str) -> NoReturn:
    """Raise ProjectError that names the project file and what in the space is wrong."""
    raise ProjectError(f"{location}: search.space{'.' if name else ''}{name}: {text}")


def as_scalar(choice: Any) -> Any:
    """A choice as samplers take it: a list or a mapping as its JSON text."""
    return json.dumps(choice) if isinstance(choice, list | dict) else choice


def known_names() -> list[str]:
    """What a space may search."""
    owners = [*(one.parameters for one in SEARCHED.values()), *(one.defaults for one in METHODS.values())]
    return [*OF_ALL, *dict.fromkeys(name for owner in owners for name in owner), *OFFSETS]


def _kind(name: str) -> Literal["float", "int", "choice"]:
    """What a parameter is, by its default."""
    owners = [*(one.parameters for one in SEARCHED.values()), *(one.defaults for one in METHODS.values())]
    default = next(owner[name] for owner in (OF_ALL, *owners) if name in owner)
    if isinstance(default, bool) or (isinstance(default, str) and default != TUNED):
        return "choice"
    return "int" if isinstance(default, int) else "float"
