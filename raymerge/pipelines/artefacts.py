"""What the markers of adapters tell a comparison, each read once: size, error, and how an adapter was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raymerge.evaluation.curves import Losses, TrainingCurve, curve_of, thin_losses
from raymerge.manifest import read_manifest

# Settings that an adapter does not depend on, and the seed, which is what differs where seeds are compared.
_NOT_COMPARED = (
    "seed",
    "adapters_per_item",
    "checkpoint_every",
    "tensorboard",
    "micro_batch",
    "gradient_checkpointing",
    "epochs_chosen_by",
)
ORDER = ("unified", "cluster", "persona")  # of curves; others follow by name


@dataclass(frozen=True, eq=False)
class Artefact:
    """An adapter as its marker describes it.

    error: relative Frobenius error of a merge. grouping, name, steps, epochs, losses: of a training; steps are those of
    the optimiser, epochs in words: `8`, or `4 of 2, 4, 8` where validation examples chose, `(by neighbours)` where
    merges answered them. training: its settings, but for the seed and those that decide nothing; epochs are all that
    were tried.
    """

    bytes: int
    error: float | None
    name: str | None = None
    grouping: str | None = None
    steps: int | None = None
    epochs: str | None = None
    losses: Losses | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_trained(self) -> bool:
        """Whether it was trained here, not merged or brought along."""
        return self.grouping is not None


class Artefacts:
    """Markers that were read, by location. Losses are thinned at once, so that thousands fit into memory."""

    def __init__(self) -> None:
        self._read: dict[str, Artefact | None] = {}
        self._beside: dict[str, Artefact | None] = {}

    def read(self, location: str) -> Artefact | None:
        """The adapter at a location, None where it has no marker of ours."""
        if location not in self._read:
            manifest = read_manifest(location)
            self._read[location] = None if manifest is None else _describe(manifest)
        return self._read[location]

    def read_beside(self, location: str) -> Artefact | None:
        """The same for an adapter that no row is made of: it is in no curve."""
        if location not in self._beside:
            manifest = read_manifest(location)
            self._beside[location] = None if manifest is None else _describe({**manifest, "losses": []})
        return self._beside[location]

    def curves(self) -> tuple[TrainingCurve, ...]:
        """The training curves of all that was read, one for each grouping."""
        by_grouping: dict[str, list[Losses]] = {}
        for location in sorted(self._read):
            known = self._read[location]
            if known is not None and known.grouping is not None and known.losses is not None:
                by_grouping.setdefault(known.grouping, []).append(known.losses)
        ordered = sorted(by_grouping, key=lambda g: (ORDER.index(g) if g in ORDER else len(ORDER), g))
        return tuple(curve_of(grouping, by_grouping[grouping]) for grouping in ordered)


def _describe(manifest: Mapping[str, Any]) -> Artefact:
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    error = float(manifest["error"]) if "experts" in manifest else None
    grouping = manifest.get("grouping")
    if grouping is None:
        return Artefact(size, error)
    losses = manifest.get("losses", [])
    steps = manifest.get("steps", len(losses) or None)
    return Artefact(
        bytes=size,
        error=error,
        name=str(manifest["name"]),
        grouping=str(grouping),
        steps=None if steps is None else int(steps),
        epochs=_epochs(manifest),
        losses=thin_losses(losses, manifest.get("validation") or ()),
        training=_settings(manifest),
    )


def _settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in manifest.get("training", {}).items() if key not in _NOT_COMPARED}
    choice = manifest.get("epochs_chosen")
    return {**settings, "epochs": sorted(int(n) for n in choice["tried"])} if choice else settings


def _epochs(manifest: Mapping[str, Any]) -> str | None:
    choice = manifest.get("epochs_chosen")
    if choice:
        by = " (by neighbours)" if choice.get("by") == "neighbours" else ""
        return f"{choice['chosen']} of {', '.join(str(n) for n in sorted(int(n) for n in choice['tried']))}{by}"
    epochs = manifest.get("training", {}).get("epochs")
    return str(epochs) if isinstance(epochs, int) else None
