"""One adapter as `raymerge inspect` shows it: what it is, how strong it is, and what is unusual about it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raymerge import storage
from raymerge.adapters import formats, mlx_config, peft_config
from raymerge.errors import RaymergeError

if TYPE_CHECKING:
    from raymerge.adapters.adapter import LoraAdapter, LoraModule, ModuleHeader
    from raymerge.adapters.base_weights import BaseWeights
    from raymerge.adapters.mlx_config import MlxSettings
    from raymerge.adapters.peft_config import LoraSettings

_SHORT = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Inspected:
    """An adapter, or why it cannot be read.

    ranks, alphas: those that its modules have, sorted; alpha is scaling times rank where MLX names a scale. headers: by
    path of the module. whole: shapes of the tensors that replace the base's, by name. nbytes: of the weights' file.
    norm: of the delta, Frobenius over all modules; None where it was not asked for or the base is missing. remarks:
    what is unusual. error: the whole message. adapter: opened, None where its deltas cannot be had.
    """

    name: str
    location: str
    format: str | None = None
    base_model: str | None = None
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    headers: Mapping[str, ModuleHeader] | None = None
    whole: Mapping[str, tuple[int, ...]] | None = None
    dtypes: tuple[str, ...] = ()
    nbytes: int | None = None
    norm: float | None = None
    remarks: tuple[str, ...] = ()
    error: str | None = None
    adapter: LoraAdapter | None = None

    @property
    def reason(self) -> str:
        """The first line of its error, without its own name."""
        return (self.error or "").partition("\n")[0].removeprefix(f"{self.name}: ")

    def to_json(self) -> dict[str, Any]:
        """All but the weights."""
        location = self.location.encode(errors="backslashreplace").decode()  # its bytes may be no UTF-8
        said: dict[str, Any] = {"name": self.name, "location": location, "format": self.format}
        if self.error is not None:
            return {**said, "error": self.error}
        return {
            **said,
            "base_model": self.base_model,
            "ranks": list(self.ranks),
            "alphas": list(self.alphas),
            "modules": {
                path: {"rank": header.nominal or header.rank, "shape": list(header.shape)}
                for path, header in (self.headers or {}).items()
            },
            "whole_tensors": {name: list(shape) for name, shape in (self.whole or {}).items()},
            "dtypes": list(self.dtypes),
            "bytes": self.nbytes,
            "norm": self.norm,
            "unusual": list(self.remarks),
        }


def inspect_adapter(
    location: str, name: str, *, base: BaseWeights | None = None, allow_pickle: bool = False, norm: bool = True
) -> Inspected:
    """Read an adapter's headers and, for its norm, its weights. What is wrong with it is told, not raised."""
    form: str | None = None
    try:
        formats.check_finished(location, name)
        form = formats.format_of(location, name)
        weights, config = formats.weight_files(location)
        pickled = weights.endswith(".bin") and allow_pickle
        settings = _settings(storage.read_json(config), form, name)
        adapter: LoraAdapter | None = None
        if settings.dora and base is None and not pickled:
            headers, whole, dtypes = _unopened(location, name)
        else:
            adapter = _opened(location, name, base, pickled)
            headers, whole, dtypes = adapter.headers, adapter.whole_shapes, _dtypes(adapter.headers)
        value, zero = _measured(adapter) if norm and adapter is not None else (None, ())
        return Inspected(
            name,
            location,
            form,
            settings.base_model,
            tuple(sorted({header.nominal or header.rank for header in headers.values()})),
            _alphas(settings, headers),
            headers,
            whole,
            dtypes,
            storage.file_info(weights).size,
            value,
            (*_remarks(settings, headers, whole, adapter, pickled), *_zeros(zero, len(headers))),
            adapter=adapter,
        )
    except RaymergeError as error:
        return Inspected(name, location, form, error=str(error))


def with_weights_read(one: Inspected) -> Inspected:
    """The same adapter, or, if its weights cannot be read, why. They are read one module after the other."""
    if one.adapter is None:
        return one
    try:
        for path in one.adapter.headers:
            one.adapter.modules[path]
    except RaymergeError as error:
        return Inspected(one.name, one.location, one.format, error=str(error))
    return one


def _settings(config: Any, form: str, name: str) -> LoraSettings | MlxSettings:
    return mlx_config.check_config(config, name) if form == "mlx" else peft_config.check_config(config, name)


def _opened(location: str, name: str, base: BaseWeights | None, pickled: bool) -> LoraAdapter:
    if pickled:
        return formats.read_adapter(location, name, allow_pickle=True, base=base)
    return formats.open_adapter(location, name, base=base)


