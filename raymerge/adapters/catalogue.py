"""Thousands of adapters in a folder or bucket: listed at once, opened when needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymerge import storage
from raymerge.adapters.formats import CONFIG, AdapterHeader, open_adapter, read_adapter, read_header
from raymerge.errors import AdapterError, did_you_mean

if TYPE_CHECKING:
    from raymerge.adapters.adapter import LoraAdapter

_PLACE = re.compile(r"\{\w+\}")


@dataclass(frozen=True)
class Catalogue:
    """Adapters by name. Nothing is read, and so nothing checked, until it is asked for."""

    locations: Mapping[str, str]

    @classmethod
    def from_template(cls, template: str) -> Catalogue:
        """The adapters that exist where a location like `/data/{persona}/v7` says, by one listing, in any format.

        A location that ends in `.safetensors` names a checkpoint in MLX's form.

        Raises AdapterError if the template has not exactly one place for the name.
        """
        places = _PLACE.findall(template)
        if len(places) != 1:
            raise AdapterError(
                f"{template}: does not say where the name of a persona goes.\nExpected one place such as {{persona}}."
            )
        before, after = template.split(places[0])
        folder, _, start = before.rpartition("/")
        file = after.rstrip("/") if after.endswith(".safetensors") else f"{after.rstrip('/')}/{CONFIG}"
        entry = re.compile(rf"{re.escape(start)}(?P<name>[^/]+){re.escape(file)}")
        found = (entry.fullmatch(info.path) for info in storage.list_files(folder or "."))
        names = sorted(match["name"] for match in found if match)
        return cls({name: template.replace(places[0], name) for name in names})

    @property
    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self.locations))

    def location(self, name: str) -> str:
        """Where an adapter is. Raises AdapterError, with the nearest name there is, if there is none of that name."""
        if name not in self.locations:
            hint = did_you_mean(name, self.locations)
            raise AdapterError(f"{name}: there is no such adapter among {len(self.locations)}.{hint}")
        return self.locations[name]

    def header(self, name: str) -> AdapterHeader:
        """An adapter's configuration and shapes, checked, without its weights. Raises what read_header raises."""
        return read_header(self.location(name), name)

    def read(self, name: str) -> LoraAdapter:
        """An adapter, whole. Raises what read_adapter raises."""
        return read_adapter(self.location(name), name)

    def open(self, name: str) -> LoraAdapter:
        """An adapter that reads its modules one by one as they are asked for. Raises what open_adapter raises."""
        return open_adapter(self.location(name), name)
