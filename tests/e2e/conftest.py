"""Real processes: one quick demo for all tests, and ways to start, wait for and end what a test started."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ENVIRONMENT = {
    **os.environ,
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # `python` of a submitted job
    "RAY_AUTH_MODE": "token",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "COLUMNS": "80",
}
WORLD = ("base", "personas.jsonl", "clusters.json", "traits.parquet", "world.json", "raymerge.yaml")


def raymerge(*arguments: str, timeout: float = 900, **options) -> subprocess.CompletedProcess:
    """Run a command to its end and keep what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "raymerge.cli", *map(str, arguments)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False, **options,
    )  # fmt: skip


def start(*arguments: str, log: Path) -> subprocess.Popen:
    """Start a command; its output goes to a file."""
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "raymerge.cli", *map(str, arguments)], env=ENVIRONMENT, stdout=file, stderr=file
        )


def wait_for(condition: Callable[[], bool], deadline_s: float, what: str) -> None:
    """Poll a condition; fail with its name when the deadline passes."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.05)


def kill_with_children(process: subprocess.Popen) -> None:
    """SIGKILL a process that a test started, then everything it had started."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(children, timeout=30)


def compared_files(folder: Path) -> dict[str, bytes]:
    """Every file of a project that must not depend on when, where and how often it was made."""
    kept = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        apart = path.name in ("timings.jsonl", "report.html", "comparison.json") or "/plots/" in name
        if path.is_file() and not apart and not path.name.startswith("."):
            kept[name] = path.read_bytes()
    return kept


@pytest.fixture(scope="session")
def quick_demo(tmp_path_factory) -> Path:
    """A finished `raymerge demo --quick`."""
    folder = tmp_path_factory.mktemp("demo")
    done = raymerge("demo", "--quick", "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def fresh_world(quick_demo, tmp_path) -> Path:
    """The quick demo's world before anything was trained on it."""
    folder = tmp_path / "world"
    folder.mkdir()
    for name in WORLD:
        source = quick_demo / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder
