"""The report: one self-contained page, the figures as PNG, and the comparison as JSON, all as bytes.

The page loads nothing: styles are inline, figures are inline SVG, there is no script, and its content security policy
forbids all of them. Every text that comes from data is escaped. The same comparison gives the same bytes.
"""

import json
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup, escape

from raymerge.evaluation import (
    drawing,
    panels,
    plots,
    router_panel,
    router_plots,
    search_panel,
    search_plots,
    wording,
)
from raymerge.evaluation.best import SERVED, Best
from raymerge.evaluation.comparison import Comparison
from raymerge.evaluation.exhibits import RoutingMap
from raymerge.evaluation.router_weights import Learned
from raymerge.evaluation.rows import REGRESSION, Row, row_of
from raymerge.evaluation.search_panel import Searched
from raymerge.evaluation.terminal import terminal_table

__all__ = ["render_report", "terminal_table"]

TEXT_SHOWN = 500  # characters of a prompt or an answer
ANSWERS_SHOWN = 24  # rows in the side-by-side view
MAPS_SHOWN = 4
NOTES_SHOWN = 60
CLUSTERS_LISTED = 30
PERSONAS_LISTED = 10


def render_report(
    comparison: Comparison,
    *,
    title: str = "comparison",
    searched: Searched | None = None,
    learned: Learned | None = None,
) -> dict[str, bytes]:
    """All files of the report by name: report.html, comparison.json and the figures as PNG. searched, learned: the
    project's search and its learned router, where there are any.

    Figures without data are left out: no clusters, no routing, no known times, no reference. The page stays below
    3 MB whatever the number of personas: points are thinned, maps are binned, texts are cut, and the page says so.
    """
    with drawing.styled():
        files = _pngs(comparison)
        more = search_plots.search_figures(searched) if searched else {}
        more |= router_plots.router_figures(learned, comparison) if learned else {}
        files |= {f"{name}.png": drawing.png(figure) for name, figure in more.items()}
        page = _page(comparison, title, searched, learned)
    files["report.html"] = page.encode("utf-8", "replace")
    files["comparison.json"] = encode_comparison(comparison)
    return files


def encode_comparison(comparison: Comparison) -> bytes:
    """The comparison as JSON, the criteria first."""
    return (json.dumps(comparison.to_json(), indent=1, ensure_ascii=True) + "\n").encode()


def _pngs(comparison: Comparison) -> dict[str, bytes]:
    figures = {"similarity.png": plots.similarity_figure(comparison)}
    if comparison.reference and len(comparison.rows) > 1:
        figures["scatter.png"] = plots.scatter_figure(comparison, plots.scatter_panels(comparison))
        if comparison.clusters:
            figures["clusters.png"] = plots.box_figure(comparison, plots.box_rows(comparison))
    if comparison.best:
        figures["best.png"] = panels.best_figure(comparison, comparison.best)
    if comparison.curves:
        top = panels.highest_loss(comparison.curves)
        figures["training.png"] = panels.training_figure(comparison.curves, top)
    if comparison.routing:
        figures["routing.png"] = plots.routing_figure(_shown_maps(comparison))
    costs = plots.cost_figure(comparison)
    if costs:
        figures["costs.png"] = costs
    return {name: drawing.png(figure) for name, figure in figures.items()}


def _shown_maps(comparison: Comparison) -> list[RoutingMap]:
    """The map of the recipe that the verdict speaks of, that of its control, then the others in order."""
    verdict = comparison.verdict
    first = [verdict.row, verdict.control.over if verdict.control else None]
    ordered = sorted(comparison.routing, key=lambda m: first.index(m.run) if m.run in first else len(first))
    return ordered[:MAPS_SHOWN]


def _page(comparison: Comparison, title: str, searched: Searched | None, learned: Learned | None) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raymerge.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("number", "signed", "percent", "p_value", "duration", "size", "describe", "scale"):
        environment.filters[name] = getattr(wording, name)
    environment.filters["brief"] = lambda text: wording.cut(text, TEXT_SHOWN)
    environment.filters["coded"] = _coded
    environment.filters["capital"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["spoken"] = lambda recipe: json.dumps(recipe, sort_keys=True, default=str)
    return environment.get_template("report.html").render(_context(comparison, title, searched, learned))


def _coded(text: str) -> Markup:
    """What stands between backticks as code; everything escaped."""
    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else part for place, part in enumerate(parts)
    )


def _context(comparison: Comparison, title: str, searched: Searched | None, learned: Learned | None) -> dict[str, Any]:
    verdict = comparison.verdict
    chosen = comparison.rows[comparison.row(verdict.row)] if verdict.row else None
    rows = {row.name: row for row in comparison.rows}
    best = comparison.best
    labels = sorted({figure.cluster for row in comparison.rows for figure in row.clusters})
    return {
        "title": title,
        "comparison": comparison,
        "chosen": chosen,
        "rows": rows,
        "signs": drawing.KIND_SIGNS,
        "kinds": list(dict.fromkeys(row.kind for row in comparison.rows)),
        "exact": any(row.exact for row in comparison.rows),
        "own": _own(comparison),
        "seeded": any(row.over_seeds is not None for row in comparison.rows),
        "validated": any(curve.validation is not None for curve in comparison.curves),
        "competing": sum(row.kind in SERVED or row.name == comparison.reference for row in comparison.rows),
        "per_square": panels.personas_per_square(comparison),
        "strengths": panels.strengths(comparison, best) if best else {},
        "errors": any(row.compression_error is not None for row in comparison.rows),
        "forest": _forest(comparison),
        "bars": _bars(comparison),
        "tested": sum(row.kind == "recipe" for row in comparison.rows),
        "regression": REGRESSION,
        "labels": labels[:CLUSTERS_LISTED],
        "labels_left_out": max(0, len(labels) - CLUSTERS_LISTED),
        "figures": {
            **_svgs(comparison),
            "search": _search_svgs(searched) if searched else {},
            "router": _router_svgs(learned, comparison) if learned else {},
        },
        "search": search_panel.context(searched, comparison.reference) if searched else None,
        "router": router_panel.context(learned, comparison) if learned else None,
        "trials_drawn": search_plots.POINTS,
        "notes": comparison.notes[:NOTES_SHOWN],
        "notes_left_out": max(0, len(comparison.notes) - NOTES_SHOWN),
        "answers_shown": ANSWERS_SHOWN,
        "points": plots.POINTS,
        "boxes_shown": plots.CLUSTERS,
        "personas_listed": PERSONAS_LISTED,
    }


