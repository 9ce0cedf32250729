"""Routing by a trained router: its scores of each persona's candidates, by blocks, as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raymerge.errors import RoutingError
from raymerge.routing.inputs import RoutingInputs, Space, make_space
from raymerge.routing.lines import Rows
from raymerge.routing.neighbours import Share, complete, note_short
from raymerge.routing.router import Candidates, Router, allow, choose, find_candidates, scores

BLOCK = 64  # personas whose candidates' embeddings are held at a time: 6 MB of 64 with 384 numbers


def learned_router(parameters: Mapping[str, Any], inputs: RoutingInputs) -> tuple[Rows, list[str]]:
    """Rows of what a router says, and notes. Personas without an adapter are routed like any other.

    Raises RoutingError if there is no router, or it was trained on embeddings of another size.
    """
    router = inputs.router
    if router is None:
        raise RoutingError("strategy learned_router: there is no router.\n`raymerge router PROJECT` trains one.")
    if inputs.embeddings is not None and inputs.embeddings.vectors.shape[1] != router.shape.size:
        raise RoutingError(
            f"strategy learned_router: the router was trained on embeddings of {router.shape.size} numbers, and these "
            f"have {inputs.embeddings.vectors.shape[1]}.\nTrain it anew with `raymerge router PROJECT --restart`."
        )
    router = replace(router, shape=replace(router.shape, k=parameters["k"] or router.shape.k))
    space, notes = make_space(replace(inputs, mean=router.mean), centred=True)
    found = find_candidates(space, router.shape)
    said = learned_scores(router, space, found).astype(np.float64) / parameters["temperature"]
    most = router.shape.max_in_degree
    allowed = None if most is None else allow(said, found.experts, router.shape.k, most)
    rows, alone = complete(space, _shares(router, space, found, said, allowed), parameters["self_weight"])
    return rows, notes + _note_strangers(router, space) + _note_few(router, space, found) + alone


def learned_scores(router: Router, space: Space, found: Candidates) -> NDArray[np.float32]:
    """What a router says of the candidates: float32 (personas, C), -inf where there is none."""
    position = {name: i for i, name in enumerate(router.shape.experts)}
    columns = torch.tensor([position.get(name, -1) for name in space.experts], dtype=torch.int64)
    keys = torch.from_numpy(space.keys)
    said = np.zeros(found.experts.shape, dtype=np.float32)  # at once: what is kept between blocks would split the heap
    with torch.no_grad():
        for start in range(0, len(space.personas), BLOCK):
            part = slice(start, start + BLOCK)
            parts = (space.queries[part], found.experts[part], found.near[part], found.same[part])
            queries, experts, near, same = (torch.from_numpy(one) for one in parts)
            said[part] = scores(router.network, queries, keys, experts, near, same, columns=columns).numpy()
    return said


def _shares(
    router: Router, space: Space, found: Candidates, said: NDArray[np.float64], allowed: NDArray[np.bool_] | None
) -> dict[int, Share]:
    """What each persona has from others, in the same order as its candidates' scores."""
    mask = None if allowed is None else torch.from_numpy(allowed)
    chosen, given = choose(torch.from_numpy(said), router.shape.k, router.shape.weighting, mask)
    places, weights = chosen.numpy(), given.numpy()
    bad = np.flatnonzero(~np.isfinite(weights).all(axis=1))
    if len(bad):
        raise RoutingError(f"strategy learned_router: the router's scores for {space.personas[bad[0]]} are not finite.")
    shares = {}
    for persona, (place, weight) in enumerate(zip(places, weights, strict=True)):
        place, weight = place[weight > 0], weight[weight > 0]
        near = found.near[persona, place].astype(np.float64)
        shares[persona] = Share(found.experts[persona, place], near, weight)
    return shares


def _note_strangers(router: Router, space: Space) -> list[str]:
    known = set(router.shape.experts)
    strangers = [name for name in space.experts if name not in known] if router.shape.network == "mlp" else []
    if not strangers:
        return []
    many = f"({len(strangers)} such experts)"
    return [f"{strangers[0]}: the router (mlp) has not seen it and it contributes to nobody but itself {many}"]


def _note_few(router: Router, space: Space, found: Candidates) -> list[str]:
    """Where there are fewer candidates than may contribute."""
    counts = (found.experts >= 0).sum(axis=1)
    within = space.persona_labels if router.shape.scope == "cluster" else ("all",) * len(counts)
    fewest: dict[str, int] = {}
    for label, count in zip(within, counts.tolist(), strict=True):
        fewest[label] = min(count, fewest.get(label, count))
    return note_short(
        {label: fewest[label] for label in sorted(fewest) if fewest[label] < router.shape.k}, router.shape.k
    )
