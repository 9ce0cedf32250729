"""`raymerge fuse`: a few adapters into one, or into several for comparison. No project file, no Ray."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raymerge import storage
from raymerge.adapters.formats import encode_adapter, open_adapter, read_adapter, weight_files
from raymerge.errors import AdapterError, MergeError, ModelError
from raymerge.manifest import is_complete, is_unfinished, read_manifest, write_artefact
from raymerge.merging.rank import parse_rank
from raymerge.pipelines import fusion_report
from raymerge.pipelines.fuse_folders import check_folders, clear
from raymerge.pipelines.fuse_options import understand
from raymerge.pipelines.fuse_request import Fusion, Meant, Request, command, merges_of, shown
from raymerge.pipelines.fusion_figures import (
    Contributor,
    Figures,
    Fused,
    Products,
    cautions,
    compare,
    measure,
    norm_ratio,
    remarks,
    span,
)

if TYPE_CHECKING:
    from rich.console import Console

    from raymerge.adapters import LoraAdapter

SWEEP = "sweep.json"
HELD = 2 * 2**30  # bytes of adapters up to which they are read once and kept


@dataclass(frozen=True)
class Loaded:
    """The adapters of a request, in the order given, the anchor, the base's weights, and their digests."""

    experts: tuple[LoraAdapter, ...]
    anchor: LoraAdapter | None
    base: Any
    digests: tuple[str, ...]
    anchor_digest: str | None
    base_state: Any


def fuse(request: Request) -> int:
    """Fuse adapters into the folder `out`, or each of a sweep into a folder below it, and print what came of it.

    What is there already is not made again. Raises MergeError for what cannot be merged, and StorageError if the
    folder holds anything else. Returns the exit status: 1 if some of a sweep failed.
    """
    from rich.console import Console

    meant = understand(request)
    loaded = _load(meant)
    keys = [_key(meant, loaded, fusion) for fusion in meant.fusions]
    done = [is_complete(fusion.folder, key) for fusion, key in zip(meant.fusions, keys, strict=True)]
    check_folders(meant, done, loaded.digests)
    console = Console()
    explained = _explanations(meant, loaded)
    found, failed = _make(meant, loaded, keys, done, explained, console)
    if request.sweep is not None:
        _write_sweep(meant, found, failed, keys)
    _show(meant, found, failed, explained, console)
    there = sum(done)
    console.print()
    console.print(_ending(meant, len(found), there), soft_wrap=True, highlight=False, markup=False)
    return 1 if failed else 0


def _show(
    meant: Meant, found: Sequence[Fused], failed: Mapping[str, str], explained: Mapping[str, str], console: Console
) -> None:
    from raymerge.pipelines import fusion_table

    console.print(fusion_table.one(found[0]) if meant.request.sweep is None else fusion_table.sweep(found))
    for name, why in failed.items():
        console.print(f"failed: {name}: {why}", style="red", highlight=False, markup=False)
    for name, text in explained.items():
        title = "Elsewhere" if meant.request.sweep is None else f"{name} elsewhere"
        lines = fusion_report.wrapped(text, min(console.width, 100))
        console.print(f"\n{title}:\n{lines}", highlight=False, markup=False)


def _load(meant: Meant) -> Loaded:
    """Open all adapters, so that what is wrong with one is said before anything is made. Small ones are read once."""
    request = meant.request
    base = None
    more: dict[str, Any] = {}
    if request.base is not None:
        from raymerge.adapters.base_weights import BaseWeights

        base = BaseWeights(storage.resolve(os.getcwd(), request.base))
        more["base"] = base
    places = [(source.location, source.name) for source in meant.sources]
    anchor = None if request.anchor is None else storage.resolve(os.getcwd(), request.anchor)
    if anchor is not None:
        places.append((anchor, f"anchor {request.anchor}"))
    if request.allow_pickle:
        adapters = [read_adapter(location, name, allow_pickle=True, **more) for location, name in places]
    else:
        adapters = [open_adapter(location, name, **more) for location, name in places]
        if sum(adapter.nbytes for adapter in adapters) <= HELD:
            adapters = [read_adapter(location, name, **more) for location, name in places]
    _check_together(meant, adapters[: len(meant.sources)], adapters[-1] if anchor is not None else None)
    digests = [_digest(location, name) for location, name in places]
    count = len(meant.sources)
    return Loaded(
        tuple(adapters[:count]),
        adapters[count] if anchor is not None else None,
        base,
        tuple(digests[:count]),
        digests[count] if anchor is not None else None,
        None if request.base is None else _state(storage.resolve(os.getcwd(), request.base)),
    )


