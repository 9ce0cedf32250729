"""Operations and bytes of the work of a run, from shapes and counts alone. An operation is an addition or a product.

A forward pass costs two operations for each weight and token. In training the base is frozen, so the backward pass
needs the gradient of each layer's input, again two, and none of its weight; the factors of an adapter cost two forward
and four backward. Attention sees every pair of tokens of a row: four operations for each number of its width forward,
ten backward, since it is computed anew there (FlashAttention, arXiv:2205.14135).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymerge.models.base import BaseModel
from raymerge.models.layers import linear_modules, shape_of
from raymerge.models.training.beginning import targets

ENCODER_WEIGHTS = 10.6e6  # of all-MiniLM-L6-v2 without its embedding, which scores and embeds unless another is named
_HEADER, _CONFIG, _MANIFEST = 240, 1_400, 1_300  # bytes of a module's entry in the file, and of the two files beside it
_BESIDE_PREFIX = 1_580  # bytes of a prefix's header, configuration and manifest
_LOSS = 15  # bytes of one step's loss in the manifest
FLOAT32 = 4

Lengths = NDArray[np.int64]
Weights = NDArray[np.float64]


@dataclass(frozen=True)
class Layers:
    """The parts of a base model that cost. linear: shapes (out, in) by path, the output head left out. targets: of
    those that get factors. head: weights of the output head. width: of attention, all heads together, summed over the
    layers that have it. cache: numbers that a token's keys and values take, in all layers."""

    linear: Mapping[str, tuple[int, int]]
    targets: Mapping[str, tuple[int, int]]
    head: int
    width: int
    cache: int

    @property
    def weights(self) -> int:
        """Weights of the linear layers, the head left out."""
        return sum(out * into for out, into in self.linear.values())


def layers_of(base: BaseModel, target_modules: str | tuple[str, ...] = "all-linear") -> Layers:
    """The costs of a base, whose weights need not be there. Raises ModelError if it lacks a target module."""
    head: Any = base.model.get_output_embeddings()
    linear = {path: shape_of(module) for path, module in linear_modules(base.model).items() if module is not head}
    config = base.model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    count = int(getattr(config, "num_hidden_layers", 0) or 0)
    weights = 0 if head is None else int(head.weight.numel())
    adapted = {path: shape_of(module) for path, module in targets(base, target_modules).items()}
    with_keys = int(getattr(config, "num_key_value_heads", None) or heads)
    return Layers(linear, adapted, weights, count * heads * int(size), 2 * count * with_keys * int(size))


def factors(shapes: Mapping[str, tuple[int, int]], rank: int) -> int:
    """Numbers in the factors of an adapter of this rank."""
    return sum(min(rank, out, into) * (out + into) for out, into in shapes.values())


def adapter_bytes(shapes: Mapping[str, tuple[int, int]], rank: int, steps: int = 0) -> int:
    """Bytes of a written adapter in float32, with its configuration and its manifest. steps: whose losses it states."""
    return factors(shapes, rank) * FLOAT32 + len(shapes) * _HEADER + _CONFIG + _MANIFEST + steps * _LOSS


def prefix_bytes(layers: Layers, tokens: int, steps: int = 0) -> int:
    """Bytes of a written prefix in float32, which is its tokens' keys and values, with what lies beside it."""
    return layers.cache * tokens * FLOAT32 + _BESIDE_PREFIX + steps * _LOSS


@dataclass(frozen=True)
class Rows:
    """Sums over rows as a batch holds them, padded: tokens and the squares of the rows' widths; and the tokens of the
    answers, of which none is padding."""

    tokens: float
    answers: float
    squares: float

    def __mul__(self, times: float) -> Rows:
        return Rows(self.tokens * times, self.answers * times, self.squares * times)


def rows_of(widths: Lengths, answers: Lengths, weights: Weights | None = None) -> Rows:
    """Sums over rows of such widths with so many tokens of answer. weights: how many rows each stands for."""
    times = np.ones(len(widths)) if weights is None else weights
    return Rows(float(times @ widths), float(times @ answers), float(times @ np.square(widths, dtype=np.float64)))


def padded(lengths: Lengths, owners: Lengths, batch: int, *, together: bool) -> Lengths:
    """The width of each row's batch. Each owner's rows are sorted by length and cut into batches.

    lengths, owners: int64 (rows,). together: whether owners share batches, one after the other, as in an evaluation.
    """
    order = np.lexsort((lengths, owners))
    place = np.arange(len(order))
    starts = np.zeros_like(place)
    if not together and len(order):
        _, first, inverse = np.unique(owners[order], return_index=True, return_inverse=True)
        starts = first[inverse]
    portion = np.stack([starts, (place - starts) // batch])
    number = np.unique(portion, axis=1, return_inverse=True)[1].reshape(-1) if len(order) else place
    widest = np.zeros(int(number.max(initial=-1)) + 1, np.int64)
    np.maximum.at(widest, number, lengths[order])
    widths = np.empty(len(order), np.int64)
    widths[order] = widest[number]
    return widths


def training_operations(layers: Layers, adapted: int, rows: Rows) -> float:
    """Of one pass over rows. adapted: numbers in the factors of one adapter."""
    linear = (4 * layers.weights + 6 * adapted) * rows.tokens
    return linear + 4 * layers.head * rows.answers + 12 * layers.width * rows.squares


def scoring_operations(layers: Layers, adapted: int, rows: Rows) -> float:
    """Of the likelihood of the answers: one pass forward."""
    linear = 2 * (layers.weights + adapted) * rows.tokens
    return linear + 2 * layers.head * rows.answers + 4 * layers.width * rows.squares


def answering_operations(
    layers: Layers, adapted: int, prompts: Lengths, new: Lengths, weights: Weights | None = None
) -> float:
    """Of greedy answers. prompts: widths of the rows' prompts. new: tokens made for each, which is what the longest
    answer of its batch takes. weights: as of rows_of. The prompt is read once, with the head at its end alone."""
    times = np.ones(len(prompts)) if weights is None else weights
    later = np.maximum(new - 1, 0)
    linear = 2 * (layers.weights + adapted) * float(times @ (prompts + later))
    pairs = float(times @ (prompts.astype(np.float64) ** 2 + later * (prompts + new / 2)))
    return linear + 2 * layers.head * float(times @ new) + 4 * layers.width * pairs


def merging_operations(shapes: Mapping[str, tuple[int, int]], inner: int, rank: int) -> float:
    """Of one linear merge from factors: their Gram matrices, and the factors of the result. inner: ranks, summed."""
    return sum(2.0 * inner * (inner + min(rank, *shape)) * sum(shape) for shape in shapes.values())
