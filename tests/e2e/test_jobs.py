"""`ray job submit` on a real `ray start --head`, with tokens on and a dashboard on the loopback interface."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from tests.e2e.conftest import ENVIRONMENT, wait_for

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def head(tmp_path):
    """A Ray head on free loopback ports; yields the address of its job server. Only what it started is ended."""
    gcs, dashboard, agent = free_port(), free_port(), free_port()
    token = tmp_path / "token"
    token.write_text("a-token-of-this-test-alone-0123456789abcdef")
    environment = {**ENVIRONMENT, "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": "/tmp"}
    environment.pop("RAY_ADDRESS", None)
    command = [
        RAY, "start", "--head", "--block", f"--port={gcs}", "--node-ip-address=127.0.0.1", "--num-cpus=2",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        "--include-dashboard=true", "--disable-usage-stats",
    ]  # fmt: skip
    with open(tmp_path / "head.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:

        def answers():
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            listed = subprocess.run(
                [RAY, "job", "list", "--address", f"http://127.0.0.1:{dashboard}"],
                env=environment, capture_output=True, check=False,
            )  # fmt: skip
            return listed.returncode == 0

        wait_for(answers, 120, "the job server")
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        started = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        for one in reversed(started):
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()


def submit(head, *command):
    address, environment = head
    return subprocess.run(
        [RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--", "python", *map(str, command)],
        env={**environment, "RAY_RUNTIME_ENV_IGNORE_GITIGNORE": "0"}, capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip


def test_jobs_run_by_submission(head, fresh_world, quick_demo):
    project = fresh_world / "raymerge.yaml"
    told = yaml.safe_load(project.read_text())
    told["hardware"] = {"max_model_workers": 1, "max_merge_workers": 1}  # each takes long to start
    told["search"] = {"ranks": [8]}
    told["router"] = {"epochs": 1, "k": 4, "trials": 2}
    project.write_text(yaml.safe_dump(told))
    os.symlink(quick_demo / "adapters", fresh_world / "adapters")
    merged = submit(head, "jobs/merge.py", project, "--recipe", "sparse_moe_k5")
    assert merged.returncode == 0, merged.stdout + merged.stderr
    made = sorted(p.parent.name for p in (fresh_world / "runs/sparse_moe_k5/adapters").glob("*/manifest.json"))
    assert made == sorted(p.name for p in (quick_demo / "runs/sparse_moe_k5/adapters").iterdir())
    for name in made:
        file = f"runs/sparse_moe_k5/adapters/{name}/adapter_model.safetensors"
        assert (fresh_world / file).read_bytes() == (quick_demo / file).read_bytes()
    trained = submit(head, "jobs/train.py", project, "--group-by", "unified")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert (fresh_world / "unified/manifest.json").read_bytes() == (quick_demo / "unified/manifest.json").read_bytes()
    run = submit(head, "jobs/run.py", project, "--recipe", "base", "--recipe", "unified")
    assert run.returncode == 0, run.stdout + run.stderr
    assert (fresh_world / "runs/unified/evaluation/summary.json").exists()
    assert (fresh_world / "runs/report.html").exists()
    routed = submit(head, "jobs/router.py", project)
    assert routed.returncode == 0, routed.stdout + routed.stderr
    assert len(json.loads((fresh_world / "runs/router/router.json").read_text())["history"]) == 2
    rows = {row["name"] for row in json.loads((fresh_world / "runs/comparison.json").read_text())["rows"]}
    assert {"learned_router", "learned_router_random_k", "learned_router_unified"} <= rows
    refused = submit(head, "jobs/merge.py", fresh_world / "absent.yaml")
    assert refused.returncode != 0
    assert "there is no such project file" in refused.stdout + refused.stderr
