"""Figures and recipes in words, the same in the terminal and on the page."""

import math
from collections.abc import Mapping
from typing import Any

from raymerge.evaluation.scores import examples_in_prompt

ADAPTERS_AS_TRAINED = {
    "base": "no adapter",
    "own": "the persona's own adapter",
    "unified": "one adapter trained on everybody",
    "cluster_trained": "one adapter trained per cluster",
    "hybrid": "the unified adapter and the persona's own",
    "selective": "the best of these adapters for each persona",
}
UNKNOWN = "–"


def number(value: float | None, digits: int = 1) -> str:
    """A figure with a fixed number of digits, a true minus, a dash where it is unknown."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def signed(value: float | None, digits: int = 1) -> str:
    """A difference with its sign, a true minus, and no sign on what rounds to 0."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def percent(share: float | None) -> str:
    """A share from 0 to 1 in percent."""
    return UNKNOWN if share is None or not math.isfinite(share) else f"{round(100 * share)} %"


def p_value(p: float | None) -> str:
    """A p value to three digits, and below .001 just that."""
    if p is None:
        return UNKNOWN
    return "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds is None:
        return UNKNOWN
    unit, length = ("h", 3600) if seconds >= 3600 else ("min", 60) if seconds >= 60 else ("s", 1)
    value = seconds / length
    return f"{value:.0f} {unit}" if value >= 10 or value == round(value) else f"{value:.1f} {unit}"


def size(count: float | None) -> str:
    """Bytes in the largest binary unit that keeps a whole digit."""
    if count is None:
        return UNKNOWN
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if value >= 100 or units[0] == "bytes" else f"{value:.1f} {units[0]}"


def printable(text: str) -> str:
    """The text without control characters, which could move a terminal's cursor or turn text around."""
    return "".join(c if c.isprintable() else " " for c in text)


def short(name: str, length: int = 22) -> str:
    """A name that fits a label or a column: control characters out, and cut in the middle, since names in a row often
    differ at the end."""
    clean = printable(name)
    end = (length - 1) // 3
    return clean if len(clean) <= length else f"{clean[: length - 1 - end]}…{clean[len(clean) - end :]}"


def cut(text: str, length: int) -> str:
    """The text up to a length, with an ellipsis where it goes on."""
    return text if len(text) <= length else text[:length] + "…"


def describe(recipe: Mapping[str, Any]) -> str:
    """A recipe in a few words: what is merged, and what stands in the prompt; not every parameter."""
    examples = examples_in_prompt(recipe)
    beside = f" + {examples} similar training example{'s' if examples > 1 else ''} in the prompt" if examples else ""
    return _answering(recipe) + beside


def _answering(recipe: Mapping[str, Any]) -> str:
    strategy = recipe.get("strategy")
    if strategy is None:
        return "an adapter made elsewhere"
    parameters = recipe.get("strategy_parameters", {})
    if strategy == "selective" and isinstance(parameters.get("among"), Mapping):
        return f"the best of {', '.join(map(str, parameters['among']))} for each persona"
    if strategy in ADAPTERS_AS_TRAINED:
        return ADAPTERS_AS_TRAINED[strategy]
    if strategy == "prefix":
        tokens = parameters.get("tokens")
        return "prefix tuning" + (f", {tokens} virtual tokens" if tokens else "")
    inner = parameters.get("of")
    words = [str(strategy)]
    if isinstance(inner, Mapping):
        words = [f"{strategy} for {inner.get('strategy', '?')}"]
        if strategy == "neighbours_trained":
            words = [f"one adapter trained on the rows of {inner.get('strategy', '?')}'s experts"]
        parameters = inner
    words += [f"{key} {parameters[key]}" for key in ("k", "temperature") if parameters.get(key) is not None]
    if recipe.get("method", "linear") != "linear":
        words.append(str(recipe["method"]))
    return ", ".join(words)


def scale(recipe: Mapping[str, Any], tuned: Mapping[str, Any] | None) -> str:
    """The factor of a row in words: what was written, or what validation examples chose, with the own adapter's share
    where that was chosen too, and between which factors its offsets multiply it."""
    chosen = dict(tuned.get("chosen", {})) if tuned else {}
    written = recipe.get("scale")
    if recipe.get("strategy") in (None, "base", "selective", "prefix"):
        words = []
    elif "factor" in chosen:
        words = [f"{chosen['factor']:g}× norm"]
    elif isinstance(written, Mapping):
        words = [f"{written.get('match_norm', 1):g}× norm"]
    elif written == "match_norm":
        words = ["norm"]
    else:
        words = [f"{written:g}"] if isinstance(written, int | float) else [str(written)] if written else []
    share = chosen.get("own_weight", recipe.get("strategy_parameters", {}).get("own_weight"))
    if isinstance(share, int | float):
        words.append(f"own {percent(share)}")
    for key, part in (recipe.get("scale_offsets") or {}).items():
        offsets = list(part.values()) if isinstance(part, Mapping) else part
        factors = dict.fromkeys(f"{math.exp(d):.2f}" for d in (min(offsets), max(offsets)))
        words.append(f"× {' to '.join(factors)} by {'cluster' if key == 'clusters' else 'depth'}")
    return ", ".join(words) or UNKNOWN
