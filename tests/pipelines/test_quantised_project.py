"""A project whose base is kept in few bits: trained and scored so, and never mixed with results of the plain base."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from raymerge.adapters import load_adapter
from raymerge.pipelines.evaluate import evaluate
from raymerge.pipelines.train import train


def kept_in(project: str, bits: str) -> str:
    value = yaml.safe_load(Path(project).read_text())
    hardware = {"quantization": bits, "gpus_per_model": 2}  # --local takes of the GPUs what there is
    Path(project).write_text(
        yaml.safe_dump({**value, "hardware": hardware, "recipes": {"unified": {"strategy": "unified"}}})
    )
    return project


def test_bits_of_the_base_decide_what_is_there_already(project, capsys):
    pytest.importorskip("bitsandbytes")
    adapter, found, scores = Path(project).parent / "unified", {}, {}
    for bits in ("4bit", "none"):
        kept_in(project, bits)
        assert train(project, group_by="unified", local=True) == 0
        found[bits] = load_adapter(str(adapter))
        written = (adapter / "adapter_model.safetensors").stat().st_mtime_ns
        assert train(project, group_by="unified", local=True) == 0
        assert (adapter / "adapter_model.safetensors").stat().st_mtime_ns == written
        assert evaluate(project, recipes=["unified"], local=True) == 0
        table = pq.read_table(Path(project).parent / "runs/unified/evaluation_in_memory/metrics.parquet")
        scores[bits] = table["nll"].to_pylist()
    name = "model.layers.1.mlp.up_proj"
    change = found["4bit"].modules[name].delta() - found["none"].modules[name].delta()
    assert 0 < float(change.norm()) < float(found["none"].modules[name].delta().norm()) / 2
    assert scores["4bit"] != scores["none"]
    assert scores["4bit"] == pytest.approx(scores["none"], rel=0.1)
