"""The command line. Thin: every command calls one pipeline, which the scripts in jobs/ call too."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from raymerge.errors import RaymergeError

app = typer.Typer(
    name="raymerge",
    help="Merge hundreds of LoRA adapters into better ones, on Ray.\n\nExit status: 0 all done, 1 some items failed, "
    "2 bad input. --debug shows a traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ProjectFile = Annotated[str, typer.Argument(metavar="PROJECT", help="Project file; `raymerge init` writes one.")]
Recipes = Annotated[
    list[str] | None, typer.Option("--recipe", metavar="NAME", help="Only this recipe; may be repeated.")
]
Runs = Annotated[list[str] | None, typer.Option("--run", metavar="NAME", help="Only this run; may be repeated.")]
Local = Annotated[bool, typer.Option("--local", help="In this process, without Ray.")]
Refit = Annotated[bool, typer.Option("--refit", help="Fit clusters and the embeddings' mean anew.")]


@app.command()
def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the world and all made of it.")] = "demo",
    quick: Annotated[bool, typer.Option("--quick", help="A small world: about two minutes.")] = False,
    relatedness: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="X", help="How much neighbours share, 0 to 1.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Another seed is another world.")] = 0,
    local: Local = False,
) -> None:
    """Make a world; train, merge, evaluate and compare on it."""
    from raymerge.pipelines.demo import demo as pipeline

    _end(pipeline(out, quick=quick, relatedness=relatedness, seed=seed, local=local))


@app.command()
def init(folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder of adapters.")]) -> None:
    """Write a project file for a folder of adapters."""
    from raymerge.pipelines.init import init as pipeline

    location, lines = pipeline(folder)
    for line in lines:
        typer.echo(line)
    typer.echo(f"Wrote {location}. Next: raymerge merge {location}")


@app.command()
def run(project: ProjectFile, recipe: Recipes = None, local: Local = False, refit: Refit = False) -> None:
    """Train what is missing, merge, evaluate and compare."""
    from raymerge.pipelines.run import run as pipeline

    _end(pipeline(project, recipes=recipe or (), local=local, refit=refit))


@app.command()
def train(
    project: ProjectFile,
    group_by: Annotated[str, typer.Option(metavar="GROUPING", help="persona, cluster or unified.")],
    start_from: Annotated[
        str | None, typer.Option(metavar="ADAPTER", help="Begin from a copy of this adapter.")
    ] = None,
    local: Local = False,
    refit: Refit = False,
) -> None:
    """Train an adapter per persona, per cluster, or one on all."""
    from raymerge.pipelines.train import train as pipeline

    _end(pipeline(project, group_by=group_by, start_from=start_from, local=local, refit=refit))


@app.command()
def merge(
    project: ProjectFile,
    recipe: Recipes = None,
    strategy: Annotated[
        str | None, typer.Option(metavar="NAME", help="A recipe given here, not in the project.")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Its name; by default the strategy's.")] = None,
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
    _end(
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

    _end(pipeline(project, runs=run or (), recipes=recipe or (), local=local, refit=refit))


@app.command()
def compare(
    project: ProjectFile,
    run: Runs = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole comparison as JSON.")] = False,
) -> None:
    """Compare evaluated runs: a table, plots, one page."""
    from raymerge.pipelines.compare import compare as pipeline

    _end(pipeline(project, runs=run or (), as_json=as_json))


def _option(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text)


@app.command()
def fuse(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER", help="Folders or URIs; NAME=FOLDER gives one a name.")
    ],
    out: Annotated[str, _option("--out", "DIR", "Folder for the adapter, its manifest and its report.")],
    weights: Annotated[
        str | None, _option("--weights", "W,W", "0.6,0.4; [0.2, 0.8] over depth; {pattern: 0.8} by module.")
    ] = None,
    weights_file: Annotated[str | None, _option("--weights-file", "FILE", "YAML or JSON: {name: weight}.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale the weights to sum to 1.")] = False,
    method: Annotated[str, _option("--method", "NAME", "`raymerge methods` lists them.")] = "linear",
    param: Annotated[
        list[str] | None, _option("--param", "NAME=VALUE", "A parameter of the method; may be repeated.")
    ] = None,
    density: Annotated[str | None, _option("--density", "X", "Share of entries that is kept.")] = None,
    t: Annotated[str | None, _option("--t", "X", "Of slerp: 0 is the first by name, 1 the second.")] = None,
    seed: Annotated[str | None, _option("--seed", "N", "Of random drops.")] = None,
    epsilon: Annotated[str | None, _option("--epsilon", "X", "Of della: spread of the probabilities.")] = None,
    gamma: Annotated[str | None, _option("--gamma", "X", "Of breadcrumbs: share dropped as outliers.")] = None,
    majority_sign: Annotated[str | None, _option("--majority-sign", "KIND", "total or frequency.")] = None,
    rank: Annotated[str, _option("--rank", "R", "keep, exact, a number, or energy such as 0.95.")] = "keep",
    uniform: Annotated[bool, typer.Option("--uniform", help="Pad all modules to one rank.")] = False,
    scale: Annotated[str, _option("--scale", "S", "A number, or match_norm.")] = "1",
    anchor: Annotated[str | None, _option("--anchor", "ADAPTER", "What deltas are measured from.")] = None,
    base: Annotated[str | None, _option("--base", "MODEL", "The base's folder, for DoRA and whole tensors.")] = None,
    dtype: Annotated[str | None, _option("--dtype", "NAME", "Of the result; by default the widest.")] = None,
    dialect: Annotated[str, _option("--dialect", "NAME", "delta, or peft or mergekit for their numbers.")] = "delta",
    form: Annotated[str, _option("--format", "NAME", "peft or mlx.")] = "peft",
    sweep: Annotated[str | None, _option("--sweep", "LIST", "Several at once: 50/50,70/30,slerp:0.5,ties:0.2.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="What PEFT and mergekit would compute.")] = False,
    name: Annotated[str | None, _option("--name", "NAME", "Of the result; by default the folder's.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weights.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace another fuse in DIR.")] = False,
) -> None:
    """Fuse a few adapters into one. Needs no project."""
    from raymerge.pipelines.fuse import fuse as pipeline
    from raymerge.pipelines.fuse_options import named_parameters
    from raymerge.pipelines.fuse_request import Request

    plain = {"density": density, "t": t, "seed": seed, "epsilon": epsilon, "gamma": gamma,
             "majority_sign": majority_sign}  # fmt: skip
    request = Request(
        adapters, out, weights, weights_file, normalize, method, named_parameters(param or (), plain), rank, uniform,
        scale, anchor, base, dtype, dialect, form, allow_pickle, explain, sweep, name, force,
    )  # fmt: skip
    _end(pipeline(request))


@app.command()
def inspect(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER", help="Folders of adapters, at any depth, patterns, or URIs.")
    ],
    similarity: Annotated[bool, typer.Option("--similarity", help="Cosines of deltas: table, PNG, JSON.")] = False,
    out: Annotated[str, _option("--out", "DIR", "Folder for the PNG and the JSON.")] = "inspect",
    base: Annotated[str | None, _option("--base", "MODEL", "The base's folder, for DoRA.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weights.")] = False,
    no_norm: Annotated[bool, typer.Option("--no-norm", help="Read headers alone: quick for thousands.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """List adapters and say which of them merge."""
    # Before torch is loaded: threads that spin while another program holds a core make products thirty times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from raymerge.pipelines.inspect import inspect as pipeline

    _end(
        pipeline(
            adapters, similarity=similarity, out=out, base=base, allow_pickle=allow_pickle, norm=not no_norm,
            as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def methods(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Only these, in full.")] = None,
    dialect: Annotated[str, _option("--dialect", "NAME", "delta, peft or mergekit.")] = "delta",
) -> None:
    """List the methods of merging, with their parameters."""
    from raymerge.pipelines.methods import methods as pipeline

    _end(pipeline(names or (), dialect=dialect))


@app.command()
def prompt(
    base: Annotated[str, _option("--base", "MODEL", "The base model: a folder, a URI, or a name on the hub.")],
    adapters: Annotated[
        list[str] | None, typer.Argument(metavar="ADAPTER", help="Folders of adapters, or NAME=FOLDER.")
    ] = None,
    adapter: Annotated[list[str] | None, _option("--adapter", "ADAPTER", "One more; may be repeated.")] = None,
    fused: Annotated[list[str] | None, _option("--fused", "ADAPTER", "One that another library merged.")] = None,
    text: Annotated[list[str] | None, _option("--prompt", "TEXT", "What to ask; may be repeated.")] = None,
    prompts: Annotated[
        str | None, _option("--prompts", "FILE", ".txt, one a line; .jsonl or .parquet: prompt, response, capability.")
    ] = None,
    prompt_format: Annotated[
        str, _option("--prompt-format", "F", "Text around {prompt} (\\n breaks lines), or chat.")
    ] = "{prompt}",
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 64,
    stop: Annotated[list[str] | None, _option("--stop", "TEXT", "Ends an answer; may be repeated.")] = None,
    similarity_model: Annotated[
        str | None, _option("--similarity-model", "M", "Sentence encoder; none to do without.")
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Leave the base itself out.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Rows that are answered at once.")] = 64,
    device: Annotated[str, _option("--device", "NAME", "cpu, cuda, cuda:1, or auto.")] = "auto",
    dtype: Annotated[str, _option("--dtype", "NAME", "float32, bfloat16, float16, or auto.")] = "auto",
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
    out: Annotated[str | None, _option("--out", "FILE", "Everything as JSON, into this file.")] = None,
) -> None:
    """Ask base, experts and fused adapters the same. Needs no project."""
    from raymerge.config import DEFAULT_ENCODER
    from raymerge.pipelines.prompt import prompt as pipeline
    from raymerge.pipelines.prompt_answers import Question

    question = Question(
        base, [*(adapters or ()), *(adapter or ())], fused or (), text or (), prompts, _broken(prompt_format),
        max_new_tokens, [_broken(one) for one in stop or ()], similarity_model or DEFAULT_ENCODER, not no_base,
        batch_size, device, dtype, allow_pickle,
    )  # fmt: skip
    _end(pipeline(question, as_json=as_json, out=out))


def _broken(text: str) -> str:
    """With line breaks and tabs where the shell leaves their letters."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _end(status: int) -> None:
    raise typer.Exit(status)


def main(arguments: list[str] | None = None) -> Any:
    """Run a command. Exit status: 0 all done, 1 some items failed, 2 bad input or an unforeseen error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        app(args=[a for a in given if a != "--debug"], prog_name="raymerge", standalone_mode=True)
    except RaymergeError as error:
        if debug:
            raise
        print(f"raymerge: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        lines = str(error).strip().splitlines()
        print(f"raymerge: {type(error).__name__}{': ' + lines[0] if lines else ''}", file=sys.stderr)
        print("That was not foreseen. --debug shows where it happened.", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if _interrupted(end):
            print("raymerge: interrupted. The same command goes on where it stopped.", file=sys.stderr)
            sys.exit(130)
        raise


def _interrupted(end: BaseException | None) -> bool:
    """Whether an exit was made of Ctrl-C, which typer turns into exits that differ by its version."""
    while end is not None and not isinstance(end, KeyboardInterrupt):
        end = end.__cause__ or end.__context__
    return end is not None


if __name__ == "__main__":
    main()
