"""Which Ray is joined, from the environment alone."""

from pathlib import Path

import raymerge
from raymerge.runtime.connection import init_options

ROOT = Path(raymerge.__file__).resolve().parent


def test_without_an_address_ray_is_started_here_without_a_dashboard():
    options = init_options({})
    assert options["address"] == "local"
    assert options["include_dashboard"] is False
    assert options["job_config"]._py_driver_sys_path == [str(ROOT.parent)]


def test_an_address_is_joined_and_a_checkout_is_sent_along():
    options = init_options({"RAY_ADDRESS": "10.0.0.1:6379"})
    assert "address" not in options
    assert options.get("runtime_env", {"py_modules": [str(ROOT)]}) == {"py_modules": [str(ROOT)]}


def test_a_submitted_job_has_its_working_directory():
    options = init_options({"RAY_ADDRESS": "10.0.0.1:6379", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"})
    assert options == {"log_to_driver": False, "logging_level": "ERROR"}
