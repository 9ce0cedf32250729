"""The base model without its weights: configuration, tokenizer and the shapes of its layers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import transformers

from raymerge import storage
from raymerge.errors import ModelError
from raymerge.models.base import BaseModel
from raymerge.runtime.bases import is_folder

_SMALL = (".json", ".model", ".txt", ".jinja", ".tiktoken")


def describe_base(location: str, name: str) -> BaseModel:
    """A base whose weights are not there (on the meta device), so that a model of any size is described in a second.

    location: a resolved folder, a URI, or a name on the hub. name: as the project writes it. Raises ModelError if it
    is not there or is no causal LM.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        with _described(location) as source:
            config = transformers.AutoConfig.from_pretrained(source)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
            with suppress(OSError):  # it need not have one
                model.generation_config = transformers.GenerationConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{name}: cannot be read as a causal LM.\n{str(error).strip()}") from error
    return BaseModel(model.eval(), tokenizer, torch.device("meta"), torch.float32, name)


@contextmanager
def _described(location: str) -> Iterator[str]:
    """A folder with all but the weights, where they would have to be fetched first."""
    if not is_folder(location) or not storage.is_uri(location):
        yield location
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in storage.list_files(location):
            if file.path.endswith(_SMALL) and "/" not in file.path:
                Path(folder, file.path).write_bytes(storage.read_bytes(storage.join(location, file.path)))
        yield folder
