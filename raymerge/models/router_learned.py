"""What a router that learns says of personas: whom they ask, how much, and at what scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raymerge import storage
from raymerge.merging.scale import MOST_OFFSET
from raymerge.merging.settings import depths
from raymerge.models.router_passes import Mixtures
from raymerge.models.router_settings import RouterSettings
from raymerge.routing.router import Candidates, RouterShape, allow, choose, make_network, scores


class Learned(nn.Module):
    """What learns: the network, the logarithm of the scale, and those of the factors by depth."""

    def __init__(self, shape: RouterShape, settings: RouterSettings) -> None:
        super().__init__()
        self.network = make_network(shape, settings.seed)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.offsets = nn.Parameter(torch.zeros(settings.layers))

    def parts(self) -> list[dict[str, object]]:
        """Parameters as AdamW takes them: what is a few numbers does not decay."""
        few = [self.log_scale, *([self.offsets] if len(self.offsets) else [])]
        return [{"params": list(self.network.parameters())}, {"params": few, "weight_decay": 0.0}]

    @torch.no_grad()
    def keep_offsets(self) -> None:
        """Put offsets that have grown beyond what a recipe may say back to the largest that it may."""
        self.offsets.clamp_(-MOST_OFFSET, MOST_OFFSET)

    def tensors(self) -> dict[str, Tensor]:
        """A copy on the CPU, by name."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}


class Routing:
    """Personas and their candidates, as a router that learns sees them.

    vectors: queries (P, d) and keys (N, d). modules: those that some expert changes, as merges see them: they have a
    factor each where offsets learn, and among them the last layer is the deepest.
    """

    def __init__(
        self,
        shape: RouterShape,
        settings: RouterSettings,
        vectors: tuple[NDArray[np.float32], NDArray[np.float32]],
        candidates: Candidates,
        modules: Sequence[str],
        device: torch.device,
    ) -> None:
        self.shape, self.device = shape, device
        self.learned = Learned(shape, settings).to(device)
        places = (candidates.experts, candidates.near, candidates.same)
        self.queries, self.keys = (_placed(part, device) for part in vectors)
        self.experts, self.near, self.same = (_placed(part, device) for part in places)
        self.spread = _spread(modules, settings.layers).to(device)
        self.digests = {"vectors": digest_arrays(*vectors), "candidates": digest_arrays(*places)}

    def weights(self, personas: Sequence[int], allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Experts of personas, int64 (p, k), best first, and weights (p, k) that sum to 1, 0 where nobody is.

        allowed: bool (P, C), on the CPU; None is all candidates.
        """
        rows = torch.tensor(personas)
        own = self._scores(rows.to(self.device))
        chosen = None if allowed is None else allowed[rows].to(self.device)
        places, weights = choose(own, self.shape.k, self.shape.weighting, chosen)
        most = max(1, int((weights > 0).sum(1).max()))  # the best come first: what entmax leaves out costs nothing
        return self.experts[rows.to(self.device)].gather(1, places)[:, :most], weights[:, :most]

    def mixtures(self, experts: Tensor, weights: Tensor, resident: NDArray[np.int64], products: Tensor) -> Mixtures:
        """What runs with such weights: the norm of the experts' mean, times what is learned of it.

        resident: numbers of the resident experts, int64 (n,), sorted. products: of their deltas, float32 (n, n).
        """
        there = (experts >= 0) & (weights.detach() > 0)
        local = torch.searchsorted(torch.from_numpy(resident).to(self.device), experts.contiguous()).masked_fill(
            ~there, 0
        )
        norms = products.diagonal().clamp_min(0).sqrt()[local]
        inner = products[local[:, :, None], local[:, None, :]]
        squares = torch.einsum("pi,pij,pj->p", weights, inner, weights)
        matched = (weights * norms).sum(1) / squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
        scaled = weights * (matched * self.learned.log_scale.exp())[:, None]
        offsets = self.learned.offsets
        factors = self.spread @ offsets.exp() if len(offsets) else None
        return Mixtures(local.masked_fill(~there, -1), scaled, factors)

    def allowed(self, personas: Sequence[int]) -> Tensor | None:
        """Which candidates are left where an expert may serve so many personas at most: bool (P, C), on the CPU; None
        where it may serve all. Nobody but `personas` is counted."""
        most = self.shape.max_in_degree
        if most is None:
            return None
        rows = torch.tensor(personas)
        with torch.no_grad():
            own = self._scores(rows.to(self.device)).cpu().numpy()
        found = torch.zeros(self.experts.shape, dtype=torch.bool)
        experts = self.experts.cpu()[rows].numpy()
        found[rows] = torch.from_numpy(allow(own, experts, self.shape.k, most))
        return found

    def _scores(self, rows: Tensor) -> Tensor:
        return scores(
            self.learned.network, self.queries[rows], self.keys, self.experts[rows], self.near[rows], self.same[rows]
        )


def entropy_of(weights: Tensor) -> Tensor:
    """Entropy of weights (p, k) that sum to 1: nats, (p,)."""
    return -(weights * weights.clamp_min(1e-12).log()).sum(1)


def digest_arrays(*arrays: NDArray[np.generic]) -> str:
    """Digest of arrays with their shapes and dtypes."""
    return storage.digest_value([[str(a.dtype), list(a.shape), storage.digest_bytes(a.tobytes())] for a in arrays])


def _placed(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.tensor(array, device=device)


def _spread(modules: Sequence[str], places: int) -> Tensor:
    """How much of each place's factor is in that of a module, float32 (modules, places); see `settings.value_at`."""
    found = depths(modules)
    deep = torch.tensor([found[module] for module in modules])[:, None] * (places - 1)
    return (1 - (deep - torch.arange(places)).abs()).clamp_min(0)
