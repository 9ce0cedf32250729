"""The whole path in real processes: `raymerge demo --quick`, again, and after a kill."""

import json
import re
import shutil

import pyarrow.parquet as pq
import pytest
import yaml

from raymerge.cli import main
from tests.e2e.conftest import compared_files, kill_with_children, raymerge, start, wait_for

pytestmark = pytest.mark.e2e


def test_report_is_one_page_that_asks_nothing_of_the_network(quick_demo):
    page = (quick_demo / "runs/report.html").read_text()
    assert "unified" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)


def test_every_row_of_the_comparison_is_there(quick_demo):
    comparison = json.loads((quick_demo / "runs/comparison.json").read_text())
    assert {"base", "own", "unified", "cluster_trained", "sparse_moe_k5", "random_k5", "shuffled", "oracle"} <= {
        row["name"] for row in comparison["rows"]
    }


def test_a_run_of_cluster_average_holds_one_adapter_per_cluster(quick_demo):
    run = quick_demo / "runs/cluster_average"
    assigned = pq.read_table(run / "assignments.parquet")
    clusters = set(json.loads((quick_demo / "runs/_shared/clusters/clusters.json").read_text()).values())
    assert {p.name for p in (run / "adapters").iterdir()} == clusters
    assert set(assigned["adapter"].to_pylist()) == clusters
    lines = (quick_demo / "personas.jsonl").read_text().splitlines()
    assert set(assigned["persona"].to_pylist()) == {json.loads(line)["persona"] for line in lines}


def test_adapters_load_in_peft_as_they_are(quick_demo):
    import peft
    from transformers import AutoModelForCausalLM

    place = next((quick_demo / "runs/sparse_moe_k5/adapters").iterdir())
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(quick_demo / "base"), place)
    assert len(model.get_model_status().active_adapters) == 1


def test_the_same_command_again_computes_nothing(quick_demo):
    before = compared_files(quick_demo)
    times = {p: p.stat().st_mtime_ns for p in quick_demo.rglob("manifest.json")}
    done = raymerge("run", quick_demo / "raymerge.yaml")
    assert done.returncode == 0, done.stderr
    counted = re.search(r"(\d+) items done, (\d+) of them were there already, 0 failed", done.stdout)
    assert counted is not None
    assert counted[1] == counted[2]
    assert compared_files(quick_demo) == before
    assert {p: p.stat().st_mtime_ns for p in quick_demo.rglob("manifest.json")} == times


def test_killed_in_the_middle_ends_with_the_same_bytes(quick_demo, fresh_world, tmp_path):
    """With a part of the demo's recipes, from the training of the personas to the scores."""
    project = yaml.safe_load((fresh_world / "raymerge.yaml").read_text())
    project["recipes"] = {name: project["recipes"][name] for name in ("base", "sparse_moe_k5", "shuffled")}
    (fresh_world / "raymerge.yaml").write_text(yaml.safe_dump(project))
    process = start("run", fresh_world / "raymerge.yaml", log=tmp_path / "log")
    merged = fresh_world / "runs/sparse_moe_k5/adapters"

    def some_merges_are_done():
        assert process.poll() is None, (tmp_path / "log").read_text()
        return len(list(merged.glob("*/manifest.json"))) >= 3

    wait_for(some_merges_are_done, 600, "three merges")
    kill_with_children(process)
    finished = {
        p: p.stat().st_mtime_ns
        for p in fresh_world.rglob("manifest.json")
        if "unfinished" not in json.loads(p.read_text())
    }
    assert len(finished) >= 3
    done = raymerge("run", fresh_world / "raymerge.yaml")
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    undisturbed, resumed = compared_files(quick_demo), compared_files(fresh_world)
    made = ("adapters/", "runs/_shared/embeddings/", "runs/_shared/clusters/",
            *(f"runs/{name}/" for name in project["recipes"]))  # fmt: skip
    assert {name.partition("/")[0] for name in resumed} >= {"adapters", "runs"}
    assert [n for n in undisturbed if n.startswith(made) and resumed.get(n) != undisturbed[n]] == []


def test_local_gives_the_same_bytes_as_ray(quick_demo, tmp_path):
    folder = tmp_path / "local"
    shutil.copytree(quick_demo, folder)
    shutil.rmtree(folder / "runs/sparse_moe_k5")
    done = raymerge("run", folder / "raymerge.yaml", "--recipe", "sparse_moe_k5", "--local")
    assert done.returncode == 0, done.stderr
    name = "runs/sparse_moe_k5"
    assert compared_files(folder / name) == compared_files(quick_demo / name)


def test_one_bad_adapter_fails_the_personas_that_need_it(quick_demo, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(quick_demo, folder, ignore=shutil.ignore_patterns("runs"))
    weights = sorted((folder / "adapters").glob("*/adapter_model.safetensors"))[0]
    weights.write_bytes(weights.read_bytes()[:-100])
    done = raymerge("merge", folder / "raymerge.yaml", "--recipe", "sparse_moe_k5")
    assert done.returncode == 1, done.stderr
    routed = pq.read_table(folder / "runs/sparse_moe_k5/routing.parquet").to_pylist()
    hit = {row["persona"] for row in routed if row["expert"] == weights.parent.name}
    everybody = {row["persona"] for row in routed}
    made = {p.parent.name for p in (folder / "runs/sparse_moe_k5/adapters").glob("*/manifest.json")}
    assert made == everybody - hit
    assert hit
    assert f"failed: merge/sparse_moe_k5/{min(hit)}: {weights.parent.name}: " in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipes": {"x": {"strategy": "sparse_mo"}}}, "unknown strategy 'sparse_mo'. Did you mean sparse_moe?"),
        ({"recipes": {"x": {"strategy": "top_k", "kk": 3}}}, "unknown parameter 'kk'"),
        ({"clusters": {"file": "strangers.json"}}, "nobody_we_know"),
        ({"personas": "absent.jsonl"}, "absent.jsonl"),
        ({"outputs": "x"}, "unknown key `outputs`. Did you mean output?"),
        ({"output": "raymerge.yaml/below"}, "cannot be written"),
    ],
)
def test_bad_input_is_refused_before_any_work(quick_demo, tmp_path, capsys, change, message):
    folder = tmp_path / "bad"
    shutil.copytree(quick_demo, folder, ignore=shutil.ignore_patterns("runs"))
    (folder / "strangers.json").write_text(json.dumps({"nobody_we_know": "cluster_00"}))
    project = yaml.safe_load((folder / "raymerge.yaml").read_text())
    if "recipes" not in change:
        project["recipes"] = {"x": {"strategy": "sparse_moe", "k": 2}}
    (folder / "raymerge.yaml").write_text(yaml.safe_dump({**project, **change}))
    with pytest.raises(SystemExit) as end:  # what a process says and ends with is seen where jobs are refused
        main(["run", str(folder / "raymerge.yaml"), "--local"])
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    assert message in said
    assert "Traceback" not in said
    assert not list(folder.rglob("runs/*/adapters/*"))


def test_where_neighbours_share_nothing_the_report_finds_no_gain(tmp_path):
    """In one world; benchmarks/no_gain.py looks at twenty."""
    done = raymerge("demo", "--quick", "--relatedness", "0", "--seed", "1", "--out", tmp_path, "--local")
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads((tmp_path / "runs/comparison.json").read_text())["verdict"]
    assert not re.search(r"gains [0-9.]+ points", verdict["headline"]), verdict
    assert "gains" not in (verdict["reference"]["outcome"], verdict["control"]["outcome"]), verdict
