"""fusion_report.md and sweep_report.md: what was merged, what came out, how to make it again and how to load it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raymerge.evaluation.wording import UNKNOWN, number, printable, size
from raymerge.merging.settings import Setting
from raymerge.pipelines.fusion.figures import Contributor, Fused

NAME, SWEEP_NAME = "fusion_report.md", "sweep_report.md"
_MOST_COLUMNS = 12  # inputs up to which the matrix of cosines is printed whole
_WORST = 8  # modules


def report(fused: Fused, location: str, explanation: str | None = None) -> str:
    """The report on one adapter, as markdown. location: of its folder, as it is to be loaded from."""
    parts = [
        f"# {_cell(fused.name)}",
        headline(fused) + ".",
        *(f"**Warning.** {_cell(warning)}" for warning in fused.warnings),
        "## Inputs",
        _inputs(fused),
        *_similarities(fused),
        "## Result",
        _result(fused),
        *_errors(fused),
        *(
            [f"## {_cell(fused.merges['method'])} here and elsewhere", _code("text", wrapped(explanation, 100))]
            if explanation
            else []
        ),
        *(["## Notes", "\n".join(f"* {_cell(note)}" for note in fused.notes)] if fused.notes else []),
        "## Make it again",
        _code("sh", fused.command),
        "## Load it",
        _loading(fused, location),
    ]
    return "\n\n".join(parts) + "\n"


def sweep_report(title: str, found: Sequence[Fused], failed: Mapping[str, str]) -> str:
    """The report on a sweep, as markdown: all results side by side. failed: why one is missing, by its name."""
    experts = [expert.name for expert in found[0].experts]
    cosines = [f"cos {name}" for name in experts[:_MOST_COLUMNS]]
    header = ["fuse", "method", "weights", "norm", "norm ratio", "error", "rank", "size", *cosines]
    warned = [f"* {_cell(fused.name)}: {_cell(warning)}" for fused in found for warning in fused.warnings]
    missing = [f"* {_cell(name)}: {_cell(why)}" for name, why in failed.items()]
    parts = [
        f"# {_cell(title)}",
        f"{len(found)} ways to fuse {_cell(joined(experts))}.",
        _table(header, [_row(fused) for fused in found]),
        _KEY,
        *(["## Failed", "\n".join(missing)] if missing else []),
        *(["## Warnings", "\n".join(warned)] if warned else []),
    ]
    return "\n\n".join(parts) + "\n"


def _row(fused: Fused) -> list[str]:
    figures = fused.figures
    return [
        f"[{fused.name}]({fused.name}/{NAME})",
        method_in_words(fused.merges),
        weights_in_words(fused.experts),
        f"{figures.norm:.4g}",
        number(figures.ratio, 2),
        error_in_words(figures.error),
        span_in_words(figures.rank),
        size(figures.size),
        *(number(expert.cosine, 3) for expert in fused.experts[:_MOST_COLUMNS]),
    ]


_KEY = (
    "Norm: Frobenius norm of the delta. Norm ratio: that norm over the weighted sum of the inputs' norms, 1 where "
    "averaging shrinks nothing. Error: what the rank and rounding lost, relative Frobenius. Cos: cosine of the "
    "result's delta with an input's."
)


def headline(fused: Fused) -> str:
    """What was merged, in one sentence without its stop."""
    merges = fused.merges
    words = f"{method_in_words(merges)} of {joined([expert.name for expert in fused.experts])}"
    if merges["scale"] != 1:
        words += f"; scale {merges['scale']}"
    if merges["anchor"]:
        words += f"; anchor {merges['anchor']}"
    if merges["dialect"] != "delta":
        words += f"; computed as {merges['dialect']} does"
    return printable(words)


def method_in_words(merges: Mapping[str, Any]) -> str:
    """`ties (density 0.2, majority_sign total)`."""
    values = [f"{key} {value}" for key, value in merges["method_parameters"].items() if value is not None]
    return f"{merges['method']} ({', '.join(values)})" if values else str(merges["method"])


def weight_in_words(weight: Setting) -> str:
    """`0.3333`; `0.2…0.8` from the first layer to the last; or `by module`."""
    if isinstance(weight, Mapping):
        return "by module"
    if isinstance(weight, Sequence):
        return f"{weight[0]:.3g}…{weight[-1]:.3g}"
    return f"{weight:.4g}"


def weights_in_words(experts: Sequence[Contributor]) -> str:
    """All weights, with a slash between them."""
    words = [weight_in_words(expert.weight) for expert in experts]
    return " / ".join(words) if len(words) <= 4 else f"{' / '.join(words[:3])} / … ({len(words)})"


def span_in_words(rank: Sequence[int]) -> str:
    """`8`, or `4 to 16` where modules differ."""
    return f"{rank[0]}" if rank[0] == rank[1] else f"{rank[0]}–{rank[1]}"


def error_in_words(error: float, digits: int = 3) -> str:
    """`0.125`, with that many decimals; `0.00042`, with two digits, where these would say less; `0` for none at all."""
    return f"{error:.{digits}f}" if error >= 10.0 ** (1 - digits) else f"{error:.2g}"


def joined(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`, or the first of many and their number."""
    if len(names) > 6:
        return f"{len(names)} adapters ({', '.join(names[:3])}, …)"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def pairs(fused: Fused) -> list[tuple[float, str, str]]:
    """Cosines of all pairs of inputs, the least similar first; empty where they were not compared."""
    table = fused.similarities or []
    names = [expert.name for expert in fused.experts]
    found = [(table[i][j], names[i], names[j]) for i in range(len(table)) for j in range(i)]
    return sorted((cosine, first, second) for cosine, first, second in found if cosine is not None)


