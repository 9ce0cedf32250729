"""The files beside the code: what they claim must be so."""

import functools
import re
import runpy
import tomllib
from pathlib import Path

import pytest
import yaml

from raymerge.config import load_project

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_named_file_exists(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"\b((?:raymerge|jobs|benchmarks|tests)/[\w/]+\.(?:py|yaml|md))\b", text)
    missing = [name for name in {*links, *named} if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_named_exists(page):
    from raymerge.cli import app

    known = {command.callback.__name__ for command in app.registered_commands}
    named = set(re.findall(r"(?:^    |`)raymerge (\w+)", page.read_text(), re.MULTILINE))
    assert named - known == set()


def test_the_readme_s_project_file_is_read(tmp_path):
    from raymerge.recipes import parse_recipes

    block = re.search(r"## A project file\n\n((?:    .*\n)+)", (ROOT / "README.md").read_text())
    (tmp_path / "p.yaml").write_text(re.sub("^    ", "", block[1], flags=re.MULTILINE))
    project = load_project(str(tmp_path / "p.yaml"))
    assert set(parse_recipes(project.recipes)) == {"unified", "own", "sparse_moe_k5", "random_k5"}


def test_the_project_file_of_a_large_model_is_read_and_its_bytes_are_sums(tmp_path):
    page = (ROOT / "docs/large-models.md").read_text()
    block = re.search(r"\n\n((?:    .*\n)+)", page)
    (tmp_path / "p.yaml").write_text(re.sub("^    ", "", block[1], flags=re.MULTILINE))
    hardware = load_project(str(tmp_path / "p.yaml")).hardware
    assert (hardware.gpus_per_model, hardware.dtype, hardware.quantization) == (1, "bfloat16", "none")
    linear, embeddings = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096
    factors = 8 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    sums = {
        "float32": 4 * (linear + embeddings), "bfloat16 or float16": 2 * (linear + embeddings),
        "8bit": linear + 2 * embeddings, "4bit": 0.516 * linear + 2 * embeddings,
    }  # fmt: skip
    stated = {name: float(re.search(rf"\| base, {name} \|.*\| ([\d.]+) GB", page)[1]) for name in sums}
    assert stated == pytest.approx({name: bytes / 1e9 for name, bytes in sums.items()}, abs=0.06)
    assert f"({factors / 1e6:.1f}e6 numbers" in page
    assert f"| {18 * factors / 1e6:.0f} MB" in page


def test_cluster_yaml_is_what_ray_takes_and_keeps_work_off_the_head(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.setenv("HOME", str(tmp_path))
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(dict(config)))
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert "0.0.0.0" not in (ROOT / "cluster.yaml").read_text()
    with pytest.raises(Exception, match="wrokers"):
        validate_config(prepare_config({**config, "max_wrokers": 1}))


def test_every_file_of_the_package_is_in_its_wheel():
    package = ROOT / "raymerge"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["raymerge"]
    carried = {path for pattern in patterns for path in package.glob(pattern)}
    there = {p for p in package.rglob("*") if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts}
    assert there - carried == set()
    assert package / "world/topics.txt" in carried


def test_the_token_reaches_every_machine_of_cluster_yaml_before_ray_starts():
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for page in ("cluster.yaml", "README.md"):
        text = (ROOT / page).read_text()
        assert 0 < text.index("ray get-auth-token --generate") < text.index("ray up cluster.yaml")


def test_the_machines_of_cluster_yaml_hold_the_workers_it_tells_to_ask_for(tmp_path, monkeypatch):
    """What Ray's autoscaler would start for them, from a head that takes no work."""
    pytest.importorskip("ray")
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
    from ray.autoscaler._private.util import prepare_config

    from raymerge.pipelines.job import worker_kinds
    from raymerge.runtime.kinds import plan_autoscaling

    monkeypatch.setenv("HOME", str(tmp_path))
    told = re.search(r"hardware: (\{.*\})", (ROOT / "cluster.yaml").read_text())[1]
    assert f"`hardware: {told}`" in (ROOT / "README.md").read_text()
    (tmp_path / "p.yaml").write_text(f"base_model: base\nhardware: {told}\n")
    plan = plan_autoscaling(worker_kinds(load_project(str(tmp_path / "p.yaml")), "base"))
    assert plan.counts == {"merge": 16, "model": 8}
    asked = [{"CPU": n.cpus, "GPU": n.gpus} for kind, n in plan.needs.items() for _ in range(plan.counts[kind])]
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    types, head = config["available_node_types"], config["head_node_type"]
    score = functools.partial(_default_utilization_scorer, node_availability_summary=None)
    started, left = get_nodes_for(types, {head: 1}, head, config["max_workers"], asked, score)
    assert (started, left) == ({"gpu_worker": 8}, [])


@pytest.mark.parametrize("job", sorted((ROOT / "jobs").glob("*.py")), ids=lambda job: job.name)
def test_jobs_are_the_commands_of_the_same_name(job, monkeypatch):
    called = []
    monkeypatch.setattr("raymerge.cli.main", called.append)
    monkeypatch.setattr("sys.argv", [str(job), "raymerge.yaml", "--option"])
    runpy.run_path(str(job), run_name="__main__")
    assert called == [[job.stem, "raymerge.yaml", "--option"]]
    assert len(job.read_text().splitlines()) <= 60
    assert f"jobs/{job.name}" in job.read_text()


def test_long_tables_of_the_documents_stay_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60
