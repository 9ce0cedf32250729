"""What PEFT and mergekit compute instead: against dense references, and the facts that are known of them."""

import inspect
import subprocess
import sys

import pytest
import torch

from raymerge.adapters.adapter import LoraAdapter, LoraModule
from raymerge.errors import MergeError
from raymerge.merging.dialects import DIALECTS
from raymerge.merging.dialects.calls import calls
from raymerge.merging.dialects.explain import explain
from raymerge.merging.methods import METHODS
from raymerge.merging.prepare import prepare
from raymerge.merging.site import Dense, Weighted

PATHS = ("model.layers.0.q_proj", "model.layers.1.q_proj")


def adapter(seed, ranks=(4, 4), scalings=(1.0, 2.0), paths=PATHS, **options):
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: LoraModule(
            torch.randn(rank, 20, generator=generator), torch.randn(16, rank, generator=generator), scaling
        )
        for path, rank, scaling in zip(paths, ranks, scalings, strict=True)
    }
    return LoraAdapter(f"expert {seed}", modules, **options)


def by_name(explanations):
    return {(one.library, one.call.split('"')[1] if '"' in one.call else one.call.split(",")[0][14:]): one
            for one in explanations}  # fmt: skip


def dense(merging, path):
    site = merging.site(path)
    found = merging.combined(site)
    if isinstance(found, Dense):
        return found.delta.double()
    if isinstance(found, Weighted):
        modules = zip(found.coefficients, site.read(), strict=True)
        return sum(c * m.delta(torch.float64) for c, m in modules if m is not None)
    return sum(f.weight * f.B.double() @ f.A.double() for f in found.factors)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "della", "breadcrumbs_ties"])
def test_differences_and_norms_are_those_of_the_dense_deltas(method):
    adapters, weights = [adapter(0), adapter(1), adapter(2)], [0.6, -0.2, 0.9]
    ours = prepare(adapters, weights, method=method)
    ours_dense = torch.stack([dense(ours, path) for path in PATHS])
    explanations = explain(adapters, weights, method=method)
    assert len(explanations) == len(calls(method))
    for call, explanation in zip(calls(method), explanations, strict=True):
        given = call.translate(ours.parameters)
        theirs = prepare(adapters, weights, method=call.name, dialect=call.library, **given)
        theirs_dense = torch.stack([dense(theirs, path) for path in PATHS])
        expected = float((theirs_dense - ours_dense).norm() / ours_dense.norm())
        assert explanation.difference == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert explanation.norm_ratio == pytest.approx(float(theirs_dense.norm() / ours_dense.norm()), rel=1e-4)


def test_linear():
    found = by_name(explain([adapter(0), adapter(1)], [0.5, 1.0]))
    assert {name for (_, name), one in found.items() if one.difference < 1e-6} == {"cat", "svd", "task_arithmetic"}
    assert found["peft", "linear"].difference > 0.5
    assert "written as a product" in found["peft", "linear"].reason
    assert found["mergekit", "linear"].norm_ratio == pytest.approx(1 / 1.5)
    assert "divides by the sum of the weights" in found["mergekit", "linear"].reason


@pytest.mark.parametrize("count", [2, 5])
def test_the_ties_of_peft_shrinks_with_the_number_of_adapters(count):
    """Copies at weights 1/N come back as one of them; in PEFT, 1/N of it."""
    modules = adapter(0).modules
    copies = [LoraAdapter(f"copy {i}", modules) for i in range(count)]
    found = by_name(explain(copies, [1 / count] * count, method="ties", density=1.0))
    assert found["peft", "ties_svd"].norm_ratio == pytest.approx(1 / count, rel=1e-4)
    assert found["mergekit", "ties"].difference < 1e-5
    assert "shrinks" in found["peft", "ties_svd"].reason
    assert "shrinks" in found["peft", "ties"].reason


def test_other_factors_of_the_same_deltas_change_what_peft_computes():
    a, b = adapter(0), adapter(1)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    turned = {path: LoraModule(turn.T @ m.A, m.B @ turn, m.scaling) for path, m in a.modules.items()}
    one, other = (
        by_name(explain([first, b], [0.5, 0.5], method="magnitude_prune")) for first in (a, LoraAdapter(a.name, turned))
    )
    assert abs(one["peft", "magnitude_prune"].difference - other["peft", "magnitude_prune"].difference) > 0.01
    assert one["peft", "magnitude_prune_svd"].difference < 1e-5
    assert other["peft", "magnitude_prune_svd"].difference < 1e-5


