"""Where examples come from: a path, and what its columns are called."""

from __future__ import annotations

from raymerge.config import PersonaSource, Project

__all__ = ["PersonaSource", "source_of"]


def source_of(project: Project) -> PersonaSource | None:
    """The examples that a project names, with an absolute path; None where it has none."""
    source = project.personas
    return None if source is None else source.model_copy(update={"path": project.path(source.path)})
