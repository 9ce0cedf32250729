"""`raymerge fuse`: it writes what merge gives, its figures are those of the dense deltas, nothing is overwritten."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from raymerge import load_adapter, merge, save_adapter
from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.adapters.formats import encode_adapter
from raymerge.cli import main
from raymerge.errors import MergeError
from raymerge.merging.methods import METHODS
from raymerge.pipelines.fusion.options import named_parameters, understand
from raymerge.pipelines.fusion.request import Request
from tests.pipelines.conftest import SHAPES, make_adapter


@pytest.fixture
def here(adapters, monkeypatch) -> Path:
    """Adapters p0 to p5 in the working directory, 80 columns wide."""
    monkeypatch.chdir(adapters / "adapters")
    monkeypatch.setenv("COLUMNS", "80")
    return adapters / "adapters"


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0)


def fuse(*arguments: str) -> int:
    return status("fuse", *arguments)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def written(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if name.startswith("adapter")}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def meant(**options):
    return understand(Request(**{"adapters": ["p0", "p1"], "out": "out", **options}))


def dense(adapter: LoraAdapter) -> torch.Tensor:
    return torch.cat([adapter.modules[path].delta(torch.float64).flatten() for path in sorted(adapter.modules)])


# What is written


def test_the_adapter_is_what_merge_gives(here, capsys):
    before = files(here)
    assert fuse("p1", "p0", "--out", "out", "--weights", "0.6,0.3", "--method", "ties", "--density", "0.4") == 0
    expected = merge([load_adapter("p1"), load_adapter("p0")], [0.6, 0.3], method="ties", density=0.4)
    assert written(here / "out") == encode_adapter(expected)
    assert sorted(files(here / "out")) == [
        "adapter_config.json", "adapter_model.safetensors", "fusion_report.md", "manifest.json",
    ]  # fmt: skip
    found = manifest(here / "out")
    assert [(e["name"], e["weight"], e["location"]) for e in found["experts"]] == [("p0", 0.3, "p0"), ("p1", 0.6, "p1")]
    assert found["merges"]["method_parameters"] == {"density": 0.4, "majority_sign": "total"}
    assert found["merges"]["dtype"] == "float32"
    assert found["error"] == expected.errors["*"]
    assert found["errors"] == {path: error for path, error in expected.errors.items() if path != "*"}
    assert {name: data for name, data in files(here).items() if not name.startswith("out/")} == before
    assert "weights sum to 0.9" in capsys.readouterr().out


def test_figures_are_those_of_the_dense_deltas(here):
    save_adapter(make_adapter("start", 5), "start")
    assert fuse("p0", "p4", "--out", "out", "--weights", "0.5,-0.25", "--anchor", "start", "--rank", "exact") == 0
    start = dense(load_adapter("start"))
    inputs = [dense(load_adapter(name)) - start for name in ("p0", "p4")]
    result = dense(load_adapter("out")) - start
    found = manifest(here / "out")
    norms = [float(x.norm()) for x in inputs]
    assert [e["norm"] for e in found["experts"]] == pytest.approx(norms, rel=1e-6)
    assert found["figures"]["norm"] == pytest.approx(float(result.norm()), rel=1e-5)
    assert found["figures"]["ratio"] == pytest.approx(
        float(result.norm()) / (0.5 * norms[0] + 0.25 * norms[1]), rel=1e-5
    )
    cosines = [float(torch.cosine_similarity(x, result, dim=0)) for x in inputs]
    assert [e["cosine"] for e in found["experts"]] == pytest.approx(cosines, abs=1e-6)
    between = float(torch.cosine_similarity(*inputs, dim=0))
    table = [value for row in found["similarities"] for value in row]
    assert table == pytest.approx([1, between, between, 1], abs=1e-6)


def test_above_64_inputs_pairs_are_left_out(here, monkeypatch):
    monkeypatch.setattr("raymerge.pipelines.fusion.figures.MOST_SIMILARITIES", 1)
    save_adapter(make_adapter("start", 5), "start")
    assert fuse("p0", "p4", "--out", "out", "--anchor", "start") == 0
    few = manifest(here / "out")
    assert few["similarities"] is None
    assert "inspect --similarity" in (here / "out/fusion_report.md").read_text()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert fuse("p0", "p4", "--out", "other", "--anchor", "start") == 0
    many = manifest(here / "other")
    for key in ("norm", "cosine"):
        assert [e[key] for e in few["experts"]] == pytest.approx([e[key] for e in many["experts"]], rel=1e-9)
    for key, value in many["figures"].items():
        assert few["figures"][key] == pytest.approx(value)


def test_one_adapter_is_rewritten_in_another_format(here):
    assert fuse("p0", "--out", "out", "--format", "mlx") == 0
    assert "adapters.safetensors" in files(here / "out")
    assert torch.allclose(dense(load_adapter("out")), dense(load_adapter("p0")), rtol=1e-5, atol=1e-6)
    assert "mlx_lm.generate" in (here / "out/fusion_report.md").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--weights", "0.7, 0.5"],
        ["--weights", '[0.2, 0.8], {"*.v_proj": 0.25, "*": 1}', "--rank", "3", "--uniform"],
        ["--method", "dare_ties", "--param", "density=[0.3, 0.9]", "--seed", "4", "--scale", "match_norm"],
        ["--method", "ties", "--density", '{"*.v_proj": 0.8}', "--majority-sign", "frequency", "--rank", "0.9"],
        ["--method", "slerp", "--t", "1e-1", "--dtype", "bfloat16", "--name", "mine"],
        ["--anchor", "p5", "--scale", "0.5"],
    ],
)
def test_the_command_in_the_report_makes_it_again(here, arguments):
    assert fuse("p0", "other=p1", "--out", "an out", *arguments) == 0
    block = re.search(r"```sh\n(.*?)```", (here / "an out/fusion_report.md").read_text(), re.DOTALL)
    words = shlex.split(block[1].replace("\\\n", ""))
    assert words[:2] == ["raymerge", "fuse"]
    before = manifest(here / "an out")
    (here / "an out").rename(here / "before")
    assert status(*words[1:]) == 0
    assert files(here / "an out") == files(here / "before")
    assert manifest(here / "an out") == before


def test_locations_may_be_uris(here):
    assert fuse(f"file://{here}/p0", f"file://{here}/p1", "--out", f"file://{here}/out") == 0
    assert written(here / "out") == encode_adapter(merge([load_adapter("p0"), load_adapter("p1")], [0.5, 0.5]))


# What is said


def test_what_to_beware_of_is_said_in_terminal_and_report(here, capsys):
    alien = make_adapter("alien", 77)
    save_adapter(LoraAdapter("alien", alien.modules, base_model="another"), "a-name-that-is-long-enough-to-be-cut|x")
    assert fuse("p0", "a-name-that-is-long-enough-to-be-cut|x", "--out", "out", "--rank", "1") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    text = " ".join(out.split())
    report = (here / "out/fusion_report.md").read_text()
    for warning in ("name different base models", "The rank loses", "--scale match_norm restores it"):
        assert warning in text
        (whole,) = (w for w in manifest(here / "out")["warnings"] if warning in w)
        assert "**Warning.** " + whole.replace("|", "\\|") in report
    assert fuse("p0", "a-name-that-is-long-enough-to-be-cut|x", "--out", "exact", "--rank", "exact", "--scale",
                "match_norm") == 0  # fmt: skip
    assert [w for w in manifest(here / "exact")["warnings"] if "different base" not in w] == []
    assert manifest(here / "exact")["figures"]["ratio"] == pytest.approx(1, rel=1e-5)


def test_a_slerp_says_which_end_is_which(here, capsys):
    assert fuse("z=p0", "a=p1", "--out", "out", "--method", "slerp", "--t", "0") == 0
    assert "t = 0 is a, t = 1 is z" in " ".join(capsys.readouterr().out.split())
    assert torch.allclose(dense(load_adapter("out")), dense(load_adapter("p1")), rtol=1e-4, atol=1e-6)


def test_what_adapters_were_trained_from_is_offered_as_anchor(here, capsys):
    for name, seed in (("a", 1), ("b", 2)):
        save_adapter(make_adapter(name, seed, started_from="unified"), name)
    assert fuse("a", "b", "--out", "out") == 0
    assert "trained from unified: --anchor" in " ".join(capsys.readouterr().out.split())


def test_it_explains_what_others_would_have_computed(here, capsys):
    assert fuse("p0", "p1", "--out", "out", "--explain", "--weights", "0.5,0.4", "--method", "ties") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    report = (here / "out/fusion_report.md").read_text()
    for text in (" ".join(out.split()), " ".join(report.split())):
        assert 'peft add_weighted_adapter(combination_type="ties_svd", density=0.2' in text
        assert "mergekit merge_method: ties" in text
    assert "## ties here and elsewhere" in report
    assert fuse("p0", "p1", "--out", "out", "--explain", "--weights", "0.5,0.4", "--method", "ties") == 0
    assert "there already" in capsys.readouterr().out
    assert fuse("p0", "p1", "--out", "more", "--explain", "--sweep", "50/50,slerp:50/50,slerp:150/-50") == 1
    out = capsys.readouterr().out
    assert "50-50 elsewhere:" in out
    assert "slerp-150--50 elsewhere:\np1: weight" in out


def test_a_dialect_gives_the_numbers_of_its_library(here, capsys):
    theirs = ["--dialect", "peft", "--method", "ties_svd", "--density", "0.3"]
    assert fuse("p0", "p1", "--out", "out", *theirs, "--param", "majority_sign_method=frequency") == 0
    expected = merge([load_adapter("p0"), load_adapter("p1")], [0.5, 0.5], dialect="peft", method="ties_svd",
                     density=0.3, majority_sign_method="frequency")  # fmt: skip
    assert written(here / "out") == encode_adapter(expected)
    assert "computed as peft does" in " ".join(capsys.readouterr().out.split())
    assert status("methods", "ties_svd", "--dialect", "peft") == 0
    assert "density  (a" in capsys.readouterr().out


# Folders that hold something


def test_the_same_fuse_again_does_nothing(here, capsys):
    assert fuse("p0", "p1", "--out", "out") == 0
    times = {path: path.stat().st_mtime_ns for path in (here / "out").iterdir()}
    first = capsys.readouterr().out
    assert fuse("p1", "p0", "--out", "out") == 0
    again = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (here / "out").iterdir()} == times
    assert "there already" in again
    assert first.splitlines()[:-1] == again.splitlines()[:-1]


def test_another_fuse_is_replaced_only_by_force(here, capsys):
    assert fuse("p0", "p1", "--out", "out") == 0
    before = files(here / "out")
    assert fuse("p0", "p1", "--out", "out", "--method", "ties", "--format", "mlx") == 2
    message = capsys.readouterr().err
    assert message.startswith(f"raymerge: {here}/out: holds another fuse.\n")
    assert "method: 'linear' there, 'ties' now" in message
    assert files(here / "out") == before
    assert fuse("p0", "p1", "--out", "out", "--method", "ties", "--format", "mlx", "--force") == 0
    assert "adapter_model.safetensors" not in files(here / "out")


def test_changed_inputs_are_another_fuse(here, capsys):
    assert fuse("p0", "p1", "--out", "out") == 0
    save_adapter(make_adapter("p1", 99), "p1")
    assert fuse("p0", "p1", "--out", "out") == 2
    assert "holds another fuse.\np1: its files have changed\nChoose" in capsys.readouterr().err
    assert fuse("p0", "p2", "--out", "out", "--weights", "0.7,0.3") == 2
    message = capsys.readouterr().err
    assert "adapters: p0, p1 there, p0, p2 now\nweight of p0: 0.5 there, 0.7 now\n" in message


@pytest.mark.parametrize("more", [[], ["--force"]])
@pytest.mark.parametrize("sweep", [[], ["--sweep", "50/50"]])
def test_what_others_wrote_is_never_touched(here, capsys, more, sweep):
    (here / "out").mkdir()
    (here / "out/notes.txt").write_text("mine")
    assert fuse("p0", "p1", "--out", "out", *more, *sweep) == 2
    assert capsys.readouterr().err.startswith(f"raymerge: {here}/out: is not empty")
    assert files(here / "out") == {"notes.txt": b"mine"}
    before = files(here / "p0")
    assert fuse("p0", "p1", "--out", "p0", *more) == 2
    assert capsys.readouterr().err.startswith(f"raymerge: {here}/p0: is one of the adapters to fuse")
    assert files(here / "p0") == before


def test_an_interrupted_fuse_is_finished(here):
    assert fuse("p0", "p1", "--out", "whole") == 0
    (here / "out").mkdir()
    (here / "out/manifest.json").write_text('{"unfinished": true, "kind": "fuse"}')
    (here / "out/adapters.safetensors").write_bytes(b"of the format that was asked for then")
    assert fuse("p0", "p1", "--out", "out") == 0
    assert written(here / "out") == written(here / "whole")


# Sweeps


def test_a_sweep_is_its_fuses_side_by_side(here, capsys, monkeypatch):
    read = []
    from raymerge.pipelines.fusion import inputs as pipeline

    whole = pipeline.read_adapter
    monkeypatch.setattr(pipeline, "read_adapter", lambda *a, **k: read.append(a[1]) or whole(*a, **k))
    sweep = "50/50,70/30,slerp:0.5,ties:0.2,dare_linear:seed=3:150/-50"
    assert fuse("p0", "p4", "--out", "out", "--sweep", sweep, "--rank", "exact") == 0
    assert read == ["p0", "p4"]
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    names = ["50-50", "70-30", "slerp-0.5", "ties-0.2", "dare_linear-seed-3-150--50"]
    assert sorted(path.name for path in (here / "out").iterdir()) == sorted(
        [*names, "manifest.json", "sweep.json", "sweep_report.md"]
    )
    report = (here / "out/sweep_report.md").read_text()
    for name in names:
        assert name[:10] in out
        assert (here / "out" / name / "fusion_report.md").exists()
        assert f"[{name}]({name}/fusion_report.md)" in report
    a, b = load_adapter("p0"), load_adapter("p4")
    for name, expected in {
        "70-30": merge([a, b], [0.7, 0.3], rank="exact"),
        "slerp-0.5": merge([a, b], [0.5, 0.5], method="slerp", t=0.5, rank="exact"),
        "dare_linear-seed-3-150--50": merge([a, b], [1.5, -0.5], method="dare_linear", seed=3, rank="exact"),
    }.items():
        assert written(here / "out" / name) == encode_adapter(expected)


def test_a_sweep_may_be_extended_and_goes_on(here, capsys):
    assert fuse("p0", "p1", "--out", "out", "--sweep", "50/50,ties:0.2", "--density", "0.3") == 0
    before = files(here / "out/50-50")
    for name in ("manifest.json", "sweep.json", "sweep_report.md"):
        (here / "out" / name).unlink()  # as if it had been interrupted
    (here / "out/ties-0.2/manifest.json").write_text('{"unfinished": true, "kind": "fuse"}')
    capsys.readouterr()
    assert fuse("p0", "p1", "--out", "out", "--sweep", "50/50,ties:0.2,ties", "--density", "0.3") == 0
    assert "3 adapters below out, 1 of them there already" in capsys.readouterr().out
    assert files(here / "out/50-50") == before
    assert manifest(here / "out/ties")["merges"]["method_parameters"]["density"] == 0.3
    assert fuse("p0", "p1", "--out", "out") == 2  # a single fuse does not go over a sweep


def test_one_of_a_sweep_may_fail(here, capsys):
    assert fuse("p0", "p1", "--out", "out", "--sweep", "150/-50,slerp:150/-50") == 1
    assert "failed: slerp-150--50: p1: weight -0.5 is negative" in capsys.readouterr().out
    assert (here / "out/150--50/adapter_model.safetensors").exists()
    assert "slerp-150--50: p1: weight" in (here / "out/sweep_report.md").read_text()
    assert fuse("p0", "p1", "--out", "other", "--sweep", "slerp:150/-50") == 2
    assert capsys.readouterr().err.startswith("raymerge: p1: weight -0.5 is negative")


def test_a_list_in_a_sweep_is_one_value(here):
    found = meant(sweep='ties:density=[0.2,0.8],70/30, ties:density={"*.v_proj": 0.8, "*": [0.1, 1]}:60/40').fusions
    assert [fusion.parameters for fusion in found] == [
        {"density": [0.2, 0.8]}, {}, {"density": {"*.v_proj": 0.8, "*": [0.1, 1]}},
    ]  # fmt: skip
    assert [fusion.weights for fusion in found] == [(0.5, 0.5), (0.7, 0.3), (0.6, 0.4)]
    names = ["ties-density-0.2-0.8", "70-30", "ties-density-.v_proj-0.8--0.1-1-60-40"]
    assert [fusion.name for fusion in found] == names
    with pytest.raises(MergeError, match="cannot be read"):
        meant(sweep="ties:density=[0.2,0.8,70/30")


def test_figures_take_one_table_of_inner_products(here, monkeypatch):
    from raymerge.merging import gram as module

    sizes, whole = [], module.gram
    monkeypatch.setattr(module, "gram", lambda adapters, *a: sizes.append(len(adapters)) or whole(adapters, *a))
    assert fuse("p0", "p1", "p2", "--out", "out", "--method", "linear") == 0
    assert sizes == [4]
    sizes.clear()
    monkeypatch.setattr("raymerge.pipelines.fusion.figures._ROW", 2)
    assert fuse("p0", "p1", "p2", "--out", "many", "--anchor", "p5", "--sweep", "50/25/25,20/40/40") == 0
    assert sizes == [5, 4, 3]  # all with each other once, then rows of two
    assert fuse("p0", "p1", "p2", "--out", "one", "--anchor", "p5", "--weights", "0.2,0.4,0.4") == 0
    row, alone = manifest(here / "many/20-40-40"), manifest(here / "one")
    assert row["similarities"] == alone["similarities"]
    for one, other in zip(row["experts"], alone["experts"], strict=True):
        assert one["cosine"] == pytest.approx(other["cosine"])
        assert one["norm"] == pytest.approx(other["norm"])


# What is written on the command line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, (0.5, 0.5)),
        ("0.6,0.4", (0.6, 0.4)),
        ("-1, 1e-3", (-1.0, 0.001)),
        ("[0.2, 0.8], .5", ([0.2, 0.8], 0.5)),
        ('{"*.v_proj": 0.8, "*": [0, 1]}, 2', ({"*.v_proj": 0.8, "*": [0.0, 1.0]}, 2.0)),
    ],
)
def test_weights_as_written(here, text, expected):
    assert meant(weights=text).fusions[0].weights == expected


def test_weights_from_a_file_and_normalised(here):
    Path("w.yaml").write_text("p1: 3\np0: 1\n")
    assert meant(weights_file="w.yaml").fusions[0].weights == (1.0, 3.0)
    assert meant(weights_file="w.yaml", normalize=True).fusions[0].weights == (0.25, 0.75)
    Path("w.json").write_text('{"p0": {"*.q_proj": 1e-1}, "p1": [0, 1]}')
    assert meant(weights_file="w.json").fusions[0].weights == ({"*.q_proj": 0.1}, [0.0, 1.0])


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("keep", "keep"),
        ("16", 16),
        ("010", 10),
        ("0.95", {"energy": 0.95}),
        ("{energy: 0.9, max: 32}", {"energy": 0.9, "max": 32}),
    ],
)
def test_ranks_as_written(here, written, expected):
    assert meant(rank=written).rank == expected
    uniform = meant(rank=written, uniform=True).rank
    assert uniform == ({**expected, "uniform": True} if isinstance(expected, dict) else
                       {"rank": expected, "uniform": True})  # fmt: skip


def test_a_path_with_an_equals_sign_is_a_path(here):
    (here / "lr=0.1").mkdir()
    (here / "p0").rename(here / "lr=0.1/p0")
    found = meant(adapters=["lr=0.1/p0", "b=p1", "./p2/"]).sources
    assert [(s.name, s.location) for s in found] == [
        ("p0", f"{here}/lr=0.1/p0"), ("b", f"{here}/p1"), ("p2", f"{here}/p2"),
    ]  # fmt: skip


def test_every_parameter_can_be_given(here):
    for method in METHODS.values():
        count = method.fewest if method.most else 2
        for name, default in method.defaults.items():
            value = 0.5 if default is None else default
            given = named_parameters([f"{name.replace('_', '-')}={value}"], {})
            found = meant(adapters=[f"p{i}" for i in range(count)], method=method.name, parameters=given)
            assert found.fusions[0].parameters == {name: value}


@pytest.mark.parametrize(
    ("arguments", "first_line"),
    [
        (["p0", "nowhere"], "nowhere: "),
        (["p0", "copy/p0"], "p0: two adapters have this name."),
        (["p0", "p1", "--weights", "1"], "--weights 1: 1 weights for 2 adapters."),
        (["p0", "p1", "--weights", "1,x"], "--weights 1,x: expected a number; found 'x'."),
        (["p0", "p1", "--weights", "1,nan"], "--weights 1,nan: expected a number; found nan."),
        (["p0", "p1", "--weights", "1:30,1"], "--weights 1:30,1: expected a number; found '1:30'."),
        (["p0", "p1", "--weights", "1,"], "--weights 1,: 1 weights for 2 adapters."),
        (["p0", "p1", "--weights", "1,true"], "--weights 1,true: expected a number; found True."),
        (["p0", "p1", "--weights", "{*.v: 1},1"], "--weights {*.v: 1},1: cannot be read."),
        (["p0", "p1", "--weights", '{"*.w_proj": 1},1'], "p0: its weight names modules by '*.w_proj', which fits"),
        (["p0", "p1", "--weights", "1,-1", "--normalize"], "--weights 1,-1: --normalize cannot scale weights that sum"),
        (["p0", "p1", "--weights-file", "none.yaml"], "none.yaml"),
        (["p0", "p1", "--weights-file", "w.yaml"], "--weights-file w.yaml: unknown adapter 'p3'."),
        (["p0", "p1", "--method", "tise"], "unknown method 'tise'. Did you mean ties?"),
        (["p0", "p1", "--method", "ties", "--density", "1.5"], "method ties: density 1.5 cannot be used."),
        (["p0", "p1", "--density", "0.5"], "unknown parameter of method linear 'density'."),
        (["p0", "p1", "--param", "density"], "--param density: says no value."),
        (["p0", "p1", "--method", "ties", "--param", "density=1", "--density", "1"], "--param density=1: density is"),
        (["p0", "--method", "slerp"], "method slerp takes 2 adapters, not 1."),
        (["p0", "p1", "p2", "--method", "slerp"], "method slerp takes 2 adapters, not 3."),
        (["p0", "p1", "--rank", "0"], "--rank 0: rank 0 is no rank."),
        (["p0", "p1", "--scale", "big"], "--scale big: is no scale."),
        (["p0", "p1", "--dtype", "float8"], "dtype 'float8' cannot hold an adapter."),
        (["p0", "p1", "--format", "gguf"], "--format: unknown format 'gguf'."),
        (["p0", "p1", "--dialect", "peft", "--explain"], "--explain: says how others differ from dialect delta."),
        (["p0", "p1", "--dialect", "peft", "--method", "karcher"], "unknown method of dialect peft 'karcher'."),
        (["p0", "p1", "--dialect", "merge-kit"], "unknown dialect 'merge-kit'. Did you mean mergekit?"),
        (["p0", "p1", "--anchor", "nowhere"], "anchor nowhere: "),
        (["p0", "p1", "--sweep", "50/50,50/50"], "--sweep 50/50,50/50: 50/50 is there twice."),
        (["p0", "p1", "--sweep", "50/50/50"], "--sweep 50/50/50: 3 shares for 2 adapters."),
        (["p0", "p1", "--sweep", "50/-50"], "--sweep 50/-50: --normalize cannot scale weights that sum to 0."),
        (["p0", "p1", "--sweep", "linear:3"], "--sweep linear:3: write NAME=VALUE."),
        (["p0", "p1", "--sweep", "tise:0.2"], "unknown method 'tise'."),
        (["p0", "p1", "--sweep", "50/50", "--density", "0.2"], "--sweep 50/50: no method in it has the parameter"),
        (["p0", "wide"], "wide: model.layers.0.self_attn.k_proj has shape (16, 8), but (16, 32) in p0."),
        (["p0", "elsewhere"], "the adapters share no module"),
        (["p0", "spoilt"], "spoilt: "),
        (["p0", "dora"], "dora: "),
        (["p0", "pickled"], "pickled: has its weights as a pickle"),
        (["p0", "p1", "--base", "nowhere"], "nowhere: there is no base model."),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_nothing_is_written(here, capsys, arguments, first_line):
    save_adapter(make_adapter("p0", 3), "copy/p0")
    Path("w.yaml").write_text("{p0: 1, p3: 1}")
    small = {path: LoraModule(torch.randn(2, 8), torch.randn(o, 2), 1.0) for path, (o, _) in SHAPES.items()}
    save_adapter(LoraAdapter("wide", small), "wide")
    save_adapter(LoraAdapter("x", {"another.module": next(iter(small.values()))}), "elsewhere")
    spoilt = make_adapter("spoilt", 1)
    next(iter(spoilt.modules.values())).A[0, 0] = float("nan")
    save_adapter(spoilt, "spoilt")
    for name in ("dora", "pickled"):
        save_adapter(make_adapter(name, 1), name)
    config = Path("dora/adapter_config.json")
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    Path("pickled/adapter_model.safetensors").rename("pickled/adapter_model.bin")
    assert fuse(*arguments, "--out", "out") == 2
    printed = capsys.readouterr().err
    assert first_line in printed.splitlines()[0]
    assert printed.startswith("raymerge: ")
    assert "not foreseen" not in printed
    assert not (here / "out").exists()


def test_given_twice_is_refused(here):
    Path("w.yaml").write_text("{p0: 1, p1: 1}")
    with pytest.raises(MergeError, match="give one of them"):
        meant(weights="1,1", weights_file="w.yaml")


# The list of methods


def test_methods_are_listed_with_ranges(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert status("methods") == 0
    short = capsys.readouterr().out
    assert max(map(len, short.splitlines())) <= 80
    assert re.findall(r"^\w+$", short, re.MULTILINE) == list(METHODS)
    assert "density = 0.2  (a density above 0 and at most 1)" in short
    assert "majority_sign = total  (total or frequency)" in short
    assert "seed = 0  (a whole number from 0)" in short
    assert "t  (a number from 0 to 1)" in short
    assert status("methods", "slerp") == 0
    full = capsys.readouterr().out
    assert METHODS["slerp"].note.split(":")[0] in " ".join(full.split())
    assert status("methods", "slurp") == 2
    assert "Did you mean slerp?" in capsys.readouterr().err
