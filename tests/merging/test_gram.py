"""Inner products of whole adapters, against dense deltas."""

import torch

from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.merging import gram as gram_room
from raymerge.merging.gram import gram


def adapters():
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(7):
        modules = {}
        for path, shape in {"q": (9, 12), "k": (5, 12), "down": (12, 20)}.items():
            if (number + len(path)) % 4:
                rank = 1 + (number * 2) % 5
                A = torch.randn(rank, shape[1], generator=generator)
                modules[path] = LoraModule(A.bfloat16(), torch.randn(shape[0], rank, generator=generator), 0.5 + number)
        made.append(LoraAdapter(f"a{number}", modules))
    return made


def dense_gram(several):
    def flat(adapter):
        return {path: module.delta(torch.float64).flatten() for path, module in adapter.modules.items()}

    deltas = [flat(adapter) for adapter in several]
    return torch.tensor(
        [[sum(float(a[p] @ b[p]) for p in set(a) & set(b)) for b in deltas] for a in deltas], dtype=torch.float64
    )


def test_inner_products_are_those_of_dense_deltas(monkeypatch):
    several = adapters()
    torch.testing.assert_close(gram(several), dense_gram(several), rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(gram_room, "_BLOCK", 4)  # several blocks, and a rank that fills one alone
    torch.testing.assert_close(gram(several), dense_gram(several), rtol=1e-10, atol=1e-10)


def test_adapters_without_common_modules_are_orthogonal():
    one = LoraAdapter("one", {"q": LoraModule(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    other = LoraAdapter("other", {"k": LoraModule(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    assert gram([one, other]).tolist() == [[4.0, 0.0], [0.0, 4.0]]
