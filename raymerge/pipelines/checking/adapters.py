"""Headers of all adapters: how many can be read, what they are, whether they fit each other and the base."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from raymerge import storage
from raymerge.adapters.catalogue import Catalogue
from raymerge.config import Project
from raymerge.errors import ModelError
from raymerge.evaluation.wording import size
from raymerge.manifest import read_manifest
from raymerge.pipelines.checking.finding import Finding, Section, counted, listed
from raymerge.pipelines.inspection.adapter import Inspected, inspect_adapter
from raymerge.pipelines.inspection.groups import Group, group
from raymerge.pipelines.opening import Opened

if TYPE_CHECKING:
    from torch import nn

    from raymerge.models.base import BaseModel

_READERS = 8  # headers are small reads that wait for a disk or a bucket
_HARMLESS = ("rsLoRA", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "mixed ranks", "merged, with error")
_FORMATS = {"peft": "PEFT", "mlx": "MLX"}


@dataclass(frozen=True)
class Bank:
    """The adapters that are there: those alike in all their shapes are kept once.

    kinds: one of each sort, with the names of all that are like it. nbytes: of the weights' files, by name. unreadable:
    name -> why. unfinished: begun by raymerge and not finished, so that they are made again.
    """

    kinds: tuple[tuple[Inspected, tuple[str, ...]], ...]
    nbytes: Mapping[str, int]
    unreadable: Mapping[str, str]
    unfinished: tuple[str, ...]

    @property
    def readable(self) -> int:
        """How many can be read."""
        return len(self.nbytes)


def read_bank(project: Project, personas: Iterable[str], say: Callable[[str], None]) -> Bank:
    """Headers of the personas' adapters, of the clusters' and of the unified one, as far as they are there."""
    places = {name: project.adapter_location(name) for name in personas}
    shared = [*Catalogue.from_template(project.path(project.cluster_adapters)).locations.items()]
    shared.append(("unified", project.adapter_location("unified")))
    places |= {name: place for name, place in shared if storage.exists(storage.join(place, "adapter_config.json"))}
    kinds: dict[Any, tuple[Inspected, list[str]]] = {}
    nbytes: dict[str, int] = {}
    unreadable: dict[str, str] = {}
    unfinished = []
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda item: inspect_adapter(item[1], item[0], norm=False), places.items())
        for number, one in enumerate(found, 1):
            say(f"adapter {number} of {len(places)}")
            if one.error is not None and _is_ours(one.location):
                unfinished.append(one.name)
            elif one.error is not None:
                unreadable[one.name] = one.reason
            else:
                nbytes[one.name] = one.nbytes or 0
                kinds.setdefault(_sort(one), (replace(one, adapter=None), []))[1].append(one.name)
    return Bank(tuple((one, tuple(names)) for one, names in kinds.values()), nbytes, unreadable, tuple(unfinished))


def _is_ours(location: str) -> bool:
    """Whether raymerge began to write it: then the run that is to come writes it again."""
    from raymerge.adapters import mlx
    from raymerge.manifest import is_unfinished

    return is_unfinished(mlx.folder_of(location))


def _sort(one: Inspected) -> Any:
    """What two adapters must have in common to be of one sort."""
    headers = one.headers or {}
    shapes = frozenset((path, h.shape, h.nominal or h.rank, h.embedding) for path, h in headers.items())
    return one.format, one.base_model, one.alphas, one.dtypes, one.remarks, shapes, frozenset((one.whole or {}).items())


def check_adapters(opened: Opened, bank: Bank, base: BaseModel | None) -> Section:
    """What is to be said of the adapters. base: without weights; None where it is not known."""
    findings = [_overview(opened, bank), *_unreadable(bank), *_shapes(opened, bank), *_bases(opened, bank)]
    findings += list(_remarks(bank))
    if base is not None:
        findings += list(_fit(bank, base.model, opened.project.base_model or ""))
    ranks = _counts(bank, lambda one: "/".join(map(str, one.ranks)))
    facts = {
        "there": bank.readable,
        "missing": len(set(opened.names) - set(opened.adapters)),
        "bytes": sum(bank.nbytes.values()),
        "formats": _counts(bank, lambda one: one.format or "?"),
        "ranks": ranks,
        "base_models": _counts(bank, lambda one: one.base_model or "?"),
        "unreadable": dict(bank.unreadable),
        "unfinished": list(bank.unfinished),
    }
    return Section("adapters", tuple(findings), _lines(bank, ranks), facts)


def _counts(bank: Bank, of: Callable[[Inspected], str]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for one, names in bank.kinds:
        found[of(one)] += len(names)
    return dict(found.most_common())


def _overview(opened: Opened, bank: Bank) -> Finding:
    missing = len(set(opened.names) - set(opened.adapters))
    if not opened.names and not bank.unreadable:
        where = opened.project.path(opened.project.adapters)
        return Finding(
            "bad", f"there is none in {where}", "set `adapters` to where they are, or `personas` to train some"
        )
    if not bank.readable and not bank.unreadable:
        return Finding("ok", f"none is there yet: `raymerge run` trains what {counted(missing, 'persona')} need")
    text = f"{counted(bank.readable, 'adapter')}, {size(sum(bank.nbytes.values()))}"
    if not missing:
        return Finding("ok", text)
    if opened.trainable:
        return Finding("ok", f"{text}; {counted(missing, 'persona')} without one")
    return Finding("warn", f"{text}; {counted(missing, 'persona')} without one, and no examples to train on")


def _lines(bank: Bank, ranks: Mapping[str, int]) -> tuple[str, ...]:
    if not bank.kinds:
        return ()
    forms = _told(_counts(bank, lambda one: _FORMATS.get(one.format or "", "?")))
    modules = _told(_counts(bank, lambda one: str(len(one.headers or {}))))
    dtypes = _told(_counts(bank, lambda one: "/".join(one.dtypes)))
    return (
        f"{forms}; rank {_told(ranks)}; {modules} modules; {dtypes}",
        f"base they name: {_told(_counts(bank, lambda one: one.base_model or 'none'))}",
    )


def _told(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    shown = ", ".join(f"{what} ({count:,})" for what, count in list(counts.items())[:4])
    return shown + (f" and {len(counts) - 4} others" if len(counts) > 4 else "")


def _unreadable(bank: Bank) -> Iterator[Finding]:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, why in bank.unreadable.items():
        by_reason[why].append(name)
    for why, names in sorted(by_reason.items()):
        yield Finding("bad", f"cannot be read: {listed(names)}: {why}", "mend them, or take them out of the folder")
    if bank.unfinished:
        text = f"begun and not finished: {listed(bank.unfinished)}"
        yield Finding("warn", text, "the next run makes them anew")


def _shapes(opened: Opened, bank: Bank) -> Iterator[Finding]:
    groups: list[Group] = group([one for one, _ in bank.kinds])
    members = {one.name: names for one, names in bank.kinds}
    if len(groups) < 2:
        return
    merges = any(recipe.strategy not in ("own", "base", "unified") for recipe in opened.recipes.values())
    parts = [tuple(name for first in one.names for name in members[first]) for one in groups]
    for names, one in zip(parts[1:], groups[1:], strict=True):
        why = next(filter(None, one.apart), "they share no module with the others")
        text = f"{counted(len(names), 'adapter')} of another shape: {listed(names)}: {why}"
        yield Finding("bad" if merges else "warn", text, "they do not merge with the rest: give them another project")


def _bases(opened: Opened, bank: Bank) -> Iterator[Finding]:
    named = {one.base_model for one, _ in bank.kinds if one.base_model}
    expected = opened.project.base_model
    others = sorted(n for n in named if expected and storage.name_of(n).lower() != storage.name_of(expected).lower())
    if others:
        text = f"trained on {listed(others, 3)}, as they say; the project's base_model is {expected}"
        yield Finding("warn", text, "fine if that is one model under two names; `check --model` finds out")
    elif len(named) > 1 and not expected:
        text = f"they name {len(named)} base models: {listed(sorted(named), 3)}"
        yield Finding("warn", text, "merge them only if these are the same")


def _remarks(bank: Bank) -> Iterator[Finding]:
    found: dict[str, list[str]] = defaultdict(list)
    for one, names in bank.kinds:
        for remark in one.remarks:
            found[remark].extend(names)
    for remark, whose in found.items():
        who = "all" if len(whose) == bank.readable > 1 else listed(whose)
        if remark.startswith(_HARMLESS):
            yield Finding("ok", f"{remark}: {who}")
        else:
            yield Finding("warn", f"{remark}: {who}", "`raymerge inspect` says more")


def _fit(bank: Bank, model: nn.Module, base: str) -> Iterator[Finding]:
    from raymerge.models.layers import linear_modules
    from raymerge.models.multilora import check_fits

    linear = linear_modules(model)
    for one, names in bank.kinds:
        try:
            check_fits(one.name, one.headers or {}, linear)
        except ModelError as error:
            why = str(error).splitlines()[0].removeprefix(f"{one.name}: ")
            text = f"{counted(len(names), 'adapter')} do not fit {base}: {listed(names)}: {why}"
            yield Finding("bad", text, "set base_model to the model they were trained on")


def is_there(location: str) -> bool:
    """Whether an adapter lies there that need not be made: a whole one, ours or somebody else's."""
    config = storage.join(location, "adapter_config.json")
    return storage.exists(config) and not _is_ours(location)


def recorded_bytes(location: str) -> int | None:
    """Bytes of the files of an adapter that raymerge wrote, from its manifest."""
    known = read_manifest(location)
    return None if known is None else sum(int(entry["bytes"]) for entry in known["files"].values())
