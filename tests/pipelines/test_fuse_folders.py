"""Folders of `raymerge fuse`: inputs and what others wrote are never touched, and what is there tells the truth."""

import json
import os
import shlex
from pathlib import Path

import pytest
import torch

from raymerge import load_adapter, merge, save_adapter
from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.adapters.formats import adapter_digest, encode_adapter
from raymerge.manifest import UNFINISHED, is_unfinished
from raymerge.pipelines.fusion.folders import clear
from tests.pipelines.conftest import make_adapter
from tests.pipelines.test_fuse import files, fuse, here, manifest, status, written  # noqa: F401

README = Path(__file__).parents[2] / "README.md"


def write_manifest(folder: str, **changes) -> None:
    path = Path(folder) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def mark(folder: Path, **more) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({**UNFINISHED, **more}))


# What is removed


def test_names_in_a_manifest_are_never_removed(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    mark(tmp_path / "out")
    for name in ("notes.txt", "adapter_config.json", "fusion_report.md", "adapters.safetensors"):
        (tmp_path / "out" / name).write_text("x")
    write_manifest(str(tmp_path / "out"), files={"../precious.txt": {}, "notes.txt": {}, "adapter_config.json": {}})
    clear(str(tmp_path / "out"))
    assert sorted(files(tmp_path)) == ["out/manifest.json", "out/notes.txt", "precious.txt"]
    assert is_unfinished(str(tmp_path / "out"), "fuse")


def lies_in_out(here: Path, how: str) -> list[str]:  # noqa: F811
    """Arguments that read something in `out`, an adapter that could be forced."""
    if how == "file":
        return ["out/adapter_model.safetensors", "p1"]
    if how == "anchor":
        return ["p0", "p1", "--anchor", "out"]
    if how == "anchor as a file":
        return ["p0", "p1", "--anchor", "out/adapter_model.safetensors"]
    if how == "uri":
        return [f"file://{here}/out", "p1"]
    if how == "below":
        save_adapter(make_adapter("x", 3), "out/x")
        return ["out/x", "p1"]
    if how == "link":
        (here / "linked").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            os.symlink(here / "out" / name, here / "linked" / name)
        return ["linked", "p1"]
    (here / "out/model.safetensors").write_bytes(b"")
    return ["p0", "p1", "--base", "out"]


@pytest.mark.parametrize("how", ["file", "anchor", "anchor as a file", "uri", "below", "link", "base"])
def test_what_is_read_is_never_written_over(here, capsys, how):  # noqa: F811
    assert fuse("p0", "p1", "--out", "out") == 0
    arguments = lies_in_out(here, how)
    before = files(here)
    capsys.readouterr()
    assert fuse(*arguments, "--out", "out", "--force", "--method", "ties") == 2
    first = capsys.readouterr().err.splitlines()[0]
    kind = {"anchor": "the anchor", "anchor as a file": "the anchor", "base": "the base model"}
    verb = "holds" if how == "below" else "is"
    assert first == f"raymerge: {here}/out: {verb} {kind.get(how, 'one of the adapters to fuse')}."
    assert files(here) == before


def test_an_input_of_a_sweep_is_not_one_of_its_results(here, capsys):  # noqa: F811
    assert fuse("p0", "p1", "--out", "out", "--sweep", "50/50") == 0
    before = files(here)
    assert fuse("out/50-50", "p1", "--out", "out", "--sweep", "50/50", "--force") == 2
    assert "50-50: is one of the adapters to fuse" in capsys.readouterr().err
    assert files(here) == before


@pytest.mark.parametrize("marker", [{}, {"kind": "sweep"}])
def test_unfinished_work_of_others_is_not_a_fuse(here, capsys, marker):  # noqa: F811
    mark(here / "out", **marker)
    (here / "out/adapter_config.json").write_text("of a training that goes on")
    before = files(here / "out")
    assert fuse("p0", "p1", "--out", "out", "--force") == 2
    assert "out: is not empty" in capsys.readouterr().err
    if not marker:
        assert fuse("p0", "p1", "--out", "out", "--sweep", "50/50", "--force") == 2
    assert files(here / "out") == before


def test_a_sweep_in_place_of_an_unfinished_fuse_leaves_none_of_it(here):  # noqa: F811
    mark(here / "out", kind="fuse")
    (here / "out/adapter_config.json").write_text("half")
    assert fuse("p0", "p1", "--out", "out", "--sweep", "50/50") == 0
    assert sorted(path.name for path in (here / "out").iterdir()) == [
        "50-50", "manifest.json", "sweep.json", "sweep_report.md",
    ]  # fmt: skip


# What is there


def test_a_fuse_that_fails_leaves_no_adapter_that_looks_new(here):  # noqa: F811
    assert fuse("p0", "p1", "--out", "out", "--sweep", "50/50,slerp") == 0
    assert fuse("p0", "p1", "--out", "out", "--sweep", "50/50,slerp", "--weights", "2,-1", "--force") == 1
    assert is_unfinished(str(here / "out/slerp"), "fuse")
    assert not is_unfinished(str(here / "out/50-50"))
    assert fuse("p0", "p1", "--out", "out", "--sweep", "50/50,slerp") == 0  # without --force: it is unfinished
    assert not is_unfinished(str(here / "out/slerp"))


@pytest.mark.parametrize("sweep", [[], ["--sweep", "ties,slerp:0.5"]])
def test_a_finished_fuse_is_explained_in_its_report_too(here, capsys, sweep):  # noqa: F811
    method = [] if sweep else ["--method", "ties"]
    assert fuse("p0", "p1", "--out", "out", *method, *sweep) == 0
    folder = here / "out/ties" if sweep else here / "out"
    before = files(folder)
    assert fuse("p0", "p1", "--out", "out", "--explain", *method, *sweep) == 0
    report = (folder / "fusion_report.md").read_text()
    assert "## ties here and elsewhere" in report
    assert "mergekit merge_method: ties" in " ".join(report.split())
    again = files(folder)
    assert {n: d for n, d in again.items() if n.startswith("adapter")} == written(folder)
    assert {n for n in again if again[n] != before[n]} == {"fusion_report.md", "manifest.json"}
    capsys.readouterr()
    assert fuse("p0", "p1", "--out", "out", *method, *sweep) == 0
    assert "there already" in capsys.readouterr().out
    assert files(folder) == again


def test_a_fuse_again_reads_no_weights(here, monkeypatch):  # noqa: F811
    assert fuse("p0", "p1", "--out", "out", "--anchor", "p5", "--sweep", "50/50,ties") == 0

    def fail(*_):
        raise AssertionError("weights are read")

    monkeypatch.setattr("raymerge.adapters.stored.StoredPeftModules.__getitem__", fail)
    monkeypatch.setattr("raymerge.merging.gram.gram", fail)
    assert fuse("p0", "p1", "--out", "out", "--anchor", "p5", "--sweep", "50/50,ties") == 0


def test_a_digest_is_that_of_all_other_commands(here):  # noqa: F811
    assert fuse("p0", "p1", "--out", "out", "--anchor", "p5") == 0
    assert [e["digest"] for e in manifest(here / "out")["experts"]] == [adapter_digest("p0"), adapter_digest("p1")]
    assert manifest(here / "out")["anchor"] == adapter_digest("p5")


def test_every_difference_is_said(here, capsys):  # noqa: F811
    def refusal(*arguments: str) -> str:
        capsys.readouterr()
        assert fuse("p0", "p1", "--out", "out", *arguments) == 2
        return capsys.readouterr().err.split("holds another fuse.\n")[1].split("Choose another")[0]

    assert fuse("p0", "p1", "--out", "out", "--anchor", "p5") == 0
    assert refusal("--anchor", "p5", "--name", "mine") == "name: 'out' there, 'mine' now\n"
    assert refusal("--anchor", "p4") == "anchor: 'p5' there, 'p4' now\n"
    assert refusal() == "anchor: 'p5' there, None now\n"
    assert refusal("--anchor", "p5", "--dtype", "bfloat16") == "dtype: 'float32' there, 'bfloat16' now\n"
    assert fuse("p0", "p1", "--out", "out", "--anchor", "p5", "--dtype", "float32") == 0  # what it is without, too
    save_adapter(make_adapter("p5", 99), "p5")
    assert refusal("--anchor", "p5") == "anchor: its files have changed\n"


def base_model(folder: str) -> None:
    from safetensors.torch import save_file

    Path(folder).mkdir(exist_ok=True)
    save_file({"lm_head.weight": torch.ones(4, 4)}, f"{folder}/model.safetensors")


def test_a_base_counts_only_where_something_depends_on_it(here, capsys):  # noqa: F811
    base_model("base")
    assert fuse("p0", "p1", "--out", "out") == 0
    assert fuse("p0", "p1", "--out", "out", "--base", "base") == 0
    for name in ("a", "b"):
        whole = {"lm_head.weight": torch.randn(4, 4)}
        save_adapter(LoraAdapter(name, make_adapter(name, 1).modules, whole=whole, modules_to_save=("lm_head",)), name)
    assert fuse("a", "b", "--out", "whole", "--base", "base") == 0
    assert fuse("a", "b", "--out", "whole", "--base", "base") == 0
    base_model("other")
    capsys.readouterr()
    assert fuse("a", "b", "--out", "whole", "--base", "other") == 2
    assert "base: it is another model, or its files were written anew\nChoose" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"schema": 1}, {"experts": [{"name": "p0", "odd": 1}]}, {"figures": 3}])
