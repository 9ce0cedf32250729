"""LoRA adapters as data."""

import pytest
import torch

from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.errors import AdapterError, UnsupportedAdapterError


def module(out=6, into=5, rank=2, dtype=torch.float32, scaling=1.0):
    return LoraModule(torch.randn(rank, into).to(dtype), torch.randn(out, rank).to(dtype), scaling)


def test_delta_is_scaling_times_b_times_a():
    one = module(scaling=0.5)
    assert torch.allclose(one.delta(), 0.5 * one.B @ one.A)
    assert one.delta(torch.float64).dtype == torch.float64
    assert one.shape == one.delta().shape == (6, 5)


def test_header_says_what_the_module_is():
    one = LoraModule(torch.zeros(2, 5, dtype=torch.bfloat16), torch.zeros(6, 2, dtype=torch.float16), 2.0)
    header = one.header
    assert (header.rank, header.shape, header.scaling, header.nbytes) == (2, (6, 5), 2.0, (10 + 12) * 2)
    assert header.dtype == torch.float32  # neither bfloat16 nor float16 holds the other


@pytest.mark.parametrize(("a", "b"), [((2, 5), (6, 3)), ((2, 5, 1), (6, 2)), ((2,), (6, 2)), ((0, 5), (6, 0))], ids=str)
def test_factors_that_make_no_product_are_refused(a, b):
    with pytest.raises(AdapterError, match="make no delta"):
        LoraModule(torch.zeros(a), torch.zeros(b), 1.0)


@pytest.mark.parametrize("scaling", [float("nan"), float("inf")])
def test_a_scaling_is_finite(scaling):
    with pytest.raises(AdapterError, match="finite"):
        module(scaling=scaling)


def test_modules_are_sorted_and_the_widest_dtype_counts():
    adapter = LoraAdapter("a", {"b": module(dtype=torch.bfloat16), "a": module(dtype=torch.float32)})
    assert list(adapter.modules) == ["a", "b"]
    assert adapter.dtype == torch.float32
    assert adapter.nbytes == (10 + 12) * 6
    assert LoraAdapter("a", {"b": module(dtype=torch.bfloat16)}).dtype == torch.bfloat16


def test_a_bias_has_one_value_for_each_output_and_counts():
    one = LoraModule(torch.zeros(2, 5), torch.zeros(6, 2), 1.0, torch.zeros(6, dtype=torch.float64))
    assert (one.dtype, one.header.biased, one.header.nbytes) == (torch.float64, True, 22 * 4 + 6 * 8)
    with pytest.raises(AdapterError, match=r"bias does not fit its module: \(5,\)"):
        LoraModule(torch.zeros(2, 5), torch.zeros(6, 2), 1.0, torch.zeros(5))


@pytest.mark.parametrize(
    ("module", "whole", "named"),
    [
        (module(), {}, None),
        (LoraModule(torch.zeros(2, 5), torch.zeros(6, 2), 1.0, torch.zeros(6)), {}, r"trained biases.* \(q\)"),
        (LoraModule(torch.zeros(2, 5), torch.zeros(6, 2), 1.0, embedding=True), {}, r"LoRA of an embedding \(q\)"),
        (module(), {"n.weight": torch.zeros(3), "m.weight": torch.zeros(2, 2)}, r"whole tensors \(m.weight, ...\)"),
    ],
    ids=["plain", "bias", "embedding", "whole"],
)
def test_what_is_more_than_deltas_is_refused_where_only_these_are_used(module, whole, named):
    adapter = LoraAdapter("persona_2", {"q": module}, whole=whole)
    assert adapter.nbytes == module.header.nbytes + sum(tensor.nbytes for tensor in whole.values())
    assert list(adapter.whole_shapes) == sorted(whole)
    if named is None:
        adapter.require_plain("cannot be run")
        assert adapter.unusual == ""
    else:
        with pytest.raises(UnsupportedAdapterError, match=f"^persona_2: cannot be run, since it holds .*{named}"):
            adapter.require_plain("cannot be run")
