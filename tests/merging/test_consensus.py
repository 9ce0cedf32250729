"""How entries of several experts become one."""

import pytest
import torch

from raymerge.merging.consensus import SignElection, Total


def merged(consensus, entries, weights):
    """entries: one list of numbers by expert."""
    sums = torch.zeros(consensus.planes, 1, len(entries[0]), dtype=torch.float64)
    for x, w in zip(entries, weights, strict=True):
        tile = w * torch.tensor([x], dtype=torch.float64)
        consensus.add(sums, tile, w, torch.empty_like(tile), lambda tile: None)
    return consensus.result(sums, sum(abs(w) for w in weights))[0].tolist()


def test_a_total_is_the_sum():
    assert merged(Total(), [[1.0, 2.0], [3.0, -5.0]], [0.5, 2.0]) == [6.5, -9.0]


@pytest.mark.parametrize("early", [False, True])
def test_the_sign_of_the_sum(early):
    entries = [[3.0, -1.0, 2.0, 0.0], [1.0, -1.0, -5.0, 0.0], [-1.0, 1.0, 0.0, 4.0]]
    assert merged(SignElection(early=early), entries, [1.0, 1.0, 1.0]) == [6.0, -3.0, -15.0, 12.0]


def test_the_sign_of_the_count():
    entries = [[3.0, -9.0], [-1.0, 1.0], [-1.0, 1.0]]
    assert merged(SignElection("frequency"), entries, [1.0, 1.0, 1.0]) == [-3.0, 3.0]
    assert merged(SignElection("frequency"), entries, [3.0, 1.0, 1.0]) == [15.0, -45.0]  # counts carry the weights


def test_an_even_count_is_decided_by_the_sum_and_an_even_sum_is_zero():
    entries = [[3.0, 2.0, 0.1 + 0.2], [-1.0, -2.0, -0.3]]
    assert merged(SignElection("frequency"), entries, [1.0, 1.0]) == [6.0, 0.0, 0.0]
    assert merged(SignElection("total"), entries, [1.0, 1.0]) == [6.0, 0.0, 0.0]


def test_a_negative_weight_subtracts():
    assert merged(SignElection(), [[4.0], [1.0]], [1.0, -1.0]) == [8.0]  # 1 * -1 does not agree
    assert merged(SignElection(), [[4.0], [-2.0]], [1.0, -1.0]) == [6.0]
