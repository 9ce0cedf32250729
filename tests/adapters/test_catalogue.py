"""Adapters listed from a template."""

import subprocess
import sys

import pytest
import torch

from raymerge.adapters import Catalogue, LoraAdapter, LoraModule, save_adapter
from raymerge.errors import AdapterError


def save(folder, format="peft"):
    save_adapter(LoraAdapter("x", {"m": LoraModule(torch.ones(1, 2), torch.ones(3, 1), 1.0)}), str(folder), format)


def test_lists_what_exists_and_reads_what_is_asked_for(tmp_path):
    for name in ("b", "a", "c.d"):
        save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    catalogue = Catalogue.from_template(f"{tmp_path}/{{persona}}")
    assert catalogue.names == ("a", "b", "c.d")
    assert catalogue.location("a") == f"{tmp_path}/a"
    assert catalogue.read("a").name == catalogue.open("a").name == catalogue.header("a").name == "a"


def test_the_name_can_stand_anywhere(tmp_path):
    for name in ("x", "y"):
        save(tmp_path / f"lora-{name}.run" / "v7")
    save(tmp_path / "lora-z.run" / "v6")
    save(tmp_path / "other" / "v7")
    catalogue = Catalogue.from_template(f"{tmp_path}/lora-{{persona}}.run/v7")
    assert catalogue.names == ("x", "y")
    assert catalogue.read("y").modules["m"].shape == (3, 2)


def test_formats_may_differ_from_adapter_to_adapter(tmp_path):
    save(tmp_path / "a", "mlx")
    save(tmp_path / "b", "peft")
    catalogue = Catalogue.from_template(f"{tmp_path}/{{persona}}")
    assert catalogue.names == ("a", "b")
    assert [catalogue.read(name).modules["m"].shape for name in catalogue.names] == [(3, 2), (3, 2)]


def test_a_template_may_name_a_checkpoint(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name, "mlx")
    weights = tmp_path / "b" / "adapters.safetensors"
    weights.rename(weights.with_name("0000100_adapters.safetensors"))
    catalogue = Catalogue.from_template(f"{tmp_path}/{{persona}}/0000100_adapters.safetensors")
    assert catalogue.names == ("b",)
    assert catalogue.open("b").modules["m"].shape == (3, 2)


def test_a_folder_that_is_missing_has_no_adapters(tmp_path):
    assert Catalogue.from_template(f"{tmp_path}/none/{{persona}}").names == ()


@pytest.mark.parametrize("template", ["/data/adapters", "/data/{a}/{b}"])
def test_a_template_has_one_place(template):
    with pytest.raises(AdapterError, match="Expected one place"):
        Catalogue.from_template(template)


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    save(tmp_path / "persona_001")
    catalogue = Catalogue.from_template(f"{tmp_path}/{{persona}}")
    with pytest.raises(AdapterError, match=r"^persona_01: .* Did you mean persona_001\?"):
        catalogue.read("persona_01")


@pytest.mark.parametrize("format", ["peft", "mlx"])
def test_listing_and_checking_need_no_torch(tmp_path, format):
    save(tmp_path / "a", format)
    code = (
        "import sys; from raymerge.adapters.catalogue import Catalogue\n"
        f"Catalogue.from_template({str(tmp_path)!r} + '/{{persona}}').header('a')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
