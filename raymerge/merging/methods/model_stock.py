"""Model Stock: the mean of the deltas, shortened by how much they disagree (Jang et al., arXiv:2403.19522)."""

from __future__ import annotations

import numpy as np

from raymerge.merging.methods.spherical import lengths, normalised
from raymerge.merging.site import Site, Weighted


def model_stock(site: Site) -> Weighted:
    """t times the weighted mean of the deltas, with t = N c / (1 + (N - 1) c) and c the mean cosine of all pairs.

    c comes from the Gram matrix and is taken as 0 where it is negative: then nothing remains. N and c are of the
    experts whose weight and delta are not zero, since a zero delta has no direction; in the mean, a zero delta counts
    with its weight. One such expert alone has t = 1. Raises MergeError if all weights are zero.
    """
    shares = np.asarray(normalised(site))
    gram = site.gram()
    norms = lengths(site, gram)
    chosen = np.flatnonzero((norms > 0) & (shares > 0))
    count = len(chosen)
    if count < 2:
        return Weighted(np.where(norms > 0, shares, 0.0).tolist())
    cosines = gram.numpy()[np.ix_(chosen, chosen)] / np.outer(norms[chosen], norms[chosen])
    cosine = float(cosines[np.triu_indices(count, 1)].clip(-1.0, 1.0).mean())
    cosine = max(cosine, 0.0)
    t = count * cosine / (1.0 + (count - 1) * cosine)
    return Weighted(np.where(norms > 0, t * shares, 0.0).tolist())
