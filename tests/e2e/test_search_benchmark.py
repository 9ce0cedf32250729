"""What the search's benchmark compares with mergekit's way is the same thing computed in two ways."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ENVIRONMENT, compared_files

pytestmark = pytest.mark.e2e
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "search.py"


def test_a_candidate_scores_the_same_merged_by_mergekit_saved_and_loaded(quick_demo, tmp_path):
    before = compared_files(quick_demo)
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--only", "evolve", "--world", quick_demo, "--out", tmp_path / "out",
         "--personas", "6", "--candidates", "1", "--trials", "3", "--json", tmp_path / "found.json"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert found["evolve"]["largest difference in similarity, points"] < 1
    assert found["evolve"]["ratio, exact"] > 0
    assert compared_files(quick_demo) == before  # the world it was given is only read
