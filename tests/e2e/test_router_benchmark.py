"""The router's benchmark: what it calls better, and that it reads the world it was given and writes elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import ENVIRONMENT, compared_files

pytestmark = pytest.mark.e2e
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "router.py"


def test_a_router_is_called_not_better_unless_its_interval_lies_above_the_other_rows(quick_demo, tmp_path):
    before = compared_files(quick_demo)
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--only", "quality", "whole", "--against", "top_k", "--trials", "2", "--seeds", "1",
         "--world", quick_demo, "--out", tmp_path / "out", "--json", tmp_path / "found.json"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    quality = found["quality"]
    _, low, high = quality["beside"]["top_k"]["learned less it, 95 % interval"]
    assert low <= high
    assert quality["headline"].startswith("not better") == (low <= 0)
    metrics = pq.read_table(tmp_path / "out/world/made/seed_0/learned_router/evaluation/metrics.parquet")
    assert quality["by seed"] == [pytest.approx(100 * sum(metrics["similarity"].to_pylist()) / len(metrics))]
    assert found["whole"]["rows a second"][0] > 0
    assert compared_files(quick_demo) == before  # the world it was given is only read
