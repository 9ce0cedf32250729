"""What is written behind `raymerge fuse`, and what it means: adapters by name, weights, parameters, a sweep."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from raymerge import storage
from raymerge.adapters.formats import FORMATS
from raymerge.errors import MergeError, RaymergeError, unknown
from raymerge.merging.dialects import method_of
from raymerge.merging.rank import parse_rank
from raymerge.merging.settings import Setting, checked
from raymerge.pipelines.fusion.request import Fusion, Meant, Request, Source

_NAMED = re.compile(r"(?P<name>[^/\\:=]+)=(?P<location>.+)")
_SHARES = re.compile(r"[-+.\deE]+(/[-+.\deE]+)+")
_WORDS = {"true": True, "false": False, "null": None, "": None}
_MAIN = ("t", "density")  # what a bare number in a sweep sets
_WEIGHTS = (
    "Expected one for each adapter, such as 0.6,0.4; a list such as [0.2, 0.8] goes from the first layer to the last, "
    'and {"*.v_proj": 0.8, "*": 0.2} names modules (1 where no pattern fits).'
)


def understand(request: Request) -> Meant:
    """Give a request its meaning; no adapter is read. Raises MergeError that names the option."""
    sources = named_sources(request.adapters)
    weights = _weights(request, sources)
    parameters = {key: value_of(f"--param {key}", text) for key, text in request.parameters.items()}
    out = storage.resolve(os.getcwd(), request.out)
    equal = request.weights is None and request.weights_file is None
    name = request.name or storage.name_of(out)
    method = method_of(request.method, request.dialect)
    if request.explain and request.dialect != "delta":
        raise MergeError("--explain: says how others differ from dialect delta.\nLeave out --dialect.")
    if request.format not in FORMATS:
        raise MergeError(f"--format: {unknown('format', request.format, FORMATS)}")
    plain = Fusion(name, out, method, parameters, weights, equal)
    if request.sweep is None:
        plain.method.resolve(parameters)
        fusions = [plain]
    else:
        fusions = _sweep(request, plain)
    for fusion in fusions:
        fusion.method.check_experts(len(sources))
    return Meant(request, sources, tuple(fusions), _rank(request), _scale(request.scale))


def named_parameters(given: Sequence[str], plain: Mapping[str, str | None]) -> dict[str, str]:
    """Parameters from `--param NAME=VALUE` and from options of their own, as written. Raises MergeError for one that
    has no value or is given twice."""
    found = {name: text for name, text in plain.items() if text is not None}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise MergeError(f"--param {text}: says no value.\nExpected NAME=VALUE, such as density=0.2.")
        if name in found:
            raise MergeError(f"--param {text}: {name} is given twice.")
        found[name] = value
    return found


def value_of(option: str, text: str) -> Any:
    """A number, a word, a list or a mapping as YAML writes it. Raises MergeError if it cannot be read."""
    try:
        return _read(text)
    except yaml.YAMLError as error:
        raise MergeError(
            f"{option} {text}: cannot be read.\n"
            'Expected a number, a word, [0.2, 0.5] or {"*.v_proj": 0.8}, with patterns in quotes.'
        ) from error


class _Plain(yaml.SafeLoader):
    """YAML whose plain values are text: its own numbers take 1:30 for 90 and 1e-3 for a word."""


_Plain.yaml_implicit_resolvers = {}


def _read(text: str) -> Any:
    return _meant(yaml.load(text, Loader=_Plain))


def _meant(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _meant(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_meant(one) for one in value]
    if not isinstance(value, str) or value in _WORDS:
        return _WORDS.get(value) if isinstance(value, str) else value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def named_sources(given: Sequence[str]) -> tuple[Source, ...]:
    """Adapters by name, from locations or NAME=LOCATION. Raises MergeError if two have one name."""
    sources = []
    for text in given:
        match = None if storage.exists(text) else _NAMED.fullmatch(text)
        location = storage.resolve(os.getcwd(), match["location"] if match else text)
        sources.append(
            Source(match["name"] if match else storage.name_of(location).removesuffix(".safetensors"), text, location)
        )
    first: dict[str, Source] = {}
    for source in sources:
        other = first.setdefault(source.name, source)
        if other is not source:
            raise MergeError(
                f"{source.name}: two adapters have this name.\n"
                f"Found {other.written} and {source.written}. Name one of them: OTHER_NAME={source.written}"
            )
    return tuple(sources)


def _weights(request: Request, sources: Sequence[Source]) -> tuple[Setting, ...]:
    if request.weights is not None and request.weights_file is not None:
        raise MergeError("--weights and --weights-file: give one of them.")
    if request.weights_file is not None:
        option, found = f"--weights-file {request.weights_file}", _from_file(request.weights_file, sources)
    elif request.weights is not None:
        option = f"--weights {request.weights}"
        try:
            found = _read(f"[{request.weights}]")
        except yaml.YAMLError as error:
            raise MergeError(f"{option}: cannot be read.\n{_WEIGHTS}") from error
    else:
        return (1 / len(sources),) * len(sources)
    if len(found) != len(sources):
        raise MergeError(f"{option}: {len(found)} weights for {len(sources)} adapters.\n{_WEIGHTS}")
    try:
        weights = tuple(checked(value, lambda x: True, "a number") for value in found)
    except ValueError as error:
        raise MergeError(f"{option}: {error}.\n{_WEIGHTS}") from error
    return _normalised(weights, option) if request.normalize else weights


def _from_file(location: str, sources: Sequence[Source]) -> list[Any]:
    option = f"--weights-file {location}"
    try:
        content = _read(storage.read_bytes(storage.resolve(os.getcwd(), location)).decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MergeError(f"{option}: is neither YAML nor JSON.\n{error}") from error
    names = [source.name for source in sources]
    if not isinstance(content, dict):
        raise MergeError(f"{option}: holds no weights by name.\nExpected a mapping such as {{{names[0]}: 0.6}}.")
    wrong = next((name for name in content if name not in names), None)
    if wrong is not None:
        raise MergeError(f"{option}: {unknown('adapter', wrong, names)}")
    missing = [name for name in names if name not in content]
    if missing:
        raise MergeError(f"{option}: has no weight for {', '.join(missing[:4])}.\nWrite 0 to leave an adapter out.")
    return [content[name] for name in names]


def _normalised(weights: Sequence[Setting], option: str) -> tuple[Setting, ...]:
    numbers = [weight for weight in weights if isinstance(weight, float)]
    if len(numbers) < len(weights):
        raise MergeError(f"{option}: --normalize scales numbers only.\nWrite weights that differ by layer as meant.")
    total = math.fsum(numbers)
    if total == 0 or not all(math.isfinite(weight / total) for weight in numbers):
        raise MergeError(f"{option}: --normalize cannot scale weights that sum to {total:g}.\nLeave it out.")
    return tuple(weight / total for weight in numbers)


def _rank(request: Request) -> Any:
    rank = value_of("--rank", request.rank)
    if isinstance(rank, float):
        rank = {"energy": rank}
    if request.uniform:
        rank = {**rank, "uniform": True} if isinstance(rank, dict) else {"rank": rank, "uniform": True}
    try:
        parse_rank(rank)
    except RaymergeError as error:
        first, _, rest = str(error).partition("\n")
        raise type(error)(f"--rank {request.rank}: {first}\n{rest}".rstrip()) from error
    return rank


def _scale(text: str) -> Any:
    value = value_of("--scale", text)
    if value == "match_norm":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MergeError(f"--scale {text}: is no scale.\nExpected a finite number or match_norm.")
    return float(value)


def _sweep(request: Request, plain: Fusion) -> list[Fusion]:
    """The fusions of a sweep. Parameters given beside it hold for every method that has them."""
    fusions: list[Fusion] = []
    for item in _split(request.sweep or "", ","):
        fusion = _item(item.strip(), plain, request.dialect)
        if any(fusion.folder == other.folder for other in fusions):
            raise MergeError(f"--sweep {request.sweep}: {item} is there twice.")
        fusions.append(fusion)
    for name in plain.parameters:
        if not any(name in fusion.method.parameters.model_fields for fusion in fusions):
            raise MergeError(f"--sweep {request.sweep}: no method in it has the parameter {name}.")
    return fusions


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators that stand in no bracket: a list or a mapping is one part."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _item(item: str, plain: Fusion, dialect: str) -> Fusion:
    """`70/30`, `METHOD`, `METHOD:VALUE` of its main parameter, `METHOD:NAME=VALUE`, and shares behind any of them."""
    where = f"--sweep {item}"
    parts = _split(item, ":")
    method = plain.method if _SHARES.fullmatch(parts[0]) else method_of(parts.pop(0), dialect)
    given = {key: value for key, value in plain.parameters.items() if key in method.parameters.model_fields}
    fusion = replace(plain, method=method)
    for part in parts:
        if _SHARES.fullmatch(part):
            fusion = replace(fusion, weights=_shares(part, len(plain.weights), where), equal=False)
            continue
        key, equals, value = part.partition("=")
        if not equals:
            main = next((key for key in _MAIN if key in method.parameters.model_fields), None)
            if main is None:
                allowed = ", ".join(method.parameters.model_fields) or "none"
                raise MergeError(f"{where}: write NAME=VALUE.\nParameters of {method.name}: {allowed}.")
            key, value = main, part
        given[key] = value_of(where, value)
    method.resolve(given)
    label = re.sub(r"[/:=,]", "-", re.sub(r"""[][{}"'*\s]""", "", item))
    return replace(fusion, name=label, folder=storage.join(plain.folder, label), parameters=given)


def _shares(part: str, count: int, where: str) -> tuple[Setting, ...]:
    try:
        shares = [float(share) for share in part.split("/")]
    except ValueError as error:
        raise MergeError(f"{where}: {part} are no shares.\nExpected numbers such as 70/30.") from error
    if len(shares) != count:
        raise MergeError(f"{where}: {len(shares)} shares for {count} adapters.\nExpected one for each, such as 70/30.")
    return _normalised(shares, where)
