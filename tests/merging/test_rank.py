"""What `rank` means."""

import subprocess
import sys

import pytest

from raymerge.errors import RankError
from raymerge.merging.rank import RankRule, chosen_rank, parse_rank


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("keep", RankRule("keep")),
        ("exact", RankRule("exact")),
        (16, RankRule("fixed", 16)),
        ({"energy": 0.95, "max": 64}, RankRule("energy", 0.95, 64)),
        ({"energy": 1}, RankRule("energy", 1.0)),
        ({"rank": "keep", "uniform": True}, RankRule("keep", uniform=True)),
        ({"rank": 8, "uniform": True}, RankRule("fixed", 8, uniform=True)),
        (RankRule("exact"), RankRule("exact")),
    ],
    ids=str,
)
def test_written_forms(written, rule):
    assert parse_rank(written) == rule


@pytest.mark.parametrize(
    "written",
    [
        0, -1, 1.5, True, "16", "all", None, [], {}, {"energy": 0}, {"energy": 1.1}, {"energy": "much"},
        {"energy": 0.9, "max": 0}, {"energy": 0.9, "maximum": 3}, {"rank": 4, "max": 3}, {"rank": 4, "energy": 0.5},
        {"energy": 0.9, "uniform": "yes"}, {"rank": "some"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_rank_is_refused(written):
    with pytest.raises(RankError, match="rank"):
        parse_rank(written)


def test_ceilings():
    assert parse_rank("keep").ceiling((6, 9), 4) == 4
    assert parse_rank(100).ceiling((6, 9), 4) == 6
    assert parse_rank({"energy": 0.5, "max": 3}).ceiling((6, 9), 4) == 3
    assert parse_rank("exact").ceiling((6, 9), 4) == 6


def test_energy_is_the_smallest_rank_that_holds_its_share():
    energies = [8.0, 1.0, 0.75, 0.25]
    for share, rank in [(0.5, 1), (0.8, 1), (0.81, 2), (0.9, 2), (0.91, 3), (0.975, 3), (0.976, 4), (1, 4)]:
        assert chosen_rank(RankRule("energy", share), 4, energies, 10.0) == rank
    assert chosen_rank(RankRule("energy", 0.99, 2), 2, energies, 10.0) == 2


def test_exact_leaves_out_rounding_only():
    assert chosen_rank(RankRule("exact"), 4, [1.0, 1e-4, 1e-11, 1e-15], 1.0 + 1e-4 + 1e-11) == 3
    assert chosen_rank(RankRule("exact"), 4, [0.0] * 4, 0.0) == 1


def test_a_recipe_is_read_without_torch():
    code = "import sys, raymerge.merging.rank, raymerge.merging.methods; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
