"""How adapters are trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from raymerge.config.section import Section

Grouping = Literal["persona", "cluster", "unified"]
GROUPINGS: tuple[Grouping, ...] = ("persona", "cluster", "unified")
Epochs = int | tuple[int, ...]


class Training(Section):
    """LoRA training. `epochs`, `learning_rate` and `batch_size` may differ by grouping: {persona: 12, unified: 3}.

    Several epochs, [4, 8, 16], are tried on a part of the adapters, and validation examples choose. epochs_chosen_by:
    what answers these for personas, each one's own adapter or the equal-weights merge of its neighbours' and its own.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16, gt=0)
    rslora: bool = False  # scaling alpha / sqrt(rank) instead of alpha / rank
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of what enters A
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    epochs: Epochs | dict[Grouping, Epochs] = 3
    epochs_chosen_by: Literal["own", "neighbours"] = "own"
    learning_rate: float | dict[Grouping, float] = 2e-4
    batch_size: int | dict[Grouping, int] = 8  # rows of one adapter in an optimiser step
    micro_batch: int | None = Field(default=None, ge=1)  # of these at once; None: all, fewer where memory runs out
    gradient_checkpointing: bool = False
    warmup: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    patience: int | None = Field(default=None, ge=1)  # epochs without a better validation loss; the best is kept
    max_length: int | None = Field(default=None, ge=2)  # tokens of a row; None is what the base knows
    truncate: bool = False  # cut rows that are longer, instead of refusing them
    seed: int = 0
    shared_init: bool = True
    start_from: str | None = None
    adapters_per_item: int = Field(default=25, ge=1)
    checkpoint_every: float = Field(default=300, ge=0)  # seconds
    tensorboard: bool = False

    @model_validator(mode="after")
    def _every_grouping(self) -> Training:
        for key in ("epochs", "learning_rate", "batch_size"):
            value = getattr(self, key)
            if isinstance(value, dict) and set(value) != set(GROUPINGS):
                raise ValueError(f"{key}: give one number, or one for each of {', '.join(GROUPINGS)}")
            given = value.values() if isinstance(value, dict) else [value]
            numbers = [n for one in given for n in (one if isinstance(one, tuple) else (one,))]
            if not numbers or not all(0 < number < float("inf") for number in numbers):
                raise ValueError(f"{key}: must be above 0")
        return self

    @field_validator("target_modules", mode="before")
    @classmethod
    def _some_modules(cls, value: Any) -> Any:
        if value != "all-linear" and (isinstance(value, str) or not value):
            raise ValueError("give all-linear, or a list of one name or more such as [q_proj, v_proj]")
        return value

    def of(self, grouping: Grouping) -> Training:
        """The settings of one grouping: every value a single number. Only personas have neighbours to choose by."""
        single: dict[str, Any] = {
            key: value[grouping]
            for key in ("epochs", "learning_rate", "batch_size")
            if isinstance(value := getattr(self, key), dict)
        }
        if grouping != "persona":
            single["epochs_chosen_by"] = "own"
        return self.model_copy(update=single)

    @property
    def choices(self) -> tuple[int, ...]:
        """The numbers of epochs of one grouping, of which there may be several to choose from."""
        assert not isinstance(self.epochs, dict)
        return (self.epochs,) if isinstance(self.epochs, int) else self.epochs

    @property
    def tries_epochs(self) -> bool:
        """Whether some grouping has several numbers of epochs to choose from."""
        given = self.epochs.values() if isinstance(self.epochs, dict) else [self.epochs]
        return any(not isinstance(one, int) and len(one) > 1 for one in given)

    @property
    def tries_neighbours(self) -> bool:
        """Whether one grouping has several numbers of epochs, and merges of neighbours are to choose among them."""
        return len(self.choices) > 1 and self.epochs_chosen_by == "neighbours"

    def with_epochs(self, epochs: int) -> Training:
        """The same with one number of epochs."""
        return self.model_copy(update={"epochs": epochs})
