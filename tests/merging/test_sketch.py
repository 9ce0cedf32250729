import numpy as np
import torch

from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.merging.gram import gram
from raymerge.merging.sketch import sketch


def adapters(count, modules=14):
    random = torch.Generator().manual_seed(0)
    common = {m: torch.randn(48, 4, generator=random) for m in range(modules)}
    for number in range(count):
        made = {}
        for m in range(modules):
            A = torch.randn(4, 32, generator=random)
            made[f"layers.{m}"] = LoraModule(A, common[m] + torch.randn(48, 4, generator=random), 0.5)
        yield LoraAdapter(f"a{number}", made)


def test_inner_products_are_those_of_the_deltas_nearly():
    several = list(adapters(12))
    several.append(LoraAdapter("copy", {p: LoraModule(m.A, 3 * m.B, m.scaling) for p, m in several[0].modules.items()}))
    exact = gram(several).numpy()
    rows = np.stack([sketch(a, 4096) for a in several]).astype(np.float64)

    def cosines(products):
        norms = np.sqrt(np.diag(products))
        return products / np.outer(norms, norms)

    assert np.abs(cosines(rows @ rows.T) - cosines(exact)).max() < 0.08
    assert cosines(rows @ rows.T)[0, -1] > 0.9999


def test_missing_modules_count_as_zero_and_seeds_differ():
    whole = next(adapters(1))
    half = LoraAdapter("half", {p: m for p, m in whole.modules.items() if int(p.split(".")[1]) < 7})
    rest = LoraAdapter("rest", {p: m for p, m in whole.modules.items() if int(p.split(".")[1]) >= 7})
    np.testing.assert_allclose(sketch(half, 512) + sketch(rest, 512), sketch(whole, 512), rtol=1e-4, atol=1e-4)
    assert not np.allclose(sketch(whole, 512, seed=1), sketch(whole, 512))
