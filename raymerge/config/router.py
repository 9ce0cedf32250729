"""How the router is made, which is trained to say whose adapters serve a persona, and how much of each."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from raymerge.config.section import Section
from raymerge.config.sizes import parse_size


class Router(Section):
    """A network that weights experts by personas' embeddings: its shape, its training, and its tuning afterwards.

    held_out: personas who are as if they had no adapter and no examples but those of the test: names, or how many are
    drawn by the seed. trials: of the search that tunes the trained router on validation examples. merge_rank: of the
    merges that it tries and publishes, as a recipe's rank is written.
    """

    network: Literal["bilinear", "mlp"] = "bilinear"
    rank: int = Field(default=16, ge=1)  # of the bilinear network's two maps
    hidden: int = Field(default=128, ge=1)  # of the mlp
    temperature: float = Field(default=0.1, gt=0)  # of the similarity in the bilinear score
    candidates: int = Field(default=64, ge=1)  # experts of a persona that are looked at, the most similar
    k: int = Field(default=24, ge=1)  # of these, the most that contribute
    scope: Literal["all", "cluster"] = "all"  # whose adapters may be candidates
    weighting: Literal["softmax", "entmax"] = "softmax"
    max_in_degree: int | None = Field(default=None, ge=1)  # personas that one expert may serve
    epochs: int = Field(default=5, ge=1)
    learning_rate: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    personas_per_step: int = Field(default=40, ge=1)
    rows_per_persona: int = Field(default=5, ge=1)
    entropy: float = Field(default=0.0, ge=0)  # what a nat of the weights' entropy is worth beside the loss
    patience: int | None = Field(default=None, ge=1)  # epochs without a better validation loss
    clip: float = Field(default=1.0, gt=0)
    layers: int = Field(default=0, ge=0)  # groups of layers with a learned offset; 0: none
    layers_penalty: float = Field(default=1.0, ge=0)
    seed: int = Field(default=0, ge=0)
    held_out: tuple[str, ...] | int = ()
    trials: int = Field(default=24, ge=1)
    merge_rank: int | float | str | dict[str, Any] = 32
    checkpoint_every: float = Field(default=60, ge=0)  # seconds
    experts_memory: str | None = None  # for adapters while it is trained, such as 8GiB; None: all at once

    @field_validator("layers")
    @classmethod
    def _no_single_group(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one group has no offset from another: give 0, or 2 or more")
        return value

    @field_validator("experts_memory")
    @classmethod
    def _is_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @field_validator("held_out", mode="before")
    @classmethod
    def _names_or_count(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(str(name) for name in value)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        raise ValueError("give names of personas, or how many are drawn")
