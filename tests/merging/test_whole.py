"""Biases and whole tensors: merged beside the factors, never compressed."""

import pytest
import torch

from raymerge import merge
from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.errors import MergeError
from raymerge.merging.merge import matched_scale
from raymerge.merging.methods import METHODS

HEAD, BIAS = "lm_head.weight", "layers.0.q_proj.bias"


class Base:
    """The base's weights, in memory."""

    def __init__(self):
        generator = torch.Generator().manual_seed(99)
        self.tensors = {HEAD: torch.randn(6, 8, generator=generator), BIAS: torch.randn(12, generator=generator)}

    def lacks(self, name):
        return name not in self.tensors

    def weight(self, name):
        return self.tensors[name]


BASE = Base()


def adapter(name, seed, whole=(HEAD, BIAS), biased=True):
    own, common = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000)

    def draw(*shape):
        return torch.randn(*shape, generator=common) + 0.7 * torch.randn(*shape, generator=own)

    module = LoraModule(draw(2, 8), draw(12, 2), 0.5, bias=draw(12) if biased else None)
    tensors = {n: BASE.weight(n) + 0.1 * draw(*BASE.weight(n).shape) for n in (HEAD, BIAS)}
    return LoraAdapter(
        name, {"layers.0.q_proj": module}, whole={n: tensors[n] for n in whole}, modules_to_save=("lm_head",)
    )


def close(left, right, relative=1e-5):
    assert float((left.double() - right.double()).norm()) <= relative * max(float(right.double().norm()), 1e-12)


def test_a_mean_needs_no_base():
    experts = [adapter("anna", 1), adapter("bert", 2)]
    merged = merge(experts, [0.25, 0.75])
    for name in (HEAD, BIAS):
        close(merged.whole[name], 0.25 * experts[0].whole[name] + 0.75 * experts[1].whole[name])
    assert merged.modules_to_save == ("lm_head",)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"weights": [1.0, 1.0]}, "the weights sum to 2, not to 1"),
        ({"weights": [0.5, 0.5], "scale": 2.0}, "the scale is 2, not 1"),
        ({"weights": [0.5, 0.5], "method": "karcher"}, "the method is karcher, not linear"),
        ({"weights": [0.5, 0.5], "anchor": adapter("start", 9)}, "there is an anchor"),
    ],
)
def test_anything_else_is_refused_without_the_base(arguments, why):
    with pytest.raises(MergeError) as refusal:
        merge([adapter("anna", 1), adapter("bert", 2)], **arguments)
    assert str(refusal.value).startswith(f"anna: {BIAS} is stored whole, not as a delta, and {why}")
    assert "--base" in str(refusal.value)


def test_one_that_lacks_a_whole_tensor_is_named():
    with pytest.raises(MergeError, match="bert does not have it"):
        merge([adapter("anna", 1), adapter("bert", 2, whole=())], [0.5, 0.5])


def test_with_the_base_a_whole_tensor_is_a_delta():
    experts = [adapter("anna", 1), adapter("bert", 2, whole=(HEAD,))]
    merged = merge(experts, [1.0, 2.0], scale=0.5, base=BASE)
    deltas = [e.whole[HEAD] - BASE.weight(HEAD) for e in experts]
    close(merged.whole[HEAD], BASE.weight(HEAD) + 0.5 * deltas[0] + deltas[1])
    close(merged.whole[BIAS], BASE.weight(BIAS) + 0.5 * (experts[0].whole[BIAS] - BASE.weight(BIAS)))


def test_an_anchor_moves_the_origin_of_whole_tensors_and_biases():
    start, experts = adapter("start", 9), [adapter("anna", 1), adapter("bert", 2)]
    merged = merge(experts, [0.7, 0.6], scale=0.5, anchor=start, base=BASE)
    wanted = start.whole[HEAD] + 0.5 * sum(
        w * (e.whole[HEAD] - start.whole[HEAD]) for w, e in zip((0.7, 0.6), experts, strict=True)
    )
    close(merged.whole[HEAD], wanted)
    biases = [0.5 * one.modules["layers.0.q_proj"].bias for one in (start, *experts)]
    found = merged.modules["layers.0.q_proj"]
    close(found.scaling * found.bias, biases[0] + 0.5 * (0.7 * (biases[1] - biases[0]) + 0.6 * (biases[2] - biases[0])))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("tsv", "iso_c")])
