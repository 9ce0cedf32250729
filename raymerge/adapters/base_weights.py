"""Weights of a base model, tensor by tensor, for adapters that mean nothing without them. No model library."""

from __future__ import annotations

import difflib
from functools import cached_property
from typing import TYPE_CHECKING, Any

from raymerge import storage
from raymerge.adapters.tensors import TensorFile, open_tensors, read_tensors
from raymerge.errors import AdapterError, ModelError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Where language models keep the weights that a tied head shares.
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)


class BaseWeights:
    """A base model's folder or URI in Hugging Face's form: `model.safetensors`, or shards with an index.

    Nothing is read until a weight is asked for, then that tensor alone; none is kept.
    """

    def __init__(self, location: str) -> None:
        self.location = str(location)
        self._open: dict[str, TensorFile] = {}

    def __repr__(self) -> str:
        return f"BaseWeights({self.location!r})"

    def weight(self, parameter: str) -> Tensor:
        """A parameter by its name in the model (`model.embed_tokens.weight`), as stored, on the CPU.

        Names may differ from those of the file by their first component, as those of a model without its head do. A
        head that is not stored is the embedding it is tied to. Raises AdapterError, with the nearest names, if there
        is no such parameter; ModelError if the folder holds no safetensors weights or they cannot be read.
        """
        name = self._find(parameter)
        try:
            (tensor,) = read_tensors(self._file(name), [name], f"{self.location}: {self._files[name]}")
        except AdapterError as error:
            raise ModelError(str(error)) from error
        return tensor

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Shape of a parameter, from the header of its file. Raises what weight raises."""
        name = self._find(parameter)
        return self._file(name).tensors[name].shape

    def lacks(self, parameter: str) -> bool:
        """Whether there is no such parameter, as of a head trained from nothing. Raises ModelError as weight does."""
        return not self._candidates(parameter)

    def _find(self, parameter: str) -> str:
        found = self._candidates(parameter)
        if len(found) == 1:
            return found[0]
        near = found or difflib.get_close_matches(parameter, list(self._files), n=3, cutoff=0.3)
        problem = "stands for several parameters" if found else "there is no such parameter"
        raise AdapterError(
            f"{parameter}: {problem} in the base model {self.location}.\n"
            f"Nearest: {', '.join(near) or 'none'}. Is it the base that the adapter was trained on?"
        )

    def _candidates(self, parameter: str) -> list[str]:
        if parameter in self._files:
            return [parameter]
        found = self._renamed(parameter)
        if not found and self._tied and _ends(parameter, _HEADS):
            found = [name for name in self._files if _ends(name, _EMBEDDINGS)]
        return found

    def _renamed(self, parameter: str) -> list[str]:
        """Stored names that are this one without its first component, or this one behind one more."""
        _, _, rest = parameter.partition(".")
        if rest in self._files and "." in rest:
            return [rest]
        return [name for name in self._files if name.partition(".")[2] == parameter]

    def _file(self, name: str) -> TensorFile:
        file = self._files[name]
        if file not in self._open:
            where = f"{self.location}: {file}"
            try:
                self._open[file] = open_tensors(str(storage.open_local(storage.join(self.location, file))), where)
            except (StorageError, AdapterError) as error:
                raise ModelError(str(error) if isinstance(error, AdapterError) else f"{where} is missing.") from error
        if name not in self._open[file].tensors:
            raise ModelError(f"{self.location}: {file} lacks {name}, which {INDEX} says it holds.")
        return self._open[file]

    @cached_property
    def _files(self) -> dict[str, str]:
        """The file of each tensor by its name."""
        index = storage.join(self.location, INDEX)
        if storage.exists(storage.join(self.location, SINGLE)):
            where = f"{self.location}: {SINGLE}"
            try:
                path = str(storage.open_local(storage.join(self.location, SINGLE)))
                self._open[SINGLE] = open_tensors(path, where)
            except AdapterError as error:
                raise ModelError(str(error)) from error
            return dict.fromkeys(self._open[SINGLE].tensors, SINGLE)
        if not storage.exists(index):
            raise ModelError(
                f"{self.location}: holds no weights of a base model.\nExpected a folder or URI with {SINGLE}, or with "
                f"{INDEX} and its files."
            )
        try:
            return {str(name): str(file) for name, file in storage.read_json(index)["weight_map"].items()}
        except (StorageError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{self.location}: {INDEX} cannot be understood.\n{error}.") from error

    @cached_property
    def _tied(self) -> bool:
        """Whether the head may share the embedding's weights: only where the configuration does not deny it."""
        try:
            config: Any = storage.read_json(storage.join(self.location, "config.json"))
            return bool(config.get("tie_word_embeddings", True))
        except (StorageError, AttributeError):
            return True


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
