"""Where examples come from: columns, chats, splits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from raymerge.config.section import Section


class SplitNames(Section):
    """A column that names the split. `train`, `validation`, `test`: values that mean it, beside its own name."""

    column: str = "split"
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    @field_validator("train", "validation", "test", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _each_name_once(self) -> SplitNames:
        names = [*self.train, *self.validation, *self.test]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]!r} is given for two splits")
        return self

    def meanings(self) -> dict[str, str]:
        """What each value of the column means."""
        splits = ("train", "validation", "test")
        return {**{s: s for s in splits}, **{name: s for s in splits for name in getattr(self, s)}}


class SplitShares(Section):
    """Splits made here. `time`, `order`: of each persona's examples, sorted by `column` or as in the file, the last
    share is test and the one before it validation. `random`: a hash of persona and prompt decides for each example.
    """

    by: Literal["time", "order", "random"]
    column: str | None = None
    validation: float = Field(default=0.2, ge=0, lt=1)
    test: float = Field(default=0.2, ge=0, lt=1)
    seed: int = 0

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> SplitShares:
        if (self.by == "time") != (self.column is not None):
            raise ValueError("`by: time` needs `column`, when an example was said, and nothing else does")
        if self.validation + self.test >= 1:
            raise ValueError("validation and test take everything: their sum must be below 1, or nobody can be trained")
        return self


def _kind_of_split(value: Any) -> str:
    return (
        "SplitShares" if isinstance(value, SplitShares) or (isinstance(value, dict) and "by" in value) else "SplitNames"
    )


SPLIT_KINDS = ("SplitNames", "SplitShares")  # pydantic puts the kind into the place of an error


class PersonaSource(Section):
    """Where examples lie, and what their columns are called. docs/data.md describes it.

    path: a .jsonl or .parquet file, a folder of such files, or a pattern with `*`. messages: a column of chats, in
    place of prompt and response. skip_empty: leave examples without text out, instead of refusing them.
    """

    path: str
    persona: str = "persona"
    prompt: str = "prompt"
    response: str = "response"
    messages: str | None = None
    split: Annotated[
        Annotated[SplitNames, Tag("SplitNames")] | Annotated[SplitShares, Tag("SplitShares")],
        Discriminator(_kind_of_split),
    ] = SplitNames()
    skip_empty: bool = False

    @field_validator("split", mode="before")
    @classmethod
    def _column_of_splits(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"column": value}
        if isinstance(value, (dict, SplitNames, SplitShares)):
            return value
        raise ValueError("must be a column, or a mapping with `column` or `by`")

    @model_validator(mode="after")
    def _one_form(self) -> PersonaSource:
        if self.messages is not None and self.model_fields_set & {"prompt", "response"}:
            raise ValueError("give `messages`, or `prompt` and `response`: a chat holds both")
        return self