def wrapped(text: str, width: int) -> str:
    """An explanation with no line wider than that; what a line goes on with is indented."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        after = indent if indent else "    "
        lines += textwrap.wrap(line.strip(), width, initial_indent=indent, subsequent_indent=after) or [""]
    return "\n".join(lines)


def _inputs(fused: Fused) -> str:
    header = ["adapter", "base model", "rank", "norm", "weight", "cosine to the result"]
    rows = [
        [
            e.name,
            e.base_model or UNKNOWN,
            span_in_words(e.rank),
            f"{e.norm:.4g}",
            _written(e.weight),
            number(e.cosine, 3),
        ]
        for e in fused.experts
    ]
    where = " Measured from the anchor." if fused.merges["anchor"] else ""
    return _table(header, rows) + f"\n\nNorm: Frobenius norm of the delta.{where}"


def _written(weight: Setting) -> str:
    if isinstance(weight, Mapping):
        return ", ".join(f"{pattern}: {_written(value)}" for pattern, value in weight.items())
    return ", ".join(f"{one:.4g}" for one in weight) if isinstance(weight, Sequence) else weight_in_words(weight)


def _similarities(fused: Fused) -> list[str]:
    found, names = pairs(fused), [expert.name for expert in fused.experts]
    if len(names) == 1:
        return []
    if fused.similarities is None:
        return [f"{len(names)} inputs are too many to compare all pairs here: `raymerge inspect --similarity` does it."]
    if len(names) <= _MOST_COLUMNS:
        rows = [[name, *(number(one, 3) for one in row)] for name, row in zip(names, fused.similarities, strict=True)]
        return ["Cosines of the inputs' deltas:", _table(["", *names], rows)]
    if not found:
        return []
    mean = sum(cosine for cosine, _, _ in found) / len(found)
    least, most = found[0], found[-1]
    return [
        f"Cosines of the inputs' deltas: {mean:.3f} in the mean of {len(found)} pairs, from {least[0]:.3f} "
        f"({_cell(least[1])}, {_cell(least[2])}) to {most[0]:.3f} ({_cell(most[1])}, {_cell(most[2])})."
    ]


def _result(fused: Fused) -> str:
    figures, merges = fused.figures, fused.merges
    rows = [
        ["norm", f"{figures.norm:.4g}"],
        ["norm ratio", f"{number(figures.ratio, 3)} of the weighted sum of the inputs' norms"],
        ["rank", f"{span_in_words(figures.rank)} (asked for: {_written_rank(merges['rank'])})"],
        ["relative error", f"{error_in_words(figures.error, 4)}, rank and rounding together"],
        ["modules", str(len(fused.ranks))],
        ["size", f"{size(figures.size)}, {merges['dtype']}, {merges['format'].upper()} files"],
    ]
    return _table(["", ""], rows)


def _written_rank(rank: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in rank.items()) if isinstance(rank, Mapping) else str(rank)


def _errors(fused: Fused) -> list[str]:
    if fused.figures.error == 0:
        return []
    worst = sorted(fused.errors.items(), key=lambda entry: (-entry[1], entry[0]))[:_WORST]
    rows = [[path, str(fused.ranks.get(path, UNKNOWN)), error_in_words(error, 4)] for path, error in worst]
    return ["The modules that lost most:", _table(["module", "rank", "relative error"], rows)]


def _loading(fused: Fused, location: str) -> str:
    base = next((expert.base_model for expert in fused.experts if expert.base_model), None) or "BASE_MODEL"
    if fused.merges["format"] == "mlx":
        return _code("sh", f"mlx_lm.generate --model {base} --adapter-path {location} --prompt '...'")
    return _code(
        "python",
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({base!r})\n"
        f"model = PeftModel.from_pretrained(model, {location!r})",
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
