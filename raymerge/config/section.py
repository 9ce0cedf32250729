"""What every part of the project file has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen part of the project file that knows all its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")
