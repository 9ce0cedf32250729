"""`raymerge router`: a network that says whose adapters serve a persona."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from raymerge.cli.application import app, end, option
from raymerge.cli.projects import Local, ProjectFile


@app.command()
def router(
    project: ProjectFile,
    network: Annotated[str | None, option("--network", "NAME", "bilinear or mlp; else the project's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Of the network and its tuning.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Passes over the training rows.")] = None,
    k: Annotated[int | None, typer.Option(min=1, metavar="N", help="Contributors per persona, at most.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, metavar="N", help="Of the tuning after it.")] = None,
    held_out: Annotated[
        int | None, typer.Option("--held-out", min=0, metavar="N", help="Personas left out, for cold start.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Remove the router there is; begin anew.")] = False,
    local: Local = False,
) -> None:
    """Train a router on the answers of mixtures, tune and compare it."""
    from raymerge.pipelines.router import router as pipeline

    options = {"network": network, "seed": seed, "epochs": epochs, "k": k, "trials": trials, "held_out": held_out}
    settings: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    end(pipeline(project, settings=settings, restart=restart, local=local))
