"""Training many adapters at once against one frozen base model."""

from raymerge.models.training.rows import batch_order
from raymerge.models.training.settings import (
    GroupProgress,
    Trained,
    TrainingGroup,
    TrainingSettings,
    Watch,
    learning_rate,
    steps_of,
)
from raymerge.models.training.train import train

__all__ = [
    "GroupProgress",
    "Trained",
    "TrainingGroup",
    "TrainingSettings",
    "Watch",
    "batch_order",
    "learning_rate",
    "steps_of",
    "train",
]
