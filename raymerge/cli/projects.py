"""Commands that work on a project file."""

from __future__ import annotations

from typing import Annotated

import typer

from raymerge.cli.application import app, end

ProjectFile = Annotated[str, typer.Argument(metavar="PROJECT", help="Project file; `raymerge init` writes one.")]
Recipes = Annotated[
    list[str] | None,
    typer.Option("--recipe", metavar="NAME or FILE", help="Only this one, or a file's; may be repeated."),
]
Runs = Annotated[list[str] | None, typer.Option("--run", metavar="NAME", help="Only this run; may be repeated.")]
Local = Annotated[bool, typer.Option("--local", help="In this process, without Ray.")]
Refit = Annotated[bool, typer.Option("--refit", help="Fit clusters and the embeddings' mean anew.")]
Seeds = Annotated[int, typer.Option(min=1, metavar="N", help="Train everything N times, for the spread over seeds.")]


@app.command()
def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the world and all made of it.")] = "demo",
    quick: Annotated[bool, typer.Option("--quick", help="A small world: about two minutes.")] = False,
    relatedness: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="X", help="How much neighbours share, 0 to 1.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Another seed is another world.")] = 0,
    all_rows: Annotated[
        bool, typer.Option("--all-rows", help="Every baseline and strategy, each tuned: about 25 minutes.")
    ] = False,
    seeds: Seeds = 1,
    local: Local = False,
) -> None:
    """Make a world; train, merge, evaluate and compare on it."""
    from raymerge.pipelines.demo import demo as pipeline

    end(pipeline(out, quick=quick, relatedness=relatedness, seed=seed, all_rows=all_rows, seeds=seeds, local=local))


@app.command()
def init(folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder of adapters.")]) -> None:
    """Write a project file for a folder of adapters."""
    from raymerge.pipelines.init import init as pipeline

    location, lines = pipeline(folder)
    for line in lines:
        typer.echo(line)
    typer.echo(f"Wrote {location}. Next: raymerge merge {location}")


@app.command()
def run(
    project: ProjectFile, recipe: Recipes = None, seeds: Seeds = 1, local: Local = False, refit: Refit = False
) -> None:
    """Train what is missing, merge, evaluate and compare."""
    from raymerge.pipelines.run import run as pipeline

    end(pipeline(project, recipes=recipe or (), seeds=seeds, local=local, refit=refit))


@app.command()
def train(
    project: ProjectFile,
    group_by: Annotated[str, typer.Option(metavar="GROUPING", help="persona, cluster or unified.")],
    cluster: Annotated[str | None, typer.Option(metavar="C", help="Only this cluster, by label or number.")] = None,
    start_from: Annotated[
        str | None, typer.Option(metavar="ADAPTER", help="Begin from a copy of this adapter.")
    ] = None,
    rank: Annotated[int | None, typer.Option(metavar="R", help="Of the adapters; else the project's.")] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Else the project's, as the following.")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Rows of an adapter in a step.")] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", help="Learning rate at its highest.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of initial factors and order.")] = None,
    local: Local = False,
    refit: Refit = False,
) -> None:
    """Train an adapter per persona, per cluster, or one on all."""
    from raymerge.pipelines.train import train as pipeline

    given = {"rank": rank, "epochs": epochs, "batch_size": batch_size, "learning_rate": lr, "seed": seed}
    settings = {key: value for key, value in given.items() if value is not None}
    end(
        pipeline(
            project, group_by=group_by, cluster=cluster, start_from=start_from, settings=settings, local=local,
            refit=refit,
        )
    )  # fmt: skip


@app.command()
def merge(
    project: ProjectFile,
    recipe: Recipes = None,
    strategy: Annotated[
        str | None, typer.Option(metavar="NAME", help="A recipe given here, not in the project.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its name; by default such as top_k_k5_ties.")
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, metavar="N", help="Contributors per persona.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, metavar="T", help="Of the softmax over similarities.")
    ] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="`raymerge methods` lists them.")] = None,
    param: Annotated[
        list[str] | None, typer.Option("--param", metavar="NAME=VALUE", help="A parameter of strategy or method.")
    ] = None,
    scale: Annotated[str | None, typer.Option(metavar="S", help="A number, or match_norm.")] = None,
    rank: Annotated[
        str | None, typer.Option(metavar="R", help="keep, exact, a number, or energy such as 0.95.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, and do nothing.")] = False,
    local: Local = False,
    refit: Refit = False,
) -> None:
    """Merge: write the adapters of each recipe."""
    from raymerge.pipelines.merge import merge as pipeline

    given = {"strategy": strategy, "name": name, "k": k, "temperature": temperature, "method": method, "scale": scale,
             "rank": rank}  # fmt: skip
    extra = {key: value for key, value in given.items() if value is not None}
    end(
        pipeline(
            project, recipes=recipe or (), extra=extra, parameters=param or (), plan=plan, local=local, refit=refit
        )
    )


@app.command()
def evaluate(
    project: ProjectFile, run: Runs = None, recipe: Recipes = None, local: Local = False, refit: Refit = False
) -> None:
    """Answer and score runs; with --recipe without writing adapters."""
    from raymerge.pipelines.evaluate import evaluate as pipeline

    end(pipeline(project, runs=run or (), recipes=recipe or (), local=local, refit=refit))


@app.command()
def compare(
    project: ProjectFile,
    run: Runs = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole comparison as JSON.")] = False,
) -> None:
    """Compare evaluated runs: a table, plots, one page."""
    from raymerge.pipelines.compare import compare as pipeline

    end(pipeline(project, runs=run or (), as_json=as_json))


@app.command()
def check(
    project: ProjectFile,
    model: Annotated[
        bool, typer.Option("--model", help="Ask the base and own adapters too, and time a few steps.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything found, as JSON.")] = False,
    local: Local = False,
) -> None:
    """Say what would go wrong, and what a run costs, before it."""
    from raymerge.pipelines.check import check as pipeline

    end(pipeline(project, model=model, as_json=as_json, local=local))
