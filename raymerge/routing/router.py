"""The learned router: a small network that sees a persona's embedding and says which experts contribute, how much.

Importing this file imports torch: elsewhere in `routing/` that is done inside functions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from raymerge import manifest, storage
from raymerge.errors import RoutingError, StorageError
from raymerge.routing.entmax import entmax
from raymerge.routing.inputs import Space
from raymerge.routing.neighbours import scopes
from raymerge.routing.router_shape import CONFIG as CONFIG
from raymerge.routing.router_shape import WEIGHTS as WEIGHTS
from raymerge.routing.router_shape import Network as Network
from raymerge.routing.router_shape import RouterShape as RouterShape
from raymerge.routing.router_shape import Weighting as Weighting
from raymerge.routing.similarity import nearest


class Bilinear(nn.Module):
    """score = cosine / temperature + (U q) . (V k) + b where the clusters are the same; U, V (rank, size), b ().

    U and b start at 0, so that the first scores are those of `soft` and `top_k`. An expert that it never saw has a
    score like any other.
    """

    def __init__(self, shape: RouterShape, dice: torch.Generator) -> None:
        super().__init__()
        self.temperature = shape.temperature
        self.U = nn.Parameter(torch.zeros(shape.rank, shape.size))
        self.V = nn.Parameter(torch.randn(shape.rank, shape.size, generator=dice) / math.sqrt(shape.rank))
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, queries: Tensor, keys: Tensor, near: Tensor, same: Tensor) -> Tensor:
        """Scores (p, C) of queries (p, size) and the keys of their candidates (p, C, size)."""
        asked = (queries @ self.U.T) @ self.V
        learned = torch.bmm(keys, asked[:, :, None])[:, :, 0]
        return near / self.temperature + learned + self.b * same.to(near.dtype)


class Mlp(nn.Module):
    """score = W_out gelu(W_in q + b_in) + b_out, a number per expert. All scores start at 0."""

    def __init__(self, shape: RouterShape, dice: torch.Generator) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.randn(shape.hidden, shape.size, generator=dice))  # queries have length 1
        self.b_in = nn.Parameter(torch.zeros(shape.hidden))
        self.W_out = nn.Parameter(torch.zeros(len(shape.experts), shape.hidden))
        self.b_out = nn.Parameter(torch.zeros(len(shape.experts)))

    def forward(self, queries: Tensor) -> Tensor:
        """Scores (p, experts) of queries (p, size)."""
        hidden = nn.functional.gelu(nn.functional.linear(queries, self.W_in, self.b_in))
        return nn.functional.linear(hidden, self.W_out, self.b_out)


def make_network(shape: RouterShape, seed: int) -> Bilinear | Mlp:
    """The network before training, float32 on the CPU; the same seed gives the same one."""
    dice = torch.Generator().manual_seed(seed)
    return Bilinear(shape, dice) if shape.network == "bilinear" else Mlp(shape, dice)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Whom each persona may ask, most similar first.

    experts: int64 (personas, C), numbers of the space's experts, -1 where there are fewer. near: float32, their
    cosines. same: bool, whether they are of the persona's cluster.
    """

    experts: NDArray[np.int64]
    near: NDArray[np.float32]
    same: NDArray[np.bool_]


def find_candidates(space: Space, shape: RouterShape) -> Candidates:
    """The most similar experts of each persona, its own left out, and of an mlp those it has an output for.

    C is shape.candidates, or the number of experts where that is less. Raises RoutingError if there are no clusters.
    """
    outputs = set(shape.experts)
    known = np.array([shape.network == "bilinear" or name in outputs for name in space.experts], dtype=np.bool_)
    size = (len(space.personas), min(shape.candidates, len(space.experts)))
    experts, near = np.full(size, -1, dtype=np.int64), np.zeros(size, dtype=np.float32)
    for _, queries, everybody in scopes(space, shape.scope):
        keys = everybody[known[everybody]]
        place = np.full(len(space.experts) + 1, -1, dtype=np.int64)  # the last entry: personas without an adapter
        place[keys] = np.arange(len(keys))
        found = nearest(
            space.queries[queries], space.keys[keys], shape.candidates, exclude=place[space.own[queries]]
        )  # fmt: skip
        for persona, best in zip(queries, found, strict=True):
            experts[persona, : len(best.indices)] = keys[best.indices]
            near[persona, : len(best.indices)] = best.similarities
    numbers = {label: number for number, label in enumerate(sorted(set(space.persona_labels)))}
    own = np.array([numbers[label] for label in space.persona_labels], dtype=np.int64)
    theirs = np.full(len(space.experts) + 1, -1, dtype=np.int64)
    for label, members in space.by_label.items():
        theirs[members] = numbers.get(label, -1)
    return Candidates(experts, near, theirs[experts] == own[:, None])


def scores(
    network: nn.Module,
    queries: Tensor,
    keys: Tensor,
    experts: Tensor,
    near: Tensor,
    same: Tensor,
    *,
    columns: Tensor | None = None,
) -> Tensor:
    """What a network says of some personas' candidates: (p, C), -inf where there is none.

    queries: float32 (p, size). keys: float32 (N, size) of all experts. experts: int64 (p, C), rows of `keys`, -1 where
    there is none; near, same: (p, C), see `Candidates`. columns: int64 (N,), each expert's output of an mlp, -1 for
    those it has none for; by default the outputs are the N experts in their order.
    """
    numbers = experts.clamp_min(0)
    there = experts >= 0
    if isinstance(network, Mlp):
        if columns is not None:
            numbers = columns[numbers]
            there = there & (numbers >= 0)
        found = network(queries).gather(1, numbers.clamp_min(0))
    else:
        found = network(queries, keys[numbers], near, same)
    result: Tensor = found.masked_fill(~there, -torch.inf)
    return result


