"""What an adapter adds to another one, against dense deltas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.errors import MergeError, UnsupportedAdapterError
from raymerge.merging.difference import difference
from raymerge.merging.merge import merge

SHAPES = {"q": (9, 12), "k": (5, 12), "down": (12, 20)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def adapters(draw, name: str, least: int = 1) -> LoraAdapter:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from(DTYPES))
    modules = {}
    for path in draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=least)):
        rank = draw(st.integers(1, 4))
        A = torch.randn(rank, SHAPES[path][1], generator=generator).to(dtype)
        B = torch.randn(SHAPES[path][0], rank, generator=generator).to(dtype)
        modules[path] = LoraModule(A, B, draw(st.sampled_from([0.5, 1.0, 3.0])))
    return LoraAdapter(name, modules)


def delta(adapter: LoraAdapter, path: str) -> torch.Tensor:
    return adapter.modules[path].delta() if path in adapter.modules else torch.zeros(SHAPES[path])


@given(adapters("a"), adapters("anchor"))
def test_it_is_the_difference_of_the_deltas(one, anchor):
    found = difference(one, anchor)
    assert found.name == "a"
    assert set(found.modules) == {*one.modules, *anchor.modules}
    for path in found.modules:
        torch.testing.assert_close(delta(found, path), delta(one, path) - delta(anchor, path), rtol=1e-4, atol=1e-4)


@given(adapters("a", 3), adapters("b", 3), adapters("anchor", 3))
def test_a_mean_of_differences_is_what_a_merge_adds_to_its_anchor(one, other, anchor):
    merged = merge([one, other], [0.3, 0.7], anchor=anchor, scale=1.6, rank="exact", dtype="float32")
    parts = [difference(one, anchor), difference(other, anchor)]
    for path in merged.modules:
        added = sum(w * delta(part, path) for w, part in zip((0.3, 0.7), parts, strict=True))
        torch.testing.assert_close(delta(merged, path), delta(anchor, path) + 1.6 * added, rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_refused_by_name():
    def make(name: str, outer: int, **more) -> LoraAdapter:
        return LoraAdapter(name, {"q": LoraModule(torch.ones(1, 3), torch.ones(outer, 1), 1.0)}, **more)

    with pytest.raises(MergeError, match=r"^anchor: q has shape \(5, 3\), but \(4, 3\) in a"):
        difference(make("a", 4), make("anchor", 5))
    with pytest.raises(UnsupportedAdapterError, match=r"^anchor: cannot be measured from another adapter, since"):
        difference(make("a", 4), make("anchor", 4, whole={"lm_head.weight": torch.ones(2, 3)}))
