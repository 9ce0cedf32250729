"""Groups to train, what is common to their settings, and how far two adapters are apart."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raymerge.adapters import LoraAdapter
from raymerge.models.training import GroupProgress, Trained, TrainingGroup, TrainingSettings

SETTINGS = TrainingSettings(rank=3, alpha=6.0, epochs=3, learning_rate=5e-3, batch_size=4, clip=0.5)


def group(name: str, rows: int, shift: int = 0, validation: int = 0) -> TrainingGroup:
    """Rows of different lengths, different for each shift."""
    texts = []
    for i in range(rows + validation):
        words = [f"w{(shift * 7 + i * 5 + j * 3) % 56}" for j in range(4 + (i * 5 + shift) % 9)]
        cut = 1 + (i + shift) % 3
        texts.append((" ".join(words[:cut]), " ".join(words[cut:])))
    return TrainingGroup(name, tuple(texts[:rows]), tuple(texts[rows:]))


def relative(found: LoraAdapter, wanted: LoraAdapter) -> float:
    """Relative difference over all modules, of A or of B, whichever is larger."""
    assert found.modules.keys() == wanted.modules.keys()
    return max(
        float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))
        for a, b in ((flat(found, factor), flat(wanted, factor)) for factor in ("A", "B"))
    )


def flat(adapter: LoraAdapter, factor: str) -> Tensor:
    return torch.cat([getattr(module, factor).flatten() for module in adapter.modules.values()]).double()


@dataclass
class Recorder:
    """A watch that writes down what it is told, and wants a checkpoint after some joint steps.

    keeps: names of adapters that it says it has put elsewhere.
    """

    wanted: frozenset[int] = frozenset()
    keeps: frozenset[str] = frozenset()
    steps: list[dict[str, GroupProgress]] = field(default_factory=list)
    tokens: int = 0
    done: list[Trained] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    states: list[bytes] = field(default_factory=list)

    def stepped(self, progress: Mapping[str, GroupProgress], tokens: int) -> None:
        self.steps.append(dict(progress))
        self.tokens += tokens

    def finished(self, trained: Trained) -> bool:
        self.done.append(trained)
        return trained.adapter.name in self.keeps

    def said(self, text: str) -> None:
        self.texts.append(text)

    def due(self) -> bool:
        return len(self.steps) in self.wanted

    def save(self, state: bytes) -> None:
        self.states.append(state)
