"""Being connected to Ray: to the Ray cluster this job belongs to, or to one that is started on this machine for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import raymerge

_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # else it depends on the machine's past whether tokens are asked for
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray does from now on, without its warning
}
_OBJECT_STORE_BYTES = 256 * 1024**2  # items and answers are small; data pass by files


@contextmanager
def connected() -> Iterator[Any]:
    """The `ray` module, connected. What this connects it also disconnects.

    Ray that the program has initialised is used as it is. Inside `ray job submit`, or where RAY_ADDRESS is set, that
    Ray cluster is joined. Otherwise one is started on this machine, without a dashboard, and ended afterwards.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray  # here, since Ray reads its environment when it is loaded

    if ray.is_initialized():
        yield ray
        return
    ray.init(**init_options(os.environ))
    try:
        yield ray
    finally:
        ray.shutdown()


def init_options(environment: os._Environ[str] | dict[str, str]) -> dict[str, Any]:
    """Arguments of `ray.init` for this environment."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if environment.get("RAY_ADDRESS", "local") == "local":
        own = {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        return {**quiet, **own, "job_config": _find_code_here()}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment or _is_installed():
        return quiet  # a submitted job brings its working directory along
    return {**quiet, "runtime_env": {"py_modules": [str(_package())]}}


def _find_code_here() -> Any:
    """Workers of this machine import raymerge from where this process did, whatever the working directory."""
    import ray.job_config

    return ray.job_config.JobConfig(_py_driver_sys_path=[str(_package().parent)])


def _package() -> Path:
    return Path(raymerge.__file__).resolve().parent


def _is_installed() -> bool:
    return _package().parent.name in ("site-packages", "dist-packages")
