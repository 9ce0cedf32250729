"""What the arguments of `raymerge inspect` mean: folders of adapters, folders above them, and patterns, by name."""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from raymerge import storage
from raymerge.adapters import formats, mlx, peft
from raymerge.errors import AdapterError

_MARKS = frozenset({peft.CONFIG, peft.WEIGHTS, peft.PICKLE, *mlx.WEIGHTS})  # a folder with any of these is an adapter
_MAGIC = re.compile(r"[*?\[]")


def find_adapters(given: Sequence[str]) -> dict[str, str]:
    """Locations of adapters by name, in the order of their names.

    given: an adapter's folder or one of its `.safetensors` files; a folder above adapters, at any depth; or a pattern
    with `*` (`**` for any depth). What lies below an adapter's own folder, as its checkpoints, is found only where it
    is named. Names are those of the folders, with as much of the path before them as tells them apart. Bytes of a name
    that are no UTF-8 are written as `\\udcff`. Raises AdapterError for an argument that leads to none.
    """
    found: dict[str, str] = {}  # by the real path: one adapter may be reached on several ways
    for argument in given:
        location = storage.resolve(os.getcwd(), argument)
        pattern = bool(_MAGIC.search(argument)) and not storage.exists(location)
        places = [a for match in _matches(location) for a in _below(match)] if pattern else None
        if places is None and not storage.exists(location):
            raise AdapterError(f"{argument}: there is no such file or folder.\nExpected adapters, or folders of them.")
        places = _below(location) if places is None else places
        if not places:
            what = "matches no adapters" if pattern else "holds no adapters"
            raise AdapterError(f"{argument}: {what}.\nAn adapter is a folder with {peft.CONFIG} and its weights.")
        for place in places:
            found.setdefault(_real(place), place)
    return dict(sorted(zip(_names(list(found.values())), found.values(), strict=True)))


def _real(location: str) -> str:
    """The path without links; a URI of another machine as it is."""
    path = location.removeprefix("file://")
    return location if storage.is_uri(path) else os.path.realpath(path)


def _below(location: str) -> list[str]:
    """The adapters at a location."""
    if location.endswith(".safetensors"):
        return [storage.parent(location) if _is_the_folder_s(location) else location]
    if _MARKS & set(storage.list_names(location)):
        return [location]
    files = storage.list_files(location)
    folders = {posixpath.dirname(f.path) for f in files if posixpath.basename(f.path) in _MARKS} - {""}
    tops = [
        folder for folder in sorted(folders) if not any(f"{folder}/".startswith(f"{o}/") for o in folders - {folder})
    ]
    return [storage.join(location, folder) for folder in tops]


def _is_the_folder_s(file: str) -> bool:
    """Whether a weight file is the one that its folder's location stands for."""
    if storage.name_of(file) == peft.WEIGHTS:
        return True
    folder = storage.parent(file)
    first = next((name for name in mlx.WEIGHTS if storage.exists(storage.join(folder, name))), None)
    return storage.name_of(file) == first


def _matches(pattern: str) -> list[str]:
    """What a pattern leads to: folders, and adapters' weight files that it names by their ending."""
    by_ending = pattern.endswith(".safetensors")
    return [p for p in _paths(pattern) if not p.endswith(".safetensors") or (by_ending and _is_adapter_s(p))]


def _is_adapter_s(file: str) -> bool:
    """Whether a file holds an adapter's weights rather than a model's: by its name, or as one of MLX's checkpoints."""
    if storage.name_of(file) in _MARKS:
        return True
    try:
        return formats.format_of(file) == "mlx"
    except AdapterError:
        return False


def _paths(pattern: str) -> list[str]:
    """Folders and `.safetensors` files that fit a pattern."""
    if not storage.is_uri(pattern):
        places: Iterable[str] = glob.glob(pattern, recursive=True)
        return sorted(p for p in places if os.path.isdir(p) or p.endswith(".safetensors"))
    scheme, rest = pattern.split("://", 1)
    parts = rest.split("/")
    fixed = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    root = f"{scheme}://{'/'.join(parts[:fixed])}"
    files = [file.path.split("/") for file in storage.list_files(root)]
    folders = {tuple(path[:depth]) for path in files for depth in range(1, len(path))}
    named = {tuple(path) for path in files if path[-1].endswith(".safetensors")}
    wanted = parts[fixed:]
    return [storage.join(root, *path) for path in sorted(folders | named) if _fits(path, wanted)]


def _fits(path: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not path
    if wanted[0] == "**":
        return any(_fits(path[skipped:], wanted[1:]) for skipped in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], wanted[0]) and _fits(path[1:], wanted[1:])


def _names(locations: Sequence[str]) -> list[str]:
    """The last part of each location, and the parts before it where the last ones are the same."""
    texts = [location.encode(errors="backslashreplace").decode() for location in locations]
    parts = [text.rstrip("/").removesuffix(".safetensors").split("/") for text in texts]
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(path[-length:]) for path, length in zip(parts, lengths, strict=True)]
        counted = Counter(names)
        longer = [
            length + (counted[name] > 1 and length < len(path))
            for name, path, length in zip(names, parts, lengths, strict=True)
        ]
        if longer == lengths:
            return names
        lengths = longer
