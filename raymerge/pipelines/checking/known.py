"""What the counting of a run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from raymerge.config import Training
from raymerge.personas import Personas
from raymerge.pipelines.checking import operations
from raymerge.pipelines.checking.adapters import Bank
from raymerge.pipelines.checking.operations import Layers
from raymerge.pipelines.checking.prompts import Lengths
from raymerge.pipelines.job import Timing, read_timings
from raymerge.pipelines.opening import Opened


@dataclass(frozen=True)
class Known:
    """All that the counting starts from. clusters: persona -> label, as far as it is known. bank: adapters there."""

    opened: Opened
    personas: Personas
    layers: Layers
    lengths: Lengths
    clusters: Mapping[str, str]
    bank: Bank

    @cached_property
    def timings(self) -> dict[str, Timing]:
        """Of what all runs share: trainings and embeddings."""
        return read_timings(self.opened.project.shared_folder())

    @cached_property
    def run_timings(self) -> list[dict[str, Timing]]:
        """Of each run."""
        return [read_timings(self.opened.project.run_folder(name)) for name in self.opened.recipes]

    @cached_property
    def training_rows(self) -> dict[str, int]:
        """Training rows of each persona that has some."""
        return {name: count["train"] for name, count in self.personas.counts().items() if count["train"]}

    @cached_property
    def cluster_count(self) -> int:
        """Clusters there are, or will be."""
        return len(set(self.clusters.values())) or min(self.opened.project.clusters.count, len(self.personas.names))

    def adapted(self, settings: Training) -> int:
        """Numbers in the factors of one adapter."""
        return operations.factors(self.layers.targets, settings.rank)