def test_copies_keep_their_biases_and_whole_tensors(method):
    whole_density = {"density": 1.0} if "density" in METHODS[method].defaults else {}
    zero = {key: 0.0 for key in ("epsilon", "gamma") if key in METHODS[method].defaults}
    one = adapter("anna", 1)
    copies = [one, LoraAdapter("bert", dict(one.modules), whole=dict(one.whole))]
    merged = merge(copies, [0.5, 0.5], method=method, base=BASE, **whole_density, **zero)
    for name in (HEAD, BIAS):
        close(merged.whole[name], one.whole[name])
    found, expected = merged.modules["layers.0.q_proj"], one.modules["layers.0.q_proj"]
    close(found.scaling * found.bias, expected.scaling * expected.bias)


def test_a_bias_that_one_lacks_is_zero():
    experts = [adapter("anna", 1), adapter("bert", 2, biased=False, whole=())]
    merged = merge(experts, [0.5, 0.5], base=BASE)
    found = merged.modules["layers.0.q_proj"]
    close(found.scaling * found.bias, 0.5 * 0.5 * experts[0].modules["layers.0.q_proj"].bias)


def test_a_resized_vocabulary_is_refused_by_name():
    experts = [adapter("anna", 1), adapter("bert", 2)]
    grown = LoraAdapter("bert", dict(experts[1].modules), whole={**experts[1].whole, HEAD: torch.zeros(7, 8)})
    with pytest.raises(MergeError, match=r"bert: lm_head.weight has shape \(7, 8\)"):
        merge([experts[0], grown], [0.5, 0.5])


def test_a_head_that_the_base_lacks_has_a_mean_and_nothing_else():
    one, other = (LoraAdapter(e.name, dict(e.modules), whole={"score.weight": e.whole[HEAD]}) for e in
                  (adapter("anna", 1), adapter("bert", 2)))  # fmt: skip
    merged = merge([one, other], [0.5, 0.5], base=BASE)
    close(merged.whole["score.weight"], 0.5 * (one.whole["score.weight"] + other.whole["score.weight"]))
    with pytest.raises(MergeError, match=r"weights sum to 2(.|\n)*The base given has no such tensor"):
        merge([one, other], [1.0, 1.0], base=BASE)


@pytest.mark.parametrize("count", [1, 2])
def test_a_scale_of_one_but_for_rounding_is_one(count):
    copies = [
        LoraAdapter(name, dict(adapter("x", 1).modules), whole=dict(adapter("x", 1).whole)) for name in "ab"[:count]
    ]
    merged = merge(copies, [1 / count] * count, scale="match_norm")
    close(merged.whole[HEAD], copies[0].whole[HEAD])


def test_the_matched_norm_scales_biases_and_whole_tensors_too():
    experts = [adapter("anna", 1), adapter("bert", 2)]
    matched = merge(experts, [0.5, 0.5], scale="match_norm", base=BASE, rank="exact")
    factor = matched_scale(experts, [0.5, 0.5])
    assert factor > 1.01
    plain = merge(experts, [0.5, 0.5], scale=factor, base=BASE, rank="exact")
    close(matched.whole[HEAD], plain.whole[HEAD])
    first, second = (m.modules["layers.0.q_proj"] for m in (matched, plain))
    close(first.scaling * first.bias, second.scaling * second.bias)


def test_what_does_not_fit_into_the_dtype_is_refused_by_name():
    module = LoraModule(torch.ones(1, 8).half(), torch.ones(12, 1).half(), 1.0, bias=torch.full((12,), 3e4).half())
    one = LoraAdapter("anna", {"q": module})
    with pytest.raises(MergeError, match=r"q.bias does not fit into torch.float16"):
        merge([one], [2.5])
    whole = LoraAdapter(
        "anna", {"q": LoraModule(module.A, module.B, 1.0)}, whole={HEAD: torch.full((6, 8), 4e4).half()}
    )
    zeros = Base()
    zeros.tensors[HEAD] = torch.zeros(6, 8)
    with pytest.raises(MergeError, match=r"lm_head.weight does not fit into torch.float16"):
        merge([whole], [2.5], base=zeros)


def test_the_weights_of_a_bias_are_those_of_its_module():
    one = adapter("anna", 1, whole=())
    merged = merge([one], [{"*.q_proj": 0.25}], rank="exact")
    found, expected = merged.modules["layers.0.q_proj"], one.modules["layers.0.q_proj"]
    close(found.scaling * found.bias, 0.25 * expected.scaling * expected.bias)
