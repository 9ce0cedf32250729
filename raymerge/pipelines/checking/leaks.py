"""Test and validation answers that stand in training rows: the same pair of prompt and answer, or the answer alone.

Texts are compared without case and with white space made one, as numbers: a few sorts of as many integers as there are
rows, whatever the number of personas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymerge.evaluation.wording import cut, percent, short
from raymerge.personas import Personas
from raymerge.pipelines.checking.finding import Finding, Section, counted

Codes = NDArray[np.int64]
SCOPES = ("own", "neighbour", "other")  # whose training rows: the persona's, its cluster's others, anybody else's
_SHOWN = 3
_COMMON = 3  # personas that a question is put to, from which on it counts as put to everybody
_FAR_MORE, _MANY = 3.0, 0.05  # times what chance gives, and share of the rows: more than both is worth a look


@dataclass(frozen=True)
class Leak:
    """A row of test or validation, and a training row that has its answer."""

    persona: str
    split: str
    prompt: str
    response: str
    other: str
    other_prompt: str


@dataclass(frozen=True)
class Scope:
    """What is found in the training rows of one scope, of all test and validation rows.

    pairs: rows whose very prompt and answer stand there. agreed: those among them whose question is put to many, who
    answer it differently, so that equal answers are agreement and no copy. answers: rows whose answer stands there
    below another prompt; expected: how many would by chance, since answers are common. examples: of copied pairs, or
    else of answers.
    """

    pairs: int
    agreed: int
    answers: int
    expected: float
    examples: tuple[Leak, ...]

    @property
    def copied(self) -> int:
        """Pairs that agreement does not explain."""
        return self.pairs - self.agreed


@dataclass(frozen=True)
class Leaks:
    """rows: of test and validation. scopes: by name; no `neighbour` where clusters are not known."""

    rows: int
    scopes: Mapping[str, Scope]


@dataclass(frozen=True, eq=False)
class _Rows:
    """All rows as numbers. cluster: -1 where it is not known."""

    persona: Codes
    cluster: Codes
    prompt: Codes
    answer: Codes
    pair: Codes
    training: NDArray[np.bool_]


def find_leaks(personas: Personas, clusters: Mapping[str, str]) -> Leaks:
    """Look for the answers of test and validation rows in training rows. clusters: persona -> label, if known."""
    rows = _numbered(personas, clusters)
    asked = np.flatnonzero(~rows.training)
    names = [scope for scope in SCOPES if scope != "neighbour" or (rows.cluster >= 0).any()]
    return Leaks(len(asked), {scope: _scope(personas, rows, asked, scope) for scope in names})


def _numbered(personas: Personas, clusters: Mapping[str, str]) -> _Rows:
    table = personas.table
    persona, names = _codes(table["persona"])
    labels = {label: number for number, label in enumerate(sorted(set(clusters.values())))}
    cluster = np.array([labels.get(clusters.get(name, ""), -1) for name in names], dtype=np.int64)
    prompt, answer = (_codes(_normalised(table[column]))[0] for column in ("prompt", "response"))
    training = np.asarray(table["split"].to_numpy() == "train")
    pair = prompt * (int(answer.max(initial=0)) + 1) + answer
    return _Rows(persona, cluster[persona], prompt, answer, pair, training)


def _normalised(column: Any) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array([" ".join(t.split()).casefold() for t in column.to_pylist()], pa.large_string())])


def _codes(column: Any) -> tuple[Codes, list[str]]:
    encoded = column.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def _scope(personas: Personas, rows: _Rows, asked: Codes, scope: str) -> Scope:
    pairs = _stands(rows, rows.pair, asked, scope)
    agreed = pairs & _common(rows)[rows.prompt[asked]] if scope != "own" else np.zeros_like(pairs)
    answers = _stands(rows, rows.answer, asked, scope) & ~pairs
    expected = float(_chance(rows, asked, scope)[~pairs].sum())
    shown = pairs & ~agreed if (pairs & ~agreed).any() else answers
    key = rows.pair if shown is not answers else rows.answer
    examples = tuple(_leak(personas, rows, int(row), key, scope) for row in asked[shown][:_SHOWN])
    return Scope(int(pairs.sum()), int(agreed.sum()), int(answers.sum()), expected, examples)


def _stands(rows: _Rows, key: Codes, asked: Codes, scope: str) -> NDArray[np.bool_]:
    """Whether what `key` numbers stands in a training row of the scope, for each of the rows asked."""
    trained = np.flatnonzero(rows.training)
    if scope == "own":
        return np.isin(_joined(key, rows.persona)[asked], _joined(key, rows.persona)[trained])
    where = rows.cluster if scope == "neighbour" else np.zeros_like(key)
    place = _joined(key, where)
    everybody = _counts(place, trained, asked)
    own = _counts(_joined(place, rows.persona), trained, asked)
    return np.asarray((everybody > own) & (where[asked] >= 0))


def _joined(key: Codes, part: Codes) -> Codes:
    """One number for each pair of numbers. Made dense first, so that products of three do not overflow."""
    dense = np.unique(key, return_inverse=True)[1].astype(np.int64)
    return dense * (int(part.max(initial=0)) + 2) + part + 1


def _counts(key: Codes, among: Codes, asked: Codes) -> Codes:
    """How many of the rows `among` have the key of each row asked."""
    values, times = np.unique(key[among], return_counts=True)
    if not len(values):
        return np.zeros(len(asked), np.int64)
    at = np.minimum(np.searchsorted(values, key[asked]), len(values) - 1)
    return np.where(values[at] == key[asked], times[at], 0)


def _common(rows: _Rows) -> NDArray[np.bool_]:
    """For each prompt, whether many personas are asked it and differ in their answers: equal ones are agreement."""
    count = int(rows.prompt.max(initial=0)) + 1
    people = np.unique(np.stack([rows.prompt, rows.persona]), axis=1)[0]
    answers = np.unique(np.stack([rows.prompt, rows.answer]), axis=1)[0]
    return np.asarray((np.bincount(people, minlength=count) >= _COMMON) & (np.bincount(answers, minlength=count) >= 2))


def _chance(rows: _Rows, asked: Codes, scope: str) -> NDArray[np.float64]:
    """Chance that each answer stands in so many training rows drawn from others: 1 - (1 - its share there) ^ rows.

    Its share is that among the test and validation rows outside the scope, so that what leaks does not explain itself.
    """
    inside = rows.persona if scope != "neighbour" else rows.cluster
    everywhere = _counts(rows.answer, asked, asked)
    here = _counts(_joined(rows.answer, inside), asked, asked)
    outside = len(asked) - _counts(inside, asked, asked)
    share = np.divide(everywhere - here, outside, out=np.zeros(len(asked)), where=outside > 0)
    trained = np.flatnonzero(rows.training)
    own = _counts(rows.persona, trained, asked)
    count = {"own": own, "neighbour": _counts(rows.cluster, trained, asked) - own, "other": len(trained) - own}[scope]
    known = rows.cluster[asked] >= 0 if scope == "neighbour" else np.ones(len(asked), np.bool_)
    return np.asarray((1 - (1 - share) ** count) * known)


def _leak(personas: Personas, rows: _Rows, row: int, key: Codes, scope: str) -> Leak:
    same = rows.training & (key == key[row])
    if scope == "own":
        same &= rows.persona == rows.persona[row]
    else:
        same &= rows.persona != rows.persona[row]
        same &= (rows.cluster == rows.cluster[row]) | (scope != "neighbour")
    here, there = (personas.table.slice(int(i), 1).to_pylist()[0] for i in (row, np.flatnonzero(same)[0]))
    return Leak(here["persona"], here["split"], here["prompt"], here["response"], there["persona"], there["prompt"])


_WHOSE = {"own": "the persona's own training", "neighbour": "its cluster's training", "other": "others' training"}
_OUT = "take them out of training"


def check_leaks(personas: Personas, clusters: Mapping[str, str]) -> Section:
    """What is to be said of leaks. clusters: as of find_leaks."""
    found = find_leaks(personas, clusters)
    if not found.rows:
        return Section("leaks", (Finding("ok", "there are no test or validation rows to look for"),))
    by_scope = {name: _findings(name, scope, found.rows) for name, scope in found.scopes.items()}
    findings = [finding for own in by_scope.values() for finding in own]
    if not any(scope.copied for scope in found.scopes.values()):
        first = f"of {found.rows:,} test and validation rows none is copied in training"
        findings.insert(0, Finding("ok", first))
    shown = [name for name, own in by_scope.items() if any(finding.sign != "ok" for finding in own)]
    lines = dict.fromkeys(_line(leak) for name in shown for leak in found.scopes[name].examples)
    return Section("leaks", tuple(findings), tuple(lines), {"rows": found.rows, "scopes": _facts(found)})


def _findings(name: str, scope: Scope, rows: int) -> list[Finding]:
    found = []
    if scope.copied:
        share = percent(scope.copied / rows) if scope.copied / rows >= 0.005 else "below 1 %"
        text = f"{counted(scope.copied, 'row')} ({share}), prompt and answer, also in {_WHOSE[name]}"
        found.append(Finding("bad", text, _OUT if name == "own" else f"{_OUT}, or put all copies into one split"))
    if scope.agreed:
        text = f"{counted(scope.agreed, 'row')} also in {_WHOSE[name]}: people who answer a common question alike"
        found.append(Finding("ok", text))
    if scope.answers or scope.expected >= 0.5:
        text = f"{counted(scope.answers, 'answer')} below other prompts in {_WHOSE[name]}"
        text += f" ({scope.expected:,.0f} expected by chance)"
        many = name == "own" and scope.answers > max(_FAR_MORE * scope.expected, _MANY * rows)
        todo = "look at them: rows may be cut from one text, or the persona repeats itself" if many else None
        found.append(Finding("warn" if many else "ok", text, todo))
    return found


def _line(leak: Leak) -> str:
    who = "" if leak.persona == leak.other else f" and {short(leak.other, 20)}"
    return f"{short(leak.persona, 20)} ({leak.split}){who}: {cut(leak.prompt, 40)!r} -> {cut(leak.response, 40)!r}"


def _facts(found: Leaks) -> dict[str, Any]:
    return {
        name: {
            "pairs": scope.pairs,
            "copied": scope.copied,
            "agreed": scope.agreed,
            "answers": scope.answers,
            "answers_expected": round(scope.expected, 1),
            "share": scope.copied / found.rows,
            "examples": [leak.__dict__ for leak in scope.examples],
        }
        for name, scope in found.scopes.items()
    }
