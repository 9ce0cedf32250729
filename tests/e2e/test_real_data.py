"""Train, merge, evaluate and compare on real people and a real pre-trained model: a subset of the benchmark."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ENVIRONMENT, raymerge

pytestmark = pytest.mark.e2e
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "real_personas.py"


@pytest.fixture(scope="module")
def finished(test_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--personas", "8", "--out", folder],
        env={**ENVIRONMENT, "RAYMERGE_TEST_DATA": str(test_data)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_whole_path_on_real_input(finished):
    rows = {row["name"]: row for row in json.loads((finished / "runs/comparison.json").read_text())["rows"]}
    assert set(rows) >= {"base", "unified", "own", "sparse_moe_k5", "random_k5"}
    assert rows["unified"]["nll"] < rows["base"]["nll"]  # 192 answers teach a story-teller what chat looks like


def test_personas_started_from_the_unified_adapter_and_merges_are_anchored_there(finished):
    from raymerge.adapters import load_adapter

    assert load_adapter(str(finished / "adapters/persona_000")).started_from == "unified"
    manifest = json.loads((finished / "runs/sparse_moe_k5/adapters/persona_000/manifest.json").read_text())
    assert manifest["anchor"] is not None


def test_each_command_finds_the_work_of_run_done(finished):
    for command in (["train", "--group-by", "unified"], ["train", "--group-by", "persona"], ["merge"], ["evaluate"]):
        done = raymerge(command[0], finished / "raymerge.yaml", *command[1:], "--local")
        assert done.returncode == 0, done.stderr
        counted = re.search(r"(\d+) items done, (\d+) of them were there already, 0 failed", done.stdout)
        assert counted is not None
        assert counted[1] == counted[2]
