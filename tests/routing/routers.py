"""Routers with drawn weights, for the tests of them."""

import numpy as np
import torch

from raymerge.routing.inputs import RoutingInputs
from raymerge.routing.router import Router, RouterShape, make_network
from raymerge.routing.similarity import mean_direction


def drawn_router(inputs: RoutingInputs, seed=0, spread=1.0, **shape) -> Router:
    """A router for the personas of some inputs, its parameters drawn as if it had been trained.

    spread: their standard deviation; 0 leaves it as it is before training.
    """
    if shape.get("network") == "mlp":
        shape = {"experts": tuple(sorted(inputs.experts)), **shape}
    made = RouterShape(**{"size": inputs.embeddings.vectors.shape[1], "rank": 4, "hidden": 6, **shape})
    network = make_network(made, seed)
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=dice), alpha=spread)
    mean = mean_direction(inputs.embeddings.take(sorted(inputs.personas)))
    return Router(made, network, np.asarray(mean), 1.2, (0.1, -0.1))
