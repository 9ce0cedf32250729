"""Experts on a worker: what their digest is of, in each format."""

import pytest
import torch

from raymerge.adapters import FORMATS, LoraAdapter, LoraModule, save_adapter
from raymerge.adapters.formats import adapter_digest
from raymerge.errors import AdapterError
from raymerge.manifest import invalidate
from raymerge.merging.gram import gram
from raymerge.runtime import experts
from raymerge.runtime.experts import ExpertCache, InnerProducts


def save(folder, format, value=1.0):
    module = LoraModule(torch.full((2, 6), value), torch.ones(5, 2), 2.0)
    save_adapter(LoraAdapter("x", {"q": module}), str(folder), format)
    return str(folder)


@pytest.mark.parametrize("format", FORMATS)
def test_a_digest_is_of_weights_and_configuration(tmp_path, format):
    folder = save(tmp_path / "a", format)
    before = adapter_digest(folder)
    (tmp_path / "a" / "README.md").write_text("more")
    assert adapter_digest(folder) == before
    save(tmp_path / "a", format, 3.0)
    changed = adapter_digest(folder)
    config = tmp_path / "a" / "adapter_config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    assert len({before, changed, adapter_digest(folder)}) == 3


def test_a_checkpoint_has_a_digest_of_its_own(tmp_path):
    folder = save(tmp_path / "a", "mlx")
    other = save(tmp_path / "b", "mlx", 3.0)
    checkpoint = tmp_path / "a" / "0000100_adapters.safetensors"
    checkpoint.write_bytes((tmp_path / "b" / "adapters.safetensors").read_bytes())
    assert adapter_digest(str(checkpoint)) == adapter_digest(f"file://{checkpoint}") == adapter_digest(other)
    assert adapter_digest(str(checkpoint)) != adapter_digest(folder)


@pytest.mark.parametrize("format", FORMATS)
def test_a_changed_adapter_is_read_again(tmp_path, format):
    cache = ExpertCache(10**6)
    folder = save(tmp_path / "a", format)
    first = cache.read("a", folder)
    assert cache.read("a", folder).modules["q"] is first.modules["q"]
    save(tmp_path / "a", format, 3.0)
    assert float(cache.read("a", folder).modules["q"].A.max()) == 3.0


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_held_is_not_opened_again(tmp_path, format):
    cache = ExpertCache(10**6)
    folder = save(tmp_path / "a", format)
    digest = adapter_digest(folder)
    opened = cache.open("a", folder, digest=digest, base=None)
    assert cache.held == 0
    held = cache.read("a", folder, digest=digest)
    assert torch.equal(opened.modules["q"].A, held.modules["q"].A)
    for file in (tmp_path / "a").iterdir():
        file.unlink()
    assert cache.open("a", folder, digest=digest, base=None).modules["q"] is held.modules["q"]


def test_what_is_missing_or_unfinished_has_no_digest(tmp_path):
    with pytest.raises(AdapterError, match="there is no adapter"):
        adapter_digest(str(tmp_path / "none"))
    folder = save(tmp_path / "a", "mlx")
    invalidate(folder)
    for location in (folder, f"{folder}/adapters.safetensors"):
        with pytest.raises(AdapterError, match="begun and not finished"):
            adapter_digest(location)


def test_inner_products_are_remembered_and_are_those_of_gram():
    torch.manual_seed(0)
    ranks = {"a": 2, "b": 3, "c": 1, "d": 4}
    adapters = {
        name: LoraAdapter(name, {"q": LoraModule(torch.randn(rank, 6), torch.randn(5, rank), 0.5)})
        for name, rank in ranks.items()
    }
    products = InnerProducts()
    for some in (["c", "a"], ["a", "b", "c"], ["d", "b", "a"], ["b"]):
        expected = gram([adapters[name] for name in some])
        torch.testing.assert_close(products.of({name: adapters[name] for name in some}), expected)
    torch.testing.assert_close(products.of(dict.fromkeys("bda")), gram([adapters[name] for name in "bda"]))
    with pytest.raises(AttributeError):
        products.of(dict.fromkeys("cd"))  # never asked for together: they have to be read


def test_remembered_inner_products_are_bounded(monkeypatch):
    monkeypatch.setattr(experts, "MOST_PRODUCTS", 5)
    module = LoraModule(torch.ones(2, 6), torch.ones(5, 2), 1.0)
    products = InnerProducts()
    for pair in ("ab", "cd", "ab"):
        found = products.of({name: LoraAdapter(name, {"q": module}) for name in pair})
        assert found.tolist() == [[120.0, 120.0], [120.0, 120.0]]
        assert len(products._known) <= 5