def test_a_manifest_of_another_version_is_another_fuse(here, capsys, changes):  # noqa: F811
    assert fuse("p0", "p1", "--out", "out") == 0
    write_manifest("out", **changes)
    if "schema" in changes:
        write_manifest("out", key="sha256:0")  # that version would have written another one
    assert fuse("p0", "p1", "--out", "out") == 2
    message = capsys.readouterr().err
    assert "holds another fuse.\nIt was written by another version of raymerge.\n" in message
    assert fuse("p0", "p1", "--out", "out", "--force") == 0
    assert written(here / "out") == encode_adapter(merge([load_adapter("p0"), load_adapter("p1")], [0.5, 0.5]))


# What fails


def test_one_of_a_sweep_may_fail_for_any_reason(here, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("raymerge.pipelines.fusion.inputs.HELD", 0)
    spoilt = make_adapter("spoilt", 1)
    next(iter(spoilt.modules.values())).A[0, 0] = float("nan")
    save_adapter(spoilt, "spoilt")
    assert fuse("p0", "spoilt", "--out", "out", "--sweep", "50/50,70/30") == 2
    message = capsys.readouterr()
    assert message.err.startswith("raymerge: spoilt: ")  # all fail: the last says why
    calls = []

    def encode(adapter, form):
        from raymerge.errors import AdapterError

        calls.append(adapter.name)
        if adapter.name == "70-30":
            raise AdapterError("70-30: cannot be written.\nWhy.")
        return encode_adapter(adapter, form)

    monkeypatch.setattr("raymerge.pipelines.fuse.encode_adapter", encode)
    assert fuse("p0", "p1", "--out", "other", "--sweep", "50/50,70/30") == 1
    assert "failed: 70-30: 70-30: cannot be written." in capsys.readouterr().out
    assert calls == ["50-50", "70-30"]


@pytest.mark.parametrize("kind", ["whole", "float64", "bias"])
def test_what_mlx_cannot_express_is_refused_before_merging(here, capsys, monkeypatch, kind):  # noqa: F811
    odd = make_adapter("odd", 1)
    if kind == "whole":
        odd = LoraAdapter("odd", odd.modules, whole={"lm_head.weight": torch.ones(4, 4)}, modules_to_save=("lm_head",))
    elif kind == "float64":
        modules = {path: LoraModule(m.A.double(), m.B.double(), 1.0) for path, m in odd.modules.items()}
        odd = LoraAdapter("odd", modules)
    else:
        modules = {path: LoraModule(m.A, m.B, 1.0, bias=torch.ones(len(m.B))) for path, m in odd.modules.items()}
        odd = LoraAdapter("odd", modules)
    save_adapter(odd, "odd")
    if kind == "float64":
        assert fuse("p0", "odd", "--out", "single", "--format", "mlx", "--dtype", "float32") == 0
    assert fuse("p0", "p1", "--out", "out") == 0
    before = files(here / "out")
    monkeypatch.setattr("raymerge.merging.merge.merge", lambda *a, **k: pytest.fail("it is merged"))
    assert fuse("p0", "odd", "--out", "out", "--format", "mlx", "--force") == 2
    assert "cannot be written in MLX's form" in capsys.readouterr().err
    assert files(here / "out") == before


# As the documentation says


def test_the_commands_of_the_readme_work_as_they_stand(here, monkeypatch):  # noqa: F811
    section = README.read_text().split("## A few adapters")[1].split("\n## ")[0]
    commands = [shlex.split(line, comments=True) for line in section.splitlines() if line.startswith("    raymerge ")]
    chosen = [words[1:] for words in commands if words[1] in ("fuse", "methods")]
    assert [words[0] for words in chosen] == ["fuse", "fuse", "fuse", "methods"]
    (here / "p0").rename(here / "ann")
    (here / "p1").rename(here / "bob")
    for words in chosen:
        assert status(*words) == 0, shlex.join(words)
