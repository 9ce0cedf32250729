"""Figures and recipes in words, the same in the terminal and on the page."""

import math
from collections.abc import Mapping
from typing import Any

ADAPTERS_AS_TRAINED = {
    "base": "no adapter",
    "own": "the persona's own adapter",
    "unified": "one adapter trained on everybody",
    "cluster_trained": "one adapter trained per cluster",
}
UNKNOWN = "–"


def number(value: float | None, digits: int = 1) -> str:
    """A figure with a fixed number of digits, a dash where it is unknown."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 1) -> str:
    """A difference with its sign, a true minus, and no sign on what rounds to 0."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def percent(share: float | None) -> str:
    """A share from 0 to 1 in percent."""
    return UNKNOWN if share is None or not math.isfinite(share) else f"{100 * share:.0f} %"


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
    """A recipe in a few words: what is merged, not every parameter."""
    strategy = recipe.get("strategy")
    if strategy is None:
        return "an adapter made elsewhere"
    if strategy in ADAPTERS_AS_TRAINED:
        return ADAPTERS_AS_TRAINED[strategy]
    parameters = recipe.get("strategy_parameters", {})
    inner = parameters.get("of")
    words = [str(strategy)]
    if isinstance(inner, Mapping):
        words = [f"{strategy} for {inner.get('strategy', '?')}"]
        parameters = inner
    words += [f"{key} {parameters[key]}" for key in ("k", "temperature") if parameters.get(key) is not None]
    if recipe.get("method", "linear") != "linear":
        words.append(str(recipe["method"]))
    return ", ".join(words)
