"""`raymerge fuse`: a few adapters into one, or into several for comparison. No project file, no Ray."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from raymerge import storage
from raymerge.adapters.formats import encode_adapter
from raymerge.errors import RaymergeError
from raymerge.manifest import invalidate, is_complete, read_manifest, write_artefact
from raymerge.pipelines.fusion import report as fusion_report
from raymerge.pipelines.fusion.figures import (
    Contributor,
    Figures,
    Fused,
    Measured,
    cautions,
    measure,
    norm_ratio,
    remarks,
    span,
)
from raymerge.pipelines.fusion.folders import FUSE, SWEEP, begin_sweep, check_folders, clear, finished, replace_report
from raymerge.pipelines.fusion.inputs import Loaded, key_of, open_inputs, read_inputs
from raymerge.pipelines.fusion.options import understand
from raymerge.pipelines.fusion.request import Fusion, Meant, Request, command, merges_of, shown

if TYPE_CHECKING:
    from rich.console import Console

    from raymerge.adapters import LoraAdapter

TABLE = "sweep.json"


def fuse(request: Request) -> int:
    """Fuse adapters into the folder `out`, or each of a sweep into a folder below it, and print what came of it.

    What is there already is not made again. Raises MergeError for what cannot be merged, and StorageError if the
    folder holds anything else. Returns the exit status: 1 if some of a sweep failed.
    """
    from rich.console import Console

    meant = understand(request)
    loaded = open_inputs(meant)
    keys = [key_of(meant, loaded, fusion) for fusion in meant.fusions]
    there = [finished(fusion.folder, key) for fusion, key in zip(meant.fusions, keys, strict=True)]
    check_folders(meant, there, loaded)
    if request.explain or None in there:
        loaded = read_inputs(meant, loaded)
    console = Console()
    explained = _explanations(meant, loaded)
    found, failed = _make(meant, loaded, keys, there, explained, console)
    if request.sweep is not None:
        _write_sweep(meant, found, failed, keys)
    _show(meant, found, failed, explained, console)
    console.print()
    already = sum(one is not None for one in there)
    console.print(_ending(meant, len(found), already), soft_wrap=True, highlight=False, markup=False)
    return 1 if failed else 0


def _show(
    meant: Meant, found: Sequence[Fused], failed: Mapping[str, str], explained: Mapping[str, str], console: Console
) -> None:
    from raymerge.pipelines.fusion import table as fusion_table

    console.print(fusion_table.one(found[0]) if meant.request.sweep is None else fusion_table.sweep(found))
    for name, why in failed.items():
        console.print(f"failed: {name}: {why}", style="red", highlight=False, markup=False)
    for name, text in explained.items():
        title = "Elsewhere" if meant.request.sweep is None else f"{name} elsewhere"
        lines = fusion_report.wrapped(text, min(console.width, 100))
        console.print(f"\n{title}:\n{lines}", highlight=False, markup=False)


def _make(
    meant: Meant,
    loaded: Loaded,
    keys: Sequence[str],
    there: Sequence[Fused | None],
    explained: Mapping[str, str],
    console: Console,
) -> tuple[list[Fused], dict[str, str]]:
    """What is not there yet is made and written. Returns all of it as its manifests tell, and why one of a sweep could
    not be made; raises that where none could."""
    if meant.request.sweep is not None and None in there:
        begin_sweep(storage.resolve(os.getcwd(), meant.request.out))
    measured: Measured | None = None
    found: list[Fused] = []
    failed: dict[str, str] = {}
    for number, (fusion, key, fused) in enumerate(zip(meant.fusions, keys, there, strict=True), 1):
        explanation = explained.get(fusion.name)
        try:
            if fused is None:
                with console.status(f"{fusion.name}: {fusion.method.name} of {len(loaded.experts)} adapters"):
                    fused, measured = _write(meant, loaded, fusion, measured, explanation, key)
            elif explanation is not None:
                replace_report(fusion.folder, _report(meant, fusion, fused, explanation))
            found.append(fused)
        except RaymergeError as error:
            if number == len(meant.fusions) and not found:
                raise
            failed[fusion.name] = str(error).splitlines()[0]
    return found, failed


def _write(
    meant: Meant, loaded: Loaded, fusion: Fusion, known: Measured | None, explanation: str | None, key: str
) -> tuple[Fused, Measured]:
    from raymerge.merging.merge import merge

    request = meant.request
    invalidate(fusion.folder, FUSE)  # this may fail, and what is there is no longer what is wanted
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = merge(
            loaded.experts, fusion.weights, method=fusion.method.name, dialect=request.dialect, rank=meant.rank,
            scale=meant.scale, anchor=loaded.anchor, base=loaded.base, dtype=request.dtype, name=fusion.name,
            **fusion.parameters,
        )  # fmt: skip
    files = encode_adapter(merged, request.format)
    measured = measure(loaded.experts, merged, loaded.anchor, known)
    said = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    fused = _described(meant, loaded, fusion, merged, measured, said, sum(len(data) for data in files.values()))
    files[fusion_report.NAME] = _report(meant, fusion, fused, explanation)
    clear(fusion.folder)
    write_artefact(fusion.folder, files, fused.to_json(), key, FUSE)
    return Fused.from_json(read_manifest(fusion.folder) or {}), measured


def _report(meant: Meant, fusion: Fusion, fused: Fused, explanation: str | None) -> bytes:
    return fusion_report.report(fused, shown(meant, fusion), explanation).encode()


def _described(
    meant: Meant,
    loaded: Loaded,
    fusion: Fusion,
    merged: LoraAdapter,
    measured: Measured,
    said: Sequence[str],
    size: int,
) -> Fused:
    """said: warnings of the merge. size: of its files in bytes."""
    from raymerge.merging.merge import WHOLE

    ranks = {path: header.rank for path, header in merged.headers.items()}
    figures = Figures(
        norm=measured.norm,
        ratio=norm_ratio(measured.norm, fusion.weights, measured.squares),
        error=merged.errors.get(WHOLE, 0.0),
        rank=span(list(ranks.values())),
        size=size,
    )
    order = sorted(range(len(loaded.experts)), key=lambda i: loaded.experts[i].name)
    merges = {**merges_of(meant, fusion), "dtype": str(merged.dtype).removeprefix("torch.")}
    starts = [] if loaded.anchor else [expert.started_from for expert in loaded.experts]
    names = [loaded.experts[i].name for i in order]
    pairs = measured.similarities
    return Fused(
        name=fusion.name,
        experts=tuple(_contributor(meant, loaded, fusion, measured, i) for i in order),
        merges=merges,
        anchor=loaded.anchor_digest,
        base=loaded.base_digest,
        figures=figures,
        errors={path: error for path, error in sorted(merged.errors.items()) if path != WHOLE},
        ranks=ranks,
        similarities=None if pairs is None else [[pairs[i][j] for j in order] for i in order],
        warnings=(*dict.fromkeys(said), *cautions(figures, merges, fusion.weights, fusion.method.degree)),
        notes=(*merged.notes, *remarks(fusion.weights, fusion.method, names, starts)),
        command=command(meant, fusion),
    )


def _contributor(meant: Meant, loaded: Loaded, fusion: Fusion, measured: Measured, index: int) -> Contributor:
    expert = loaded.experts[index]
    return Contributor(
        name=expert.name,
        location=meant.sources[index].written,
        digest=loaded.digests[index],
        weight=fusion.weights[index],
        base_model=expert.base_model,
        rank=span([header.nominal or header.rank for header in expert.headers.values()]),
        norm=max(measured.squares[index], 0.0) ** 0.5,
        cosine=measured.cosines[index],
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
        except RaymergeError as error:
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
        TABLE: storage.encode_json([fused.to_json() for fused in found]),
    }
    write_artefact(out, files, {"sweep": names, "failed": dict(failed)}, key, SWEEP)


def _ending(meant: Meant, count: int, there: int) -> str:
    """Where the results lie, and whether they did before. count: of them; there: how many were."""
    out = meant.request.out
    if meant.request.sweep is None:
        report = storage.join(out, fusion_report.NAME)
        return f"{out}: this fuse is there already. Report: {report}" if there else f"Wrote {out}. Report: {report}"
    already = f", {there} of them there already" if there else ""
    return f"{count} adapters below {out}{already}. Report: {storage.join(out, fusion_report.SWEEP_NAME)}"
