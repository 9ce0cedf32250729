"""Commands on adapters, which need no project file."""

from __future__ import annotations

from typing import Annotated

import typer

from raymerge.cli.application import app, end, option


@app.command()
def fuse(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER", help="Folders or URIs; NAME=FOLDER gives one a name.")
    ],
    out: Annotated[str, option("--out", "DIR", "Folder for the adapter, its manifest and its report.")],
    weights: Annotated[
        str | None, option("--weights", "W,W", "0.6,0.4; [0.2, 0.8] over depth; {pattern: 0.8} by module.")
    ] = None,
    weights_file: Annotated[str | None, option("--weights-file", "FILE", "YAML or JSON: {name: weight}.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale the weights to sum to 1.")] = False,
    method: Annotated[str, option("--method", "NAME", "`raymerge methods` lists them.")] = "linear",
    param: Annotated[
        list[str] | None, option("--param", "NAME=VALUE", "A parameter of the method; may be repeated.")
    ] = None,
    density: Annotated[str | None, option("--density", "X", "Share of entries that is kept.")] = None,
    t: Annotated[str | None, option("--t", "X", "Of slerp: 0 is the first by name, 1 the second.")] = None,
    seed: Annotated[str | None, option("--seed", "N", "Of random drops.")] = None,
    epsilon: Annotated[str | None, option("--epsilon", "X", "Of della: spread of the probabilities.")] = None,
    gamma: Annotated[str | None, option("--gamma", "X", "Of breadcrumbs: share dropped as outliers.")] = None,
    majority_sign: Annotated[str | None, option("--majority-sign", "KIND", "total or frequency.")] = None,
    rank: Annotated[str, option("--rank", "R", "keep, exact, a number, or energy such as 0.95.")] = "keep",
    uniform: Annotated[bool, typer.Option("--uniform", help="Pad all modules to one rank.")] = False,
    scale: Annotated[str, option("--scale", "S", "A number, or match_norm.")] = "1",
    anchor: Annotated[str | None, option("--anchor", "ADAPTER", "What deltas are measured from.")] = None,
    base: Annotated[str | None, option("--base", "MODEL", "The base's folder, for DoRA and whole tensors.")] = None,
    dtype: Annotated[str | None, option("--dtype", "NAME", "Of the result; by default the widest.")] = None,
    dialect: Annotated[str, option("--dialect", "NAME", "delta, or peft or mergekit for their numbers.")] = "delta",
    form: Annotated[str, option("--format", "NAME", "peft or mlx.")] = "peft",
    sweep: Annotated[str | None, option("--sweep", "LIST", "Several at once: 50/50,70/30,slerp:0.5,ties:0.2.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="What PEFT and mergekit would compute.")] = False,
    name: Annotated[str | None, option("--name", "NAME", "Of the result; by default the folder's.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weights.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace another fuse in DIR.")] = False,
) -> None:
    """Fuse a few adapters into one. Needs no project."""
    from raymerge.pipelines.fuse import fuse as pipeline
    from raymerge.pipelines.fusion.options import named_parameters
    from raymerge.pipelines.fusion.request import Request

    plain = {"density": density, "t": t, "seed": seed, "epsilon": epsilon, "gamma": gamma,
             "majority_sign": majority_sign}  # fmt: skip
    request = Request(
        adapters=adapters, out=out, weights=weights, weights_file=weights_file, normalize=normalize, method=method,
        parameters=named_parameters(param or (), plain), rank=rank, uniform=uniform, scale=scale, anchor=anchor,
        base=base, dtype=dtype, dialect=dialect, format=form, allow_pickle=allow_pickle, explain=explain, sweep=sweep,
        name=name, force=force,
    )  # fmt: skip
    end(pipeline(request))


@app.command()
def inspect(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER", help="Folders of adapters, at any depth, patterns, or URIs.")
    ],
    similarity: Annotated[bool, typer.Option("--similarity", help="Cosines of deltas: table, PNG, JSON.")] = False,
    out: Annotated[str | None, option("--out", "DIR", "Folder for the PNG and the JSON; else `inspect`.")] = None,
    base: Annotated[str | None, option("--base", "MODEL", "The base's folder, for DoRA.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weights.")] = False,
    no_norm: Annotated[bool, typer.Option("--no-norm", help="Read headers alone: quick for thousands.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """List adapters and say which of them merge."""
    from raymerge.pipelines.inspect import inspect as pipeline

    end(
        pipeline(
            adapters, similarity=similarity, out=out, base=base, allow_pickle=allow_pickle, norm=not no_norm,
            as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def methods(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Only these, in full.")] = None,
    dialect: Annotated[str, option("--dialect", "NAME", "delta, peft or mergekit.")] = "delta",
) -> None:
    """List the methods of merging, with their parameters."""
    from raymerge.pipelines.methods import methods as pipeline

    end(pipeline(names or (), dialect=dialect))


@app.command()
def prompt(
    base: Annotated[str, option("--base", "MODEL", "The base model: a folder, a URI, or a name on the hub.")],
    adapters: Annotated[
        list[str] | None, typer.Argument(metavar="ADAPTER", help="Folders of adapters, or NAME=FOLDER.")
    ] = None,
    adapter: Annotated[list[str] | None, option("--adapter", "ADAPTER", "One more; may be repeated.")] = None,
    fused: Annotated[list[str] | None, option("--fused", "ADAPTER", "One that another library merged.")] = None,
    text: Annotated[list[str] | None, option("--prompt", "TEXT", "What to ask; may be repeated.")] = None,
    prompts: Annotated[
        str | None, option("--prompts", "FILE", ".txt, one a line; .jsonl or .parquet: prompt, response, capability.")
    ] = None,
    prompt_format: Annotated[
        str, option("--prompt-format", "F", "Text around {prompt} (\\n breaks lines), or chat.")
    ] = "{prompt}",
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 64,
    stop: Annotated[list[str] | None, option("--stop", "TEXT", "Ends an answer; may be repeated.")] = None,
    similarity_model: Annotated[
        str | None, option("--similarity-model", "M", "Sentence encoder; none to do without.")
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Leave the base itself out.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Rows that are answered at once.")] = 64,
    device: Annotated[str, option("--device", "NAME", "cpu, cuda, cuda:1, or auto.")] = "auto",
    dtype: Annotated[str, option("--dtype", "NAME", "float32, bfloat16, float16, or auto.")] = "auto",
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
    out: Annotated[str | None, option("--out", "FILE", "Everything as JSON, into this file.")] = None,
) -> None:
    """Ask base, experts and fused adapters the same. Needs no project."""
    from raymerge.config import DEFAULT_ENCODER
    from raymerge.pipelines.prompt import prompt as pipeline
    from raymerge.pipelines.prompting.answers import Question

    question = Question(
        base=base, adapters=[*(adapters or ()), *(adapter or ())], fused=fused or (), prompts=text or (), file=prompts,
        prompt_format=_broken(prompt_format), max_new_tokens=max_new_tokens, stop=[_broken(one) for one in stop or ()],
        similarity_model=similarity_model or DEFAULT_ENCODER, with_base=not no_base, batch_size=batch_size,
        device=device, dtype=dtype, allow_pickle=allow_pickle,
    )  # fmt: skip
    end(pipeline(question, as_json=as_json, out=out))


def _broken(text: str) -> str:
    """With line breaks and tabs where the shell leaves their letters."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
