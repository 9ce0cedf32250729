"""Whether the modules of several adapters fit each other."""

from __future__ import annotations

from collections.abc import Iterable

from raymerge.adapters.adapter import ModuleHeader
from raymerge.errors import MergeError


def check_shapes(path: str, headers: Iterable[tuple[str, ModuleHeader]]) -> None:
    """Raise MergeError unless a module is of one shape in all adapters, and an embedding in all or in none.

    headers: of those that have it, with the adapters' names.
    """
    first: tuple[str, ModuleHeader] | None = None
    for name, header in headers:
        first = first or (name, header)
        if first[1].shape != header.shape:
            raise MergeError(
                f"{name}: {path} has shape {header.shape}, but {first[1].shape} in {first[0]}.\n"
                "Shapes are (out_features, in_features). They were trained on different base models."
            )
        if first[1].embedding != header.embedding:
            raise MergeError(
                f"{name}: {path} is {_kind(header)}, but {_kind(first[1])} in {first[0]}.\n"
                "They were trained on different base models."
            )


def _kind(header: ModuleHeader) -> str:
    return "an embedding" if header.embedding else "a linear module"