def _check_together(meant: Meant, experts: Sequence[LoraAdapter], anchor: LoraAdapter | None) -> None:
    """Raise MergeError now, and for all of a sweep, if these adapters cannot be merged by any method."""
    from raymerge.merging.inputs import check_inputs

    for fusion in meant.fusions:
        check_inputs(experts, fusion.weights, anchor, parse_rank(meant.rank))


def _digest(location: str, name: str) -> str:
    """Content digest of an adapter in any form."""
    files = weight_files(location)
    if is_unfinished(storage.parent(files[0])):
        raise AdapterError(f"{name}: this adapter was begun and not finished.\nWhat makes it failed or was killed.")
    return storage.digest_value([[storage.name_of(file), storage.digest(file)] for file in files])


def _state(location: str) -> Any:
    """A base model's files by size and time: they are too large to be digested for every fuse."""
    if not storage.exists(location):
        raise ModelError(f"{location}: there is no base model.\nExpected a folder with safetensors weights.")
    return [location, [[file.path, file.size, file.mtime] for file in storage.list_files(location)]]


def _key(meant: Meant, loaded: Loaded, fusion: Fusion) -> str:
    names = [source.name for source in meant.sources]
    experts = sorted([list(entry) for entry in zip(names, loaded.digests, fusion.weights, strict=True)])
    merges = {**merges_of(meant, fusion), "anchor": loaded.anchor_digest}
    return storage.digest_value({"name": fusion.name, "experts": experts, "merges": merges, "base": loaded.base_state})


def _make(
    meant: Meant,
    loaded: Loaded,
    keys: Sequence[str],
    done: Sequence[bool],
    explained: Mapping[str, str],
    console: Console,
) -> tuple[list[Fused], dict[str, str]]:
    """What is not there yet is made and written. Returns all of it as its manifests tell, and why one of a sweep could
    not be made; raises that where none could."""
    products = None if all(done) else measure(loaded.experts, loaded.anchor)
    found: list[Fused] = []
    failed: dict[str, str] = {}
    for number, (fusion, key) in enumerate(zip(meant.fusions, keys, strict=True), 1):
        try:
            if products is not None and not done[number - 1]:
                with console.status(f"{fusion.name}: {fusion.method.name} of {len(loaded.experts)} adapters"):
                    _write(meant, loaded, fusion, products, explained.get(fusion.name), key)
            found.append(Fused.from_json(read_manifest(fusion.folder) or {}))
        except MergeError as error:
            if number == len(meant.fusions) and not found:
                raise
            failed[fusion.name] = str(error).splitlines()[0]
    return found, failed


