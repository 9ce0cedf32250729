"""The report: complete, self-contained, escaped, the same bytes for the same comparison, and bounded."""

import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from raymerge.evaluation.comparison import Comparison, compare
from raymerge.evaluation.curves import curve_of, thin_losses
from raymerge.evaluation.plots import box_rows
from raymerge.evaluation.report import encode_comparison, render_report, terminal_table
from raymerge.evaluation.scores import Costs
from raymerge.evaluation.wording import describe, duration, number, p_value, scale, signed, size

from .conftest import SOFT, at_seed, make_world, recipe, run

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>\u202e$\\frac{1}$\n{{ 7 * 7 }}人\x00'
CURVES = (
    curve_of("unified", [thin_losses(np.linspace(2, 1, 90))]),
    curve_of("persona", [thin_losses(np.linspace(2, 0.1 * i, 12), [(6, 1.4), (12, 1.6)]) for i in range(5)]),
)
VOID = {"meta", "img", "br", "link", "input", "hr", "base"}


class Page(HTMLParser):
    """Reads a page as a browser would: every element and attribute, and whether elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    runs, clusters = make_world()
    return compare(runs, clusters=clusters, similarity_model="an encoder", resamples=500, curves=CURVES)


@pytest.fixture(scope="module")
def files(comparison: Comparison) -> dict[str, bytes]:
    return render_report(comparison, title="a test")


def printed(comparison: Comparison, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(terminal_table(comparison))
    return console.file.getvalue()


def test_all_parts_are_there(files: dict[str, bytes], comparison: Comparison) -> None:
    figures = {"similarity.png", "scatter.png", "clusters.png", "routing.png", "costs.png", "best.png", "training.png"}
    assert set(files) == figures | {"report.html", "comparison.json"}
    for name in figures:
        image = np.asarray(Image.open(io.BytesIO(files[name])).convert("L"))
        assert image.std() > 3  # something is drawn
    page = Page(files["report.html"].decode())
    assert page.open == []
    said = " ".join("".join(page.words).split())
    assert comparison.verdict.headline in said
    order = ["What was asked of merging", "personas improved", comparison.verdict.headline, "Smallest difference this"]
    order += ["The comparison", "What to run next", "Similarity of every row"]
    assert [said.index(part) for part in order] == sorted(said.index(part) for part in order)
    for part in ("Persona by persona", "By cluster", "Who contributes to whom", "Answers side by side",
                 "The best row of each persona", "This map flatters", "How training went", "loss on validation",
                 "What each row cost", "How this was made", "soft says", "a note", "an encoder"):  # fmt: skip
        assert part in said
    assert json.loads(files["comparison.json"]) == comparison.to_json()


def test_the_page_loads_and_runs_nothing(files: dict[str, bytes]) -> None:
    text = files["report.html"].decode()
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form", "video", "audio", "img"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_references_inside_the_figures_lead_somewhere(files: dict[str, bytes]) -> None:
    text = files["report.html"].decode()
    wanted = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    defined = re.findall(r'id="([^"]+)"', text)
    assert wanted
    assert wanted <= set(defined)


def test_hostile_texts_stay_texts() -> None:
    runs, clusters = make_world(HOSTILE)
    comparison = compare(runs, clusters=clusters, resamples=200)
    page = Page(render_report(comparison, title=HOSTILE)["report.html"].decode())
    assert page.open == []
    tags = [tag for tag, _ in page.elements]
    assert "script" not in tags
    assert "img" not in tags
    said = "".join(page.words)
    assert "<script>alert(1)</script>" in said
    assert "{{ 7 * 7 }}" in said
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_a_lone_surrogate_does_not_stop_the_report() -> None:
    made = run("unified", recipe("unified", "unified"), np.full((3, 1), 0.5), texts=["a", "b", "c"])
    said = run("soft", recipe("soft", "soft", **SOFT), np.full((3, 1), 0.7), texts=["a", "b", "c"])
    comparison = compare([made, said], resamples=50)
    sample = comparison.samples[0]
    answer = dataclasses.replace(sample.questions[0].answers[0], text="broken \ud800 text")
    question = dataclasses.replace(sample.questions[0], answers=(answer,))
    broken = dataclasses.replace(comparison, samples=(dataclasses.replace(sample, questions=(question,)),))
    assert b"broken ? text" in render_report(broken)["report.html"]


def test_the_same_comparison_gives_the_same_bytes(files: dict[str, bytes]) -> None:
    runs, clusters = make_world()
    again = compare(
        list(reversed(runs)), clusters=clusters, similarity_model="an encoder", resamples=500, curves=CURVES
    )
    assert render_report(again, title="a test") == files
    for name, data in files.items():
        if name.endswith(".png"):
            assert not Image.open(io.BytesIO(data)).text


def test_the_smallest_runs_make_a_report() -> None:
    """One persona, one run, nothing optional; and no reference."""
    alone = run("unified", recipe("unified", "unified"), np.array([[0.5]]))
    files = render_report(compare([alone]))
    assert set(files) == {"similarity.png", "report.html", "comparison.json"}
    assert "needs the row" not in files["report.html"].decode()
    assert "no recipe with plain prompts was compared" in files["report.html"].decode()
    pair = [run(name, recipe(name, name), np.array([[0.2], [0.3]])) for name in ("soft", "own")]
    page = render_report(compare(pair))["report.html"].decode()
    assert "No run named unified is here" in page
    assert "no reference row to differ from" in page
    assert "needs the row unified, which is not here" in page
    assert "cannot be judged" in printed(compare(pair))


def test_many_personas_rows_and_clusters_stay_a_page() -> None:
    generator = np.random.default_rng(0)
    names = [f"persona_{i:05d}" for i in range(600)]
    long = ["word " * 400] * 600
    runs = [
        run(name, recipe(name, "soft" if i else "unified", k=i), generator.random((600, 1)), personas=names,
            texts=long, notes=("a note",) * 20)
        for i, name in enumerate(["unified", *(f"row_{i}" for i in range(30))])
    ]  # fmt: skip
    comparison = compare(runs, clusters={name: f"c{i % 60:02d}" for i, name in enumerate(names)}, resamples=50)
    page = render_report(comparison)["report.html"]
    assert len(page) < 3_000_000
    said = page.decode()
    assert "Each panel draws 400 of 600 personas" in said
    assert "30 more clusters are in comparison.json" in said
    assert "7 more rows are in their runs" in said
    assert "562 more notes are in comparison.json" in said


def test_ten_thousand_personas_stay_a_page() -> None:
    generator = np.random.default_rng(0)
    names = [f"persona_{i:05d}" for i in range(10_000)]
    runs = [
        run(name, recipe(name, name, **(SOFT if name == "soft" else {})), generator.random((10_000, 2)), personas=names)
        for name in ("unified", "soft", "own")
    ]
    files = render_report(
        compare(runs, clusters={name: f"c{i % 30:02d}" for i, name in enumerate(names)}, resamples=20)
    )
    page = files["report.html"].decode()
    assert len(page) < 1_500_000
    assert "A square is a persona (7 of them here)" in page  # 4,000 in the twelve largest clusters, 600 squares
    assert len(json.loads(files["comparison.json"])["best"]["by_persona"]) == 10_000


def test_the_terminal_table_fits_eighty_columns_and_begins_with_what_was_asked(comparison: Comparison) -> None:
    text = printed(comparison)
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert lines[0] == "Asked of merging, reached by soft:"
    for line, criterion in zip(lines[1:4], comparison.criteria, strict=True):
        assert (
            line.split() == f"{criterion.outcome} {criterion.what}: {criterion.said}, asked {criterion.asked}".split()
        )
    for row in comparison.rows:
        line = next(line for line in lines if line[1:].startswith(f" {row.name} "))
        assert "…" not in line
        assert f"{row.similarity:.1f}" in line
        assert " 24 1.0 MiB" in line
    assert comparison.verdict.headline in text
    order = [
        text.index(p) for p in ("Smallest difference this", "\nrow ", "What to run next.", comparison.verdict.headline)
    ]
    assert order == sorted(order)
    for sentence in comparison.guide.sentences:
        assert "".join(sentence.split()) in "".join(text.split())


def test_columns_that_do_not_fit_are_left_out_the_least_important_first() -> None:
    runs, clusters = make_world()
    long = [dataclasses.replace(r, name="a_row_of_a_long_name" if r.name == "soft" else r.name) for r in runs]
    seeded = [dataclasses.replace(r, by_seed={1: at_seed(60), 2: at_seed(61)}) for r in long]
    few, many = printed(compare(seeded, clusters=clusters, resamples=50)), printed(compare(runs, resamples=50))
    headers = {
        text: next(line for line in text.splitlines() if line.startswith("row ")).split() for text in (few, many)
    }
    assert headers[many][-2:] == ["models", "memory"]
    assert "seeds" in headers[few]
    assert "models" in headers[few]
    assert "memory" not in headers[few]
    assert max(len(line) for line in few.splitlines()) <= 80


def test_a_wider_terminal_shows_more_and_the_legend_explains_what_is_shown(comparison: Comparison) -> None:
    console = Console(width=150, file=io.StringIO(), color_system=None)
    console.print(terminal_table(comparison, console.width))
    wide, narrow = console.file.getvalue(), printed(comparison)
    heads = [next(line for line in text.splitlines() if line.startswith("row ")) for text in (wide, narrow)]
    assert heads[0].split()[-6:] == ["models", "memory", "tenth", "chrF", "nll", "exact"]
    assert "tenth" not in heads[1]
    assert "tenth: " in wide
    assert "tenth: " not in narrow
    soft = next(line for line in wide.splitlines() if " soft " in line)
    assert f"{comparison.rows[comparison.row('soft')].worst_decile:.1f}" in soft


def test_boxes_and_marks_show_the_verdict_and_each_kind() -> None:
    runs, clusters = make_world()
    soft = next(r for r in runs if r.name == "soft")
    above = [dataclasses.replace(runs[-1], name=f"trained_{i}", recipe=recipe("x", "hybrid")) for i in range(6)]
    comparison = compare([*runs, *above], clusters=clusters, resamples=50)
    drawn = [row.name for row in box_rows(comparison)]
    assert comparison.verdict.row == soft.name
    assert len(drawn) == 6
    assert soft.name in drawn
    assert comparison.rows[comparison.row(drawn[-1])].kind == "control"


def test_json_begins_with_what_was_asked(comparison: Comparison) -> None:
    read = json.loads(encode_comparison(comparison))
    assert next(iter(read)) == "criteria"
    assert [c["name"] for c in read["criteria"]] == ["similarity", "improved", "regressions"]
    assert [s["sentence"] for s in read["guide"]["steps"]] == list(comparison.guide.sentences)
    tenth = sorted(read["similarity_by_persona"]["soft"].values())[:3]
    assert next(r for r in read["rows"] if r["name"] == "soft")["worst_decile"] == pytest.approx(np.mean(tenth))
    assert [c["grouping"] for c in read["curves"]] == ["unified", "persona"]
    assert read["curves"][1]["validation"][0] is None


def test_the_page_shows_seeds_scales_steps_and_models_where_they_are_known(files: dict[str, bytes]) -> None:
    tuned = {"chosen": {"factor": 1.4}, "tried": []}
    costs = Costs(30.0, 2.0, 1.5, 3 << 20, 1234, 56_789, "4 of 2, 4, 8")
    told = run(
        "soft",
        recipe("soft", "soft", **SOFT),
        np.full((3, 1), 0.7),
        tuned=tuned,
        costs=costs,
        by_seed={1: at_seed(60, 3, 1)},
    )
    page = render_report(compare([told], resamples=50))["report.html"].decode()
    said = " ".join("".join(Page(page).words).split())
    for part in ("over seeds", "2 seeds", "1.4× norm", "tuned", "56,789", "4 of 2, 4, 8", "1,234", "3.0 MiB"):
        assert part in said
    assert "over seeds" not in files["report.html"].decode()


def test_hostile_names_do_not_break_the_terminal() -> None:
    runs, clusters = make_world("[bold red]\x1b[31m")
    text = printed(compare(runs, clusters=clusters, resamples=50))
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_wording() -> None:
    assert [signed(x) for x in (1.25, -0.04, 0.0, -3.0, None, float("nan"))] == ["+1.2", "0.0", "0.0", "−3.0", "–", "–"]
    assert [number(x, 0) for x in (-3.2, -0.2, 4.6, None)] == ["−3", "0", "5", "–"]
    assert [duration(s) for s in (0.5, 9.96, 42, 90, 3600, None)] == ["0.5 s", "10.0 s", "42 s", "1.5 min", "1 h", "–"]
    assert [size(b) for b in (0, 900, 2048, 1 << 30)] == ["0 bytes", "900 bytes", "2.0 KiB", "1.0 GiB"]
    assert [p_value(p) for p in (0.0001, 0.0312, 1.0, None)] == ["<.001", ".031", "1.000", "–"]
    assert describe(recipe("x", "random_k", of={"strategy": "soft", "k": 5})) == "random_k for soft, k 5"
    assert describe(recipe("x", "own")) == "the persona's own adapter"
    assert describe({}) == "an adapter made elsewhere"
    beside = {"retrieval": {"examples": 3, "format": "x"}}
    assert describe({**recipe("x", "base"), **beside}) == "no adapter + 3 similar training examples in the prompt"
    assert describe(recipe("x", "prefix", tokens=16)) == "prefix tuning, 16 virtual tokens"
    trained = recipe("x", "neighbours_trained", of={"strategy": "top_k", "k": 5})
    assert describe(trained) == "one adapter trained on the rows of top_k's experts, k 5"
    among = recipe("x", "selective", among={"base": "base", "own": "own"})
    assert describe(among) == "the best of base, own for each persona"


def test_scales_in_words() -> None:
    soft = {"strategy": "soft", "scale": "match_norm"}
    assert scale(soft, None) == "norm"
    assert scale({**soft, "scale": {"match_norm": 1.4}}, None) == "1.4× norm"
    assert scale({**soft, "scale": 2.0}, None) == "2"
    assert scale({**soft, "scale": "tuned"}, {"chosen": {"factor": 0.7}}) == "0.7× norm"
    hybrid = {"strategy": "hybrid", "scale": "tuned", "strategy_parameters": {"own_weight": "tuned"}}
    assert scale(hybrid, {"chosen": {"factor": 2.0, "own_weight": 0.4}}) == "2× norm, own 40 %"
    assert scale({"strategy": "base", "scale": 1.0}, None) == "–"
    offsets = {"clusters": {"a": 0.4, "b": -0.2, "c": 0.1}, "layers": [0.1, -0.3]}
    assert scale({**soft, "scale_offsets": offsets}, None) == "norm, × 0.82 to 1.49 by cluster, × 0.74 to 1.11 by depth"
    one = {**soft, "scale": 2.0, "scale_offsets": {"layers": [0.2, 0.2]}}
    assert scale(one, None) == "2, × 1.22 by depth"
    assert scale({**soft, "scale_offsets": None}, None) == "norm"
