"""`raymerge search`: of a project's recipes, or of the weights of a few adapters."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from raymerge.cli.application import app, end, option
from raymerge.cli.projects import Local
from raymerge.errors import ProjectError


@app.command()
def search(
    given: Annotated[
        list[str], typer.Argument(metavar="PROJECT", help="Project file; with --fuse the adapters, or NAME=FOLDER.")
    ],
    trials: Annotated[int | None, typer.Option(min=1, metavar="N", help="Recipes to try; else the project's.")] = None,
    minutes: Annotated[float | None, typer.Option(metavar="M", help="Begin no trial after so long.")] = None,
    evaluations: Annotated[int | None, typer.Option(min=1, metavar="N", help="Nor after so many answers.")] = None,
    sampler: Annotated[str | None, option("--sampler", "NAME", "tpe, cmaes, random or grid.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the sampler and the subsets.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Trials at once; 1 is exact by seed.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew; scores that are known are kept.")] = False,
    fuse: Annotated[bool, typer.Option("--fuse", help="Search weights of a few adapters, without a project.")] = False,
    prompts: Annotated[
        str | None, option("--prompts", "FILE", "With --fuse: .jsonl or .parquet of prompt and response.")
    ] = None,
    base: Annotated[str | None, option("--base", "MODEL", "With --fuse: the base; else what adapters record.")] = None,
    out: Annotated[str, option("--out", "DIR", "With --fuse: for trials and the result.")] = "fuse_search",
    negative: Annotated[bool, typer.Option("--negative", help="With --fuse: weights from -1 to 1.")] = False,
    prompt_format: Annotated[
        str, option("--prompt-format", "F", "With --fuse: text around {prompt}, or chat.")
    ] = "{prompt}",
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="With --fuse: longest answer.")] = 64,
    local: Local = False,
) -> None:
    """Find the best recipe on validation examples."""
    options = {"trials": trials, "minutes": minutes, "evaluations": evaluations, "sampler": sampler, "seed": seed,
               "concurrency": concurrency}  # fmt: skip
    settings: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if fuse:
        from raymerge.pipelines.search_fuse import search_fuse
        from raymerge.pipelines.searching.fused import Fused

        generation = {"prompt_format": prompt_format.replace("\\n", "\n"), "max_new_tokens": max_new_tokens}
        end(
            search_fuse(
                Fused(tuple(given), prompts, base, out, negative, generation), settings=settings, restart=restart,
                local=local,
            )
        )  # fmt: skip
    if prompts is not None or base is not None or negative:
        raise ProjectError("search: --prompts, --base and --negative go with --fuse.\nA project file says the rest.")
    if len(given) != 1:
        raise ProjectError(f"search: takes one project file; found {len(given)}.\nWith --fuse it takes adapters.")
    from raymerge.pipelines.search import search as pipeline

    end(pipeline(given[0], settings=settings, restart=restart, local=local))