def _own(comparison: Comparison) -> Row | None:
    place = row_of(comparison.rows, "own")
    return None if place is None else comparison.rows[place]


def _svgs(comparison: Comparison) -> dict[str, Any]:
    named = "Mean similarity of each row with its interval: " + _spoken(comparison.rows)
    found: dict[str, Any] = {"similarity": _svg(plots.similarity_figure(comparison), named)}
    found["scatter"], found["boxes"] = [], []
    if comparison.reference and len(comparison.rows) > 1:
        for row in plots.scatter_panels(comparison):
            label = f"Each persona's similarity in {row.name} against {comparison.reference}"
            found["scatter"].append(_svg(plots.scatter_figure(comparison, [row], columns=1), label))
        for row in plots.box_rows(comparison) if comparison.clusters else ():
            label = f"{row.name} minus {comparison.reference} by cluster"
            found["boxes"].append(_svg(plots.box_figure(comparison, [row], columns=1), label))
    found["maps"] = [
        (shown, _svg(plots.routing_figure([shown], columns=1), f"Weights of experts for personas in {shown.run}"))
        for shown in _shown_maps(comparison)
    ]
    best, curves = comparison.best, comparison.curves
    found["best"] = _svg(panels.best_figure(comparison, best), _spoken_best(best)) if best else None
    top = panels.highest_loss(curves) if curves else 0.0
    found["training"] = [
        _svg(panels.training_figure([curve], top, columns=1), f"Training loss of {curve.grouping}") for curve in curves
    ]
    costs = plots.cost_figure(comparison)
    found["costs"] = _svg(costs, "Similarity of each row against the seconds it took") if costs else None
    return found


def _search_svgs(searched: Searched) -> dict[str, Any]:
    labels = {
        "search": "Score of each trial and the best so far",
        "search_parallel": "Values of all parameters of each trial, and its score",
        "search_front": "Similarity of trials, and of the winner at several ranks, against the bytes of an adapter",
    }
    figures = search_plots.search_figures(searched)
    found: dict[str, Any] = {name: name in figures and _svg(figures[name], label) for name, label in labels.items()}
    found["slices"] = [
        _svg(search_plots.slice_figure(searched, [name], columns=1), f"Score of trials by {name}")
        for name in searched.parameters[: search_plots.PANELS]
    ]
    return found


def _router_svgs(learned: Learned, comparison: Comparison) -> dict[str, Any]:
    drawn = router_plots.panels(learned, comparison)
    return {
        name: [_svg(router_plots.figure([part]), part.label) for part in drawn.get(name, ())]
        for name in ("personas", "weights", "training")
    }


def _svg(figure: Any, label: str) -> Markup:
    """Safe to print as it is: matplotlib escapes the texts in a figure, `drawing.svg` the label."""
    return Markup(drawing.svg(figure, wording.short(label, 400)))


def _spoken(rows: Sequence[Row]) -> str:
    return ", ".join(f"{row.name} {row.similarity:.1f}" for row in rows)


def _spoken_best(best: Best) -> str:
    return "The best row of each persona: " + ", ".join(f"{count.row} for {count.personas}" for count in best.counts)


def _forest(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Where each row's interval lies in its cell, in percent of the cell's width."""
    known = {row.name: row.difference for row in comparison.rows if row.difference}
    ends = [e for d in known.values() for e in (d.low, d.high, d.mean) if e == e] + [0.0]  # NaN is not itself
    low, span = min(ends), max(max(ends) - min(ends), 1e-9)

    def at(value: float) -> float:
        return 4 + 92 * (value - low) / span

    return {
        name: {
            "zero": f"{at(0):.2f}",
            "mean": f"{at(d.mean):.2f}",
            "low": f"{at(d.low if d.low == d.low else d.mean):.2f}",
            "width": f"{92 * (d.high - d.low) / span if d.low == d.low else 0:.2f}",
        }
        for name, d in known.items()
    }


def _bars(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Lengths of the cost bars in percent of the longest: the three times, and the bytes."""
    costs = [row.costs for row in comparison.rows]
    longest = max([sum(s or 0.0 for s in (c.train_s, c.merge_s, c.evaluate_s)) for c in costs] + [1e-9])
    largest = max([row.costs.bytes or 0 for row in comparison.rows] + [1])
    return {
        row.name: {
            "train": f"{100 * (row.costs.train_s or 0) / longest:.2f}",
            "merge": f"{100 * (row.costs.merge_s or 0) / longest:.2f}",
            "evaluate": f"{100 * (row.costs.evaluate_s or 0) / longest:.2f}",
            "bytes": f"{100 * (row.costs.bytes or 0) / largest:.2f}",
        }
        for row in comparison.rows
    }
