"""Inner products of whole adapters, against dense deltas."""

import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.adapters.adapter import StoredModules
from raymerge.adapters.dora import dense_module
from raymerge.errors import MergeError
from raymerge.merging import gram as gram_room
from raymerge.merging.gram import gram, similarities
from raymerge.merging.rank import RankRule
from raymerge.merging.site import Site

SHAPES = {"q": (9, 12), "k": (5, 12), "down": (12, 20)}


def adapters(count=7, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        modules = {}
        for path, shape in SHAPES.items():
            if (number + len(path)) % 4:
                rank = 1 + (number * 2) % 5
                A = torch.randn(rank, shape[1], generator=generator)
                B = torch.randn(shape[0], rank, generator=generator)
                modules[path] = LoraModule(A.to(dtype), B, 0.5 + number)
        made.append(LoraAdapter(f"a{number}", modules))
    return made


def dense_gram(several):
    def flat(adapter):
        return {
            path: torch.cat([
                module.delta(torch.float64).flatten(),
                module.scaling * (torch.zeros(module.out_features) if module.bias is None else module.bias).double(),
            ])
            for path, module in adapter.modules.items()
        }  # fmt: skip

    deltas = [flat(adapter) for adapter in several]
    return torch.tensor(
        [[sum(float(a[p] @ b[p]) for p in set(a) & set(b)) for b in deltas] for a in deltas], dtype=torch.float64
    )


@pytest.mark.parametrize("block", [4, 512], ids=["a rank fills a block alone", "one block"])
@pytest.mark.parametrize("converted", [0, 2**20], ids=["block by block", "at once"])
def test_inner_products_are_those_of_dense_deltas(block, converted, monkeypatch):
    monkeypatch.setattr(gram_room, "_BLOCK", block)
    monkeypatch.setattr(gram_room, "_CONVERTED", converted)
    several = adapters()
    expected = dense_gram(several)
    torch.testing.assert_close(gram(several), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gram(several, "float32"), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_biases_count_with_their_modules():
    several = [
        replace(adapter, modules={p: replace(m, bias=torch.full((m.out_features,), 0.5 + len(p))) for p, m in modules})
        for adapter in adapters()
        if (modules := adapter.modules.items())
    ]
    several[2] = adapters()[2]  # none here
    torch.testing.assert_close(gram(several), dense_gram(several), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("held", [1, 1000, 2**20], ids=["one at a time", "in lots", "at once"])
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_dense_deltas_are_multiplied_as_they_are(precision, held, monkeypatch):
    """DoRA's, written as products with an identity, beside factors and alone."""
    monkeypatch.setattr(gram_room, "_DENSE", 2)
    monkeypatch.setattr(gram_room, "_HELD", held)
    plain = adapters()
    several = [
        replace(
            adapter,
            modules={
                path: replace(dense_module(m.delta() / 2, m.rank), scaling=2.0) if number % 3 else m
                for path, m in adapter.modules.items()
            },
        )
        for number, adapter in enumerate(plain)
    ]
    expected = dense_gram(plain)
    tolerance = {"float64": 1e-6, "float32": 1e-5, "bfloat16": 2e-2}[precision]  # A is bfloat16, B is rounded to it
    torch.testing.assert_close(gram(several, precision), expected, rtol=0, atol=tolerance * float(expected.max()))
    for adapter in several:
        for path, module in adapter.modules.items():
            wanted = float(module.delta(torch.float64).square().sum())
            assert gram_room.squared_norm_of(module) == pytest.approx(wanted, rel=1e-9), path


def related(seed, rank, count, common, dtype=torch.bfloat16):
    """Adapters of which all share a part: the cosines are near to common."""
    generator = torch.Generator().manual_seed(seed)

    def factor(*shape):
        return torch.randn(*shape, generator=generator)

    shared = {path: (factor(rank, into), factor(out, rank)) for path, (out, into) in SHAPES.items()}
    made = []
    for number in range(count):
        modules = {
            path: LoraModule((A + (1 - common) * factor(*A.shape)).to(dtype), B.to(dtype), 2.0)
            for path, (A, B) in shared.items()
        }
        made.append(LoraAdapter(f"a{number}", modules))
    return made


@given(st.integers(0, 1000), st.integers(1, 4), st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.sampled_from([3, 512]))
def test_products_in_bfloat16_move_no_cosine_by_more_than_a_ten_thousandth(seed, rank, common, block):
    several = related(seed, rank, 4, common)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_room, "_BLOCK", block)
        found = similarities(gram(several, "bfloat16"))
    assert float((found - similarities(gram(several))).abs().max()) <= 1e-4


def test_unrelated_adapters_are_multiplied_in_bfloat16(monkeypatch):
    """Where rounding cannot matter, only norms are in float32."""
    seen = []
    multiplied = gram_room._multiplied
    monkeypatch.setattr(gram_room, "_multiplied", lambda X, Y: seen.append(X.dtype) or multiplied(X, Y))
    generator = torch.Generator().manual_seed(0)
    several = [
        LoraAdapter(f"a{i}", {"q": LoraModule(torch.randn(4, 1024, generator=generator).bfloat16(), B.bfloat16(), 1.0)})
        for i, B in enumerate(torch.randn(3, 1024, 4, generator=generator))
    ]
    exact = gram(several)
    seen.clear()
    found = gram(several, "bfloat16")
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(similarities(found), similarities(exact), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.diagonal(), exact.diagonal(), rtol=1e-6, atol=0)


def test_each_module_is_read_once():
    class Counted(StoredModules):
        def __init__(self, modules):
            self.modules, self.reads = modules, []
            self.headers = {path: module.header for path, module in modules.items()}

        def __getitem__(self, path):
            self.reads.append(path)
            return self.modules[path]

    plain = adapters()
    counted = [replace(adapter, modules=Counted(adapter.modules)) for adapter in plain]
    assert torch.equal(gram(counted), gram(plain))
    assert [adapter.modules.reads for adapter in counted] == [sorted(adapter.modules) for adapter in plain]


@pytest.mark.parametrize("rank", [2, 9], ids=["factors", "dense"])
def test_a_site_keeps_no_module(rank, monkeypatch):
    monkeypatch.setattr(gram_room, "_DENSE", 9)
    monkeypatch.setattr(gram_room, "_HELD", 1)
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(rank, 12, generator=generator) for _ in range(6)]
    B = torch.eye(9) if rank == 9 else torch.randn(9, rank, generator=generator)
    given_out = []

    def read():
        for number, A in enumerate(sides):
            # that of the caller's loop, the dense one that it multiplies by, and the next to be that one
            assert sum(one() is not None for one in given_out) <= (3 if rank == 9 else 1)
            copy = A.clone()
            given_out.append(weakref.ref(copy))
            yield None if number == 4 else LoraModule(copy, B, 0.5 + number)
            del copy

    anchor = LoraModule(torch.ones(1, 12), torch.ones(9, 1), 0.3)
    ranks = (rank, rank, rank, rank, 0, rank)
    found = Site("q", (9, 12), tuple("abcdef"), (1.0,) * 6, ranks, anchor, RankRule("keep"), read).gram()
    deltas = [(0 if i == 4 else (0.5 + i) * B.double() @ A.double()) for i, A in enumerate(sides)]
    flat = torch.stack([delta - anchor.delta(torch.float64) for delta in deltas]).flatten(1)
    torch.testing.assert_close(found, flat @ flat.T, rtol=1e-9, atol=1e-9)


def test_adapters_without_common_modules_are_orthogonal():
    one = LoraAdapter("one", {"q": LoraModule(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    other = LoraAdapter("other", {"k": LoraModule(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    assert gram([one, other]).tolist() == [[4.0, 0.0], [0.0, 4.0]]


def test_shapes_that_differ_are_named():
    one = LoraAdapter("one", {"q": LoraModule(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    other = LoraAdapter("other", {"q": LoraModule(torch.ones(1, 3), torch.ones(2, 1), 1.0)})
    with pytest.raises(MergeError, match=r"^other: q has shape \(2, 3\), but \(2, 2\) in one."):
        gram([one, other])


def test_an_embedding_in_one_and_a_linear_module_in_the_other_are_named():
    one = LoraAdapter("one", {"q": LoraModule(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    other = LoraAdapter("other", {"q": replace(one.modules["q"], embedding=True)})
    with pytest.raises(MergeError, match=r"^other: q is an embedding, but a linear module in one\.\nThey were trained"):
        gram([one, other])


@given(st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=3), min_size=1, max_size=5))
def test_similarities_are_cosines_and_zero_for_a_zero_delta(rows):
    X = torch.tensor([*rows, [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = similarities(X @ X.T)
    assert float(found.abs().max()) <= 1
    assert torch.equal(found, found.T)
    assert found[-1].tolist() == [0.0] * len(X)
    for i, x in enumerate(X):
        for j, y in enumerate(X):
            if min(x.norm(), y.norm()) > 1e-6:
                assert float(found[i, j]) == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=1e-9)


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_a_zero_delta_is_zero_in_every_precision(precision):
    some = LoraModule(torch.ones(2, 3), torch.ones(4, 2), 1.0)
    none = LoraModule(torch.ones(2, 3), torch.zeros(4, 2), 1.0)
    several = [LoraAdapter(f"a{i}", {"q": one}) for i, one in enumerate((some, none))]
    assert gram(several, precision).tolist() == [[48.0, 0.0], [0.0, 0.0]]
