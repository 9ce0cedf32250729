"""Where examples come from: a path, and what its columns are called."""

from __future__ import annotations

from dataclasses import dataclass

from raymerge.config import Project


@dataclass(frozen=True)
class PersonaSource:
    """What a task carries to read the same examples again. path: absolute, or a URI."""

    path: str


def source_of(project: Project) -> PersonaSource | None:
    """The examples that a project names; None where it has none."""
    return PersonaSource(project.path(project.personas)) if project.personas else None