def test_ranks_that_differ_are_refused_by_peft_alone():
    found = by_name(explain([adapter(0), adapter(1, ranks=(2, 4))], [0.5, 0.5], method="ties"))
    assert found["peft", "ties"].difference is None
    assert found["peft", "ties"].norm_ratio is None
    assert "needs adapters of one rank" in found["peft", "ties"].reason
    assert found["peft", "ties_svd"].difference > 0.1
    assert found["mergekit", "ties"].difference < 1e-4


def test_what_the_libraries_do_not_have():
    adapters = [adapter(0), adapter(1)]
    unequal = by_name(explain(adapters, [0.6, 0.4], method="karcher"))
    assert "has no weights" in unequal["mergekit", "karcher"].reason
    equal = by_name(explain(adapters, [0.5, 0.5], method="karcher"))
    assert equal["mergekit", "karcher"].difference < 1e-4
    frequency = by_name(explain(adapters, [0.6, 0.4], method="ties", majority_sign="frequency"))
    assert "by the sum only" in frequency["mergekit", "ties"].reason
    assert frequency["peft", "ties_svd"].difference is not None
    assert explain(adapters, [0.5, 0.5], method="tsv") == ()
    assert str(explain(adapters, [0.5, 0.5], method="iso_c")) == "Neither PEFT nor mergekit has this method."


def test_what_peft_does_not_merge():
    head = {"lm_head.weight": torch.zeros(3, 4)}
    found = by_name(explain([adapter(0, whole=head), adapter(1, whole=head)], [0.5, 0.5]))
    assert "modules_to_save" in found["peft", "cat"].reason
    assert found["mergekit", "task_arithmetic"].difference < 1e-6
    dora = LoraAdapter("dora", {p: LoraModule(torch.eye(20), torch.randn(16, 20), 1.0, nominal=4) for p in PATHS})
    assert "DoRA" in by_name(explain([adapter(0), dora], [0.5, 0.5]))["peft", "svd"].reason
    biased = {p: LoraModule(m.A, m.B, m.scaling, bias=torch.ones(16)) for p, m in adapter(0).modules.items()}
    found = by_name(explain([LoraAdapter("biased", biased), adapter(1)], [0.5, 0.5]))
    assert found["peft", "svd"].reason == "the same delta; trained biases are lost"


def test_nothing_left_to_compare_with():
    silent = [LoraAdapter(n, {p: LoraModule(m.A, m.B * 0, 1.0) for p, m in adapter(0).modules.items()}) for n in "ab"]
    for explanation in explain(silent, [0.5, 0.5], method="ties"):
        assert explanation.difference is None
        assert "nothing is left" in explanation.reason


def test_modules_that_differ_and_settings_by_layer():
    adapters = [adapter(0), adapter(1, ranks=(4,), scalings=(1.0,), paths=PATHS[:1])]
    found = explain(adapters, [[0.2, 0.8], 0.5], method="ties", density=[0.3, 0.6])
    assert by_name(found)["peft", "ties"].call == (
        'add_weighted_adapter(combination_type="ties", density=..., majority_sign_method="total")'
    )
    assert all(one.difference is not None for one in found)


def test_as_text():
    text = str(explain([adapter(0), adapter(1)], [0.5, 0.5], method="della", density=0.4, epsilon=0.2))
    first, second = text.splitlines()
    assert first == "mergekit merge_method: della, density: 0.4, epsilon: 0.1"
    assert second.startswith("  differs by 0.")
    assert "times ours: mergekit elects signs" in second
    assert str(explain([adapter(0)], [1.0])).splitlines()[1] == "  the same delta"


def test_what_merge_refuses_is_refused():
    with pytest.raises(MergeError, match="unknown method"):
        explain([adapter(0), adapter(1)], [0.5, 0.5], method="tie")
    with pytest.raises(MergeError, match="density"):
        explain([adapter(0), adapter(1)], [0.5, 0.5], method="ties", density=2.0)


def test_every_call_exists_and_knows_its_parameters():
    for method in METHODS.values():
        for call in calls(method.name):
            theirs = DIALECTS[call.library][call.name]
            assert set(call.parameters.values()) <= set(theirs.defaults)
            assert set(call.parameters) <= set(method.defaults)


@pytest.mark.parametrize(
    "method", [method for methods in DIALECTS.values() for method in methods.values()], ids=lambda m: m.name
)
def test_functions_take_the_parameters_that_are_registered(method):
    site, *parameters = inspect.signature(method.load()).parameters.values()
    assert site.name == "site"
    assert {parameter.name for parameter in parameters} == set(method.defaults)


def test_the_registry_needs_no_torch():
    code = "import sys, raymerge.merging.dialects, raymerge.merging.dialects.calls; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