def choose(
    scores: Tensor, k: int, weighting: Weighting, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k best candidates of each persona, best first, and their weights: int64 and floating (p, min(k, C)).

    Weights are an entmax or softmax of the scores (p, C), cut to these k and summing to 1; a place that nobody takes
    has weight 0, and so has each of a persona without any candidate. Of equal scores the first is taken.
    allowed: bool (p, C). Gradients flow through the weights.
    """
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    best, places = scores.sort(dim=1, descending=True, stable=True)
    best, places = best[:, :k], places[:, :k]
    if weighting == "entmax":
        weights = entmax(scores).gather(1, places)
        total = weights.sum(1, keepdim=True)
        return places, weights / torch.where(total == 0, 1.0, total)
    there = best != -torch.inf
    lowest = torch.finfo(best.dtype).min
    return places, torch.softmax(best.masked_fill(~there, lowest), dim=1) * there


def allow(scores: NDArray[Any], experts: NDArray[np.int64], k: int, most: int) -> NDArray[np.bool_]:
    """Which pairs are left where no expert may serve more than `most` personas: bool (P, C), at most k of a persona.

    scores: (P, C), -inf where there is nobody. experts: int64 (P, C). Pairs are given in the order of their share in
    the softmax of the persona's scores; an expert that serves `most` already is passed over, and the persona's next
    takes its place. Of equal shares the first persona comes first, then the first expert.
    """
    allowed = np.zeros(experts.shape, dtype=np.bool_)
    if not experts.size:
        return allowed
    values = np.asarray(scores, dtype=np.float64)
    best = values.max(axis=1, keepdims=True)
    shares = np.exp(values - np.where(np.isfinite(best), best, 0.0))
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    personas, places = np.nonzero((experts >= 0) & np.isfinite(values))
    numbers = experts[personas, places]
    order = np.lexsort((numbers, personas, -shares[personas, places]))
    wanted = np.full(len(experts), k).tolist()
    free = np.full(int(experts.max()) + 1, most).tolist()
    for persona, place, expert in zip(
        personas[order].tolist(), places[order].tolist(), numbers[order].tolist(), strict=True
    ):  # fmt: skip
        if wanted[persona] and free[expert]:
            wanted[persona] -= 1
            free[expert] -= 1
            allowed[persona, place] = True
    return allowed


@dataclass(frozen=True, eq=False)
class Router:
    """A trained router.

    mean: float32 (size,), what centring takes away from embeddings. scale: the factor on `match_norm` as learned.
    layers: log-offsets of groups of layers by depth as learned; none without groups.
    """

    shape: RouterShape
    network: nn.Module
    mean: NDArray[np.float32]
    scale: float = 1.0
    layers: tuple[float, ...] = ()


def encode_router(router: Router) -> dict[str, bytes]:
    """The files that `read_router` reads; the same router gives the same bytes."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in router.network.state_dict().items()}
    tensors["mean"] = torch.from_numpy(np.ascontiguousarray(router.mean, dtype=np.float32))
    config = {"shape": router.shape.as_record(), "scale": router.scale, "layers": list(router.layers)}
    return {WEIGHTS: safetensors.torch.save(tensors), CONFIG: storage.encode_json(config)}


def read_router(folder: str) -> Router:
    """The router of a folder; what else its `router.json` holds is left aside.

    Raises RoutingError for one that is not there, was not finished, cannot be read, or is of another network than it
    says.
    """
    config_at, weights_at = storage.join(folder, CONFIG), storage.join(folder, WEIGHTS)
    if manifest.is_unfinished(folder) or not (storage.exists(config_at) and storage.exists(weights_at)):
        raise RoutingError(f"{folder}: there is no trained router.\n`raymerge router PROJECT` trains one.")
    again = "`raymerge router PROJECT --restart` trains it anew."
    try:
        config = storage.read_json(config_at)
        shape = RouterShape.from_record(config["shape"])
        scale, layers = float(config["scale"]), tuple(float(value) for value in config["layers"])
        tensors = safetensors.torch.load(storage.read_bytes(weights_at))
    except (
        StorageError,
        RoutingError,
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        json.JSONDecodeError,
    ) as error:
        raise RoutingError(f"{folder}: the router cannot be read.\n{error}\n{again}") from error
    network = make_network(shape, 0)
    expected = {**{name: value.shape for name, value in network.state_dict().items()}, "mean": torch.Size([shape.size])}
    if {name: value.shape for name, value in tensors.items()} != expected:
        raise RoutingError(
            f"{folder}: {WEIGHTS} holds another network than {CONFIG} says.\n"
            f"Expected {_named(expected)}.\nFound {_named({n: t.shape for n, t in tensors.items()})}.\n{again}"
        )
    spoilt = [name for name, value in sorted(tensors.items()) if not bool(torch.isfinite(value).all())]
    if spoilt or not math.isfinite(scale):
        raise RoutingError(f"{folder}: the router holds NaN or Inf in {spoilt[0] if spoilt else 'scale'}.\n{again}")
    mean = np.asarray(tensors.pop("mean").float().numpy())
    network.load_state_dict(tensors)
    return Router(shape, network, mean, scale, layers)


def _named(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items()))
