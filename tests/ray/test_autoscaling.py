"""A Ray cluster that starts with a head without CPUs, as `ray up cluster.yaml` makes it, and grows with the work."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from ray.autoscaler._private.util import prepare_config

from raymerge.adapters import LoraAdapter, LoraModule, save_adapter

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


def hardware() -> dict[str, Any]:
    """What cluster.yaml tells people to write into the project file."""
    found = re.search(r"hardware: (\{.*\})", (ROOT / "cluster.yaml").read_text())
    assert found is not None
    return dict(yaml.safe_load(found[1]))


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The cluster of cluster.yaml with machines that are processes here; yields the environment of a driver."""
    (home := tmp_path / "home").mkdir()
    port, dashboard, agent = free_ports(3)
    address = f"127.0.0.1:{port}"
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))  # as `ray up` sends it to the head
    types = config["available_node_types"]
    types["ray.head.default"] = {**types.pop("head"), "max_workers": 0}  # the name that Ray's pretended provider knows
    config |= {
        "provider": {
            "type": "fake_multinode", "gcs_address": address, "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default", "file_mounts": {}, "setup_commands": [], "head_setup_commands": [],
    }  # fmt: skip
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(config))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {
        "HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    command = [
        RAY, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=0",
        "--num-gpus=0", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", "--object-store-memory=100000000",
        f"--autoscaling-config={tmp_path / 'cluster.yaml'}",
    ]  # fmt: skip
    with open(tmp_path / "head.log", "wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while subprocess.run(
            [RAY, "health-check", "--address", address], env=environment, capture_output=True
        ).returncode:
            assert head.poll() is None, (tmp_path / "head.log").read_text()
        yield {**environment, "RAY_ADDRESS": address}
    finally:
        started = [head, *psutil.Process(head.pid).children(recursive=True)] if head.poll() is None else []
        for process in reversed(started):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        head.wait()


def write_project(folder: Path, hardware: dict[str, Any]) -> str:
    for number, name in enumerate(["ann", "bob"]):
        modules = {"model.layers.0.mlp.up_proj": LoraModule(torch.ones(1, 4), torch.full((6, 1), number + 1.0), 1.0)}
        save_adapter(
            LoraAdapter(name, modules, base_model="tiny", task_type="CAUSAL_LM"), str(folder / "adapters" / name)
        )
    (folder / "p.yaml").write_text(
        yaml.safe_dump({"hardware": hardware, "recipes": {"avg": {"strategy": "simple_average", "rank": 1}}})
    )
    return str(folder / "p.yaml")


def test_a_job_starts_the_machines_it_needs(cluster: dict[str, str], tmp_path: Path):
    def merge(settings: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "raymerge.cli", "merge", write_project(tmp_path, settings)]
        return subprocess.run(command, env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=100)

    refused = merge({})
    assert refused.returncode == 2
    assert "workers of kind merge: not even one fits on the Ray cluster" in refused.stderr
    assert "hardware.autoscaling" in refused.stderr
    done = merge({**hardware(), "ready_deadline": 90})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "avg" / "adapters" / "all" / "manifest.json").exists()