def _unopened(
    location: str, name: str
) -> tuple[Mapping[str, ModuleHeader], Mapping[str, tuple[int, ...]], tuple[str, ...]]:
    """What the headers tell of a DoRA, whose deltas need the base."""
    from raymerge.adapters.mlx import MlxHeader
    from raymerge.adapters.stored import StoredPeftModules
    from raymerge.adapters.stored_mlx import StoredMlxModules
    from raymerge.adapters.tensors import FLOATS

    header = formats.read_header(location, name)
    dtypes = tuple(sorted({_SHORT[FLOATS[code]] for code, _ in header.tensors.values()}))
    if isinstance(header, MlxHeader):
        return StoredMlxModules(header, None).headers, {}, dtypes
    whole = {parameter: header.tensors[key][1] for parameter, key in header.whole.items()}
    return StoredPeftModules(header, lambda names: [], {}, None, name).headers, whole, dtypes


def _dtypes(headers: Mapping[str, ModuleHeader]) -> tuple[str, ...]:
    names = {str(header.dtype).removeprefix("torch.") for header in headers.values()}
    return tuple(sorted(_SHORT.get(name, name) for name in names))


def _alphas(settings: LoraSettings | MlxSettings, headers: Mapping[str, ModuleHeader]) -> tuple[float, ...]:
    if settings.dora:  # its deltas are dense and have no scaling of their own
        return (float(f"{_scaling(settings):.6g}"),)
    stabilised = getattr(settings, "use_rslora", False)
    found = {h.scaling * (math.sqrt(h.rank) if stabilised else h.rank) for h in headers.values()}
    return tuple(sorted({float(f"{alpha:.6g}") for alpha in found}))


def _scaling(settings: LoraSettings | MlxSettings) -> float:
    return settings.alpha if isinstance(settings, peft_config.LoraSettings) else settings.scale * settings.rank


def _measured(adapter: LoraAdapter) -> tuple[float, tuple[str, ...]]:
    """The norm of the delta, and the modules whose delta is zero. Reads every weight, so that NaN is found."""
    total, zero = 0.0, []
    for path in adapter.headers:
        squared = _squared(adapter.modules[path])
        total += squared
        if squared == 0.0:
            zero.append(path)
    for parameter in adapter.whole:
        adapter.whole[parameter]
    return math.sqrt(total), tuple(zero)


def _squared(module: LoraModule) -> float:
    from raymerge.merging.gram import squared_norm_of

    own = squared_norm_of(module)
    return own if module.bias is None else own + module.scaling**2 * float(module.bias.double().square().sum())


def _zeros(zero: Sequence[str], count: int) -> tuple[str, ...]:
    if not zero:
        return ()
    return ("zero delta: untrained",) if len(zero) == count else (f"zero delta in {len(zero)} of {count} modules",)


def _remarks(
    settings: LoraSettings | MlxSettings,
    headers: Mapping[str, ModuleHeader],
    whole: Mapping[str, tuple[int, ...]],
    adapter: LoraAdapter | None,
    pickled: bool,
) -> tuple[str, ...]:
    found = []
    if settings.dora:
        found.append("DoRA" if adapter is not None else "DoRA: its delta needs --base")
    if isinstance(settings, peft_config.LoraSettings):
        found += _of_peft(settings)
    if len({header.nominal or header.rank for header in headers.values()}) > 1:
        found.append("mixed ranks")
    if any(header.biased for header in headers.values()):
        found.append("trained biases (lora_bias)")
    if any(header.embedding for header in headers.values()):
        found.append("adapts an embedding")
    if whole:
        found.append(f"whole tensors: {_some(list(whole))}")
    found += _lacking(settings, headers, whole)
    if pickled:
        found.append("weights are a pickle")
    if adapter is not None and "*" in adapter.errors:
        found.append(f"merged, with error {adapter.errors['*']:.2g}")
    return tuple(found)


def _of_peft(settings: LoraSettings) -> list[str]:
    named = {
        "rsLoRA": settings.use_rslora,
        "rank_pattern": bool(settings.rank_pattern),
        "alpha_pattern": bool(settings.alpha_pattern),
        "fan_in_fan_out": settings.fan_in_fan_out,
    }
    return [name for name, is_so in named.items() if is_so]


def _lacking(
    settings: LoraSettings | MlxSettings, headers: Mapping[str, ModuleHeader], whole: Mapping[str, object]
) -> list[str]:
    """Modules that the configuration names and the file lacks; an expression names none."""
    if isinstance(settings, peft_config.LoraSettings):
        targets = settings.target_modules
        wanted = () if targets is None or isinstance(targets, str) else targets
        saved = settings.modules_to_save
    else:
        wanted, saved = settings.keys or (), ()
    endings = {ending for path in headers for ending in _endings(path)}
    lost = [name for name in wanted if name not in endings]
    parts = {part for name in whole for part in name.split(".")}
    lost += [name for name in saved if name.rpartition(".")[2] not in parts]
    return [f"its file lacks {_some(lost)}, which its configuration names"] if lost else []


def _endings(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.partition(".")[2]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