def _write(meant: Meant, loaded: Loaded, fusion: Fusion, products: Products, explanation: str | None, key: str) -> None:
    from raymerge.merging.merge import WHOLE, merge

    request = meant.request
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = merge(
            loaded.experts, fusion.weights, method=fusion.method.name, dialect=request.dialect, rank=meant.rank,
            scale=meant.scale, anchor=loaded.anchor, base=loaded.base, dtype=request.dtype, name=fusion.name,
            **fusion.parameters,
        )  # fmt: skip
    files = encode_adapter(merged, request.format)
    norm, cosines = compare(loaded.experts, products, merged, loaded.anchor)
    ranks = {path: header.rank for path, header in merged.headers.items()}
    figures = Figures(
        norm=norm,
        ratio=norm_ratio(norm, fusion.weights, products.squares),
        error=merged.errors.get(WHOLE, 0.0),
        rank=span(list(ranks.values())),
        size=sum(len(data) for data in files.values()),
    )
    order = sorted(range(len(loaded.experts)), key=lambda i: loaded.experts[i].name)
    merges = {**merges_of(meant, fusion), "dtype": str(merged.dtype).removeprefix("torch.")}
    starts = [] if loaded.anchor else [expert.started_from for expert in loaded.experts]
    names = [loaded.experts[i].name for i in order]
    fused = Fused(
        name=fusion.name,
        experts=tuple(_contributor(meant, loaded, fusion, products, cosines, i) for i in order),
        merges=merges,
        anchor=loaded.anchor_digest,
        figures=figures,
        errors={path: error for path, error in sorted(merged.errors.items()) if path != WHOLE},
        ranks=ranks,
        similarities=None if products.cosines is None else [[products.cosines[i][j] for j in order] for i in order],
        warnings=(
            *dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, UserWarning)),
            *cautions(figures, merges, fusion.weights, fusion.method.degree),
        ),
        notes=(*merged.notes, *remarks(fusion.weights, fusion.method, names, starts)),
        command=command(meant, fusion),
    )
    files[fusion_report.NAME] = fusion_report.report(fused, shown(meant, fusion), explanation).encode()
    clear(fusion.folder)
    write_artefact(fusion.folder, files, fused.to_json(), key)


def _contributor(
    meant: Meant, loaded: Loaded, fusion: Fusion, products: Products, cosines: Sequence[float | None], index: int
) -> Contributor:
    expert = loaded.experts[index]
    return Contributor(
        name=expert.name,
        location=meant.sources[index].written,
        digest=loaded.digests[index],
        weight=fusion.weights[index],
        base_model=expert.base_model,
        rank=span([header.nominal or header.rank for header in expert.headers.values()]),
        norm=max(products.squares[index], 0.0) ** 0.5,
        cosine=cosines[index],
    )


def _explanations(meant: Meant, loaded: Loaded) -> dict[str, str]:
    """What PEFT and mergekit would have computed, by the fusions' names; nothing unless asked for."""
    if not meant.request.explain:
        return {}
    from raymerge.merging.dialects.explain import explain

    found = {}
    for fusion in meant.fusions:
        try:
            said = explain(loaded.experts, fusion.weights, method=fusion.method.name, **fusion.parameters)
            found[fusion.name] = str(said) + (
                "\nCompared without the anchor, which they lack." if loaded.anchor else ""
            )
        except MergeError as error:
            found[fusion.name] = str(error).splitlines()[0]
    return found


def _write_sweep(meant: Meant, found: Sequence[Fused], failed: Mapping[str, str], keys: Sequence[str]) -> None:
    out = storage.resolve(os.getcwd(), meant.request.out)
    names = [fused.name for fused in found]
    key = storage.digest_value([names, dict(failed), list(keys)])
    if is_complete(out, key):
        return
    title = meant.request.name or storage.name_of(out)
    files = {
        fusion_report.SWEEP_NAME: fusion_report.sweep_report(title, found, failed).encode(),
        SWEEP: storage.encode_json([fused.to_json() for fused in found]),
    }
    write_artefact(out, files, {"sweep": names, "failed": dict(failed)}, key)


def _ending(meant: Meant, count: int, there: int) -> str:
    """Where the results lie, and whether they did before. count: of them; there: how many were."""
    out = meant.request.out
    if meant.request.sweep is None:
        report = storage.join(out, fusion_report.NAME)
        return f"{out}: this fuse is there already. Report: {report}" if there else f"Wrote {out}. Report: {report}"
    already = f", {there} of them there already" if there else ""
    return f"{count} adapters below {out}{already}. Report: {storage.join(out, fusion_report.SWEEP_NAME)}"
