"""The reports on fused adapters: tables stay tables whatever adapters are called, and everything of note is there."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.pipelines.fusion.figures import Contributor, Figures, Fused, cautions, norm_ratio, remarks
from raymerge.pipelines.fusion.report import error_in_words, joined, pairs, report, sweep_report, weight_in_words
from raymerge.pipelines.fusion.table import one, sweep

MERGES = {
    "method": "ties", "method_parameters": {"density": 0.2, "majority_sign": "total"}, "dialect": "delta", "scale": 1.0,
    "rank": {"energy": 0.95}, "anchor": None, "dtype": "bfloat16", "format": "peft",
}  # fmt: skip


def fused(names: list[str], **changes) -> Fused:
    count = len(names)
    value = Fused(
        name="merged",
        experts=tuple(Contributor(n, f"at/{n}", "sha256:0", 1 / count, "org/base", (4, 8), 2.5, 0.5) for n in names),
        merges=MERGES,
        anchor=None,
        base=None,
        figures=Figures(1.25, 0.5, 0.125, (4, 9), 2048),
        errors={f"layers.{i}": i / 100 for i in range(20)},
        ranks={f"layers.{i}": 4 for i in range(20)},
        similarities=[[1.0 if i == j else (i + j) / 100 for j in range(count)] for i in range(count)],
        warnings=("Beware.",),
        notes=("Know this.",),
        command="raymerge fuse at/a at/b --out out",
    )
    return replace(value, **changes)


def tables(text: str) -> list[list[int]]:
    """How many cells each row of each table has."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append(len(re.findall(r"(?<!\\)\|", line)) - 1)
        elif rows:
            found.append(rows)
            rows = []
    return found


def printed(shown, width: int = 80) -> str:
    from rich.console import Console

    console = Console(width=width, file=None, record=True, quiet=True)
    console.quiet = False
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True))
def test_tables_stay_tables(names):
    for text in (report(fused(names), "out"), sweep_report("sweep", [fused(names)] * 2, {names[0]: "why"})):
        assert all(len(set(rows)) == 1 for rows in tables(text))
        assert all(character.isprintable() for character in text.replace("\n", ""))
    for shown in (one(fused(names)), sweep([fused(names)] * 2)):
        assert all(len(line) <= 80 for line in printed(shown).splitlines())


def test_a_report_holds_what_was_merged_and_how_to_use_it():
    text = report(fused(["a", "b"]), "some/out", "Elsewhere it is otherwise.")
    for part in (
        "ties (density 0.2, majority_sign total) of a and b.",
        "**Warning.** Beware.",
        "| a | org/base | 4–8 | 2.5 | 0.5 | 0.500 |",
        "| b | 0.010 | 1.000 |",
        "| norm ratio | 0.500 of",
        "| rank | 4–9 (asked for: energy 0.95) |",
        "| relative error | 0.1250,",
        "| size | 2.0 KiB, bfloat16, PEFT files |",
        "| layers.19 | 4 | 0.1900 |",
        "Elsewhere it is otherwise.",
        "* Know this.",
        "raymerge fuse at/a at/b --out out",
        "from_pretrained('org/base')",
        "from_pretrained(model, 'some/out')",
    ):
        assert part in text
    assert "layers.11" not in text  # only the worst
    mlx = report(fused(["a"], merges={**MERGES, "format": "mlx", "anchor": "start", "scale": 2.0}), "out")
    assert "mlx_lm.generate --model org/base --adapter-path out" in mlx
    assert "scale 2.0; anchor start" in mlx
    assert "Measured from the anchor." in mlx


def test_many_inputs_are_summed_up():
    names = [f"p{i:02}" for i in range(20)]
    text = report(fused(names), "out")
    assert "in the mean of 190 pairs, from 0.010 (p01, p00) to 0.370 (p19, p18)" in text
    assert "20 adapters (p00, p01, p02, …)" in text
    assert "20 inputs are too many" in report(fused(names, similarities=None), "out")
    assert "and 6 more" in printed(one(fused([f"p{i}" for i in range(30)])))
    assert "least" in printed(sweep([fused(names)]))


def test_nothing_is_cut_in_eighty_columns():
    names = ["a-name-that-goes-on-and-on", "b", "c-name-that-goes-on-and-on"]
    wide = fused(names, name="dare_ties-density-0.25", figures=Figures(1.23e-5, 0.5, 1.24e-5, (128, 256), 350 * 2**20))
    text = printed(sweep([wide] * 2))
    assert max(map(len, text.splitlines())) <= 80
    for part in ("1.23e-05", "128–256", "350 MiB", "1.2e-05", "0.500"):
        assert part in text
    wide = replace(wide, experts=tuple(replace(e, base_model=e.name, norm=1.234e-5, weight=[0.3333, 1, 0.6667])
                                       for e in wide.experts))  # fmt: skip
    text = printed(one(wide))
    assert max(map(len, text.splitlines())) <= 80
    for part in ("1.234e-05", "128–256", "350 MiB", "0.500", "0.333…0.667"):
        assert part in text


@pytest.mark.parametrize(
    ("error", "expected"),
    [(0.0, "0"), (0.125, "0.125"), (0.01, "0.010"), (0.0004, "0.0004"), (0.00042, "0.00042"), (3.14e-8, "3.1e-08")],
)
def test_small_errors_are_not_none(error, expected):
    assert error_in_words(error) == expected
    value = fused(["a", "b"], figures=replace(fused(["a"]).figures, error=error), errors={"layers.0": error})
    assert f"Relative error {expected}," in printed(one(value))
    assert f" {expected} " in printed(sweep([value]))
    assert f"| {expected} |" in sweep_report("sweep", [value], {})
    if error == 0.0004:
        assert f"| relative error | {expected}, rank" in report(value, "out")
        assert f"| layers.0 | 4 | {expected} |" in report(value, "out")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["ann", "bob"], ["ann", "bob"]),
        (["persona_00", "persona_01"], ["…ona_00", "…ona_01"]),
        (["persona", "persona_01"], ["persona", "person…"]),
        (["first-of-all", "second-of-all"], ["first-…", "second…"]),
        (["persona-a-merged", "persona-b-merged"], ["#1", "#2"]),
    ],
)
def test_columns_can_be_told_apart(names, expected):
    text = printed(sweep([fused(names)] * 2))
    assert text.splitlines()[1].split()[-len(names) :] == expected
    if expected[0] == "#1":
        assert f"#1 {names[0]}, #2 {names[1]}" in text


def test_what_is_unknown_is_a_dash():
    zero = replace(fused(["a", "b"]).experts[0], cosine=None, base_model=None, norm=0.0)
    without = fused(["a", "b"], experts=(zero, zero), figures=Figures(0.0, None, 0.0, (1, 1), 9), errors={})
    assert "| – |" in report(without, "out")
    assert "BASE_MODEL" in report(without, "out")
    assert "–" in printed(one(without))
    assert "–" in printed(sweep([without]))
    assert pairs(fused(["a", "b"], similarities=[[None, None], [None, None]])) == []


def test_fused_survives_its_manifest():
    import json

    value = fused(["a", "b"])
    again = Fused.from_json({**json.loads(json.dumps(value.to_json())), "key": "sha256:1", "files": {}})
    assert json.dumps(again.to_json()) == json.dumps(value.to_json())
    assert report(again, "out") == report(value, "out")


@pytest.mark.parametrize(
    ("figures", "changes", "degree", "expected"),
    [
        (Figures(1, 1.0, 0.1, (4, 4), 1), {}, 1, []),
        (Figures(1, 1.0, 0.3, (4, 4), 1), {}, 1, ["loses 30 %"]),
        (Figures(1, 0.5, 0.1, (4, 4), 1), {}, 1, ["match_norm"]),
        (Figures(1, 0.5, 0.1, (4, 4), 1), {"scale": "match_norm"}, 1, []),
        (Figures(1, 0.5, 0.1, (4, 4), 1), {"scale": 0.5}, 1, []),
        (Figures(1, 0.5, 0.1, (4, 4), 1), {"dialect": "peft"}, 1, []),
        (Figures(1, 0.5, 0.1, (4, 4), 1), {}, 0, []),
        (Figures(1, None, 0.1, (4, 4), 1), {}, 1, []),
    ],
)
def test_cautions(figures, changes, degree, expected):
    found = cautions(figures, {**MERGES, **changes}, [0.5, 0.5], degree)
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))
    assert cautions(replace(figures, error=0), {**MERGES, **changes}, [1.0, -1.0], degree) == []


def test_remarks():
    from raymerge.merging.methods import METHODS

    def said(weights, method="linear", starts=()):
        return remarks(weights, METHODS[method], ["a", "b"], starts)

    assert said([0.5, 0.5]) == []
    assert said([1 / 3, 2 / 3]) == []
    assert said([0.5, 0.6]) == ["The weights sum to 1.1 and are used as given; --normalize scales them to sum to 1."]
    assert said([0.5, 0.6], "karcher") == []  # only ratios count
    assert said([0.5, [0.1, 0.9]]) == []
    assert said([0.5, 0.5], starts=["s", "s"]) != []
    assert said([0.5, 0.5], starts=["s", None]) == said([0.5, 0.5], starts=[None, None]) == []


def test_words():
    assert weight_in_words(1 / 3) == "0.3333"
    assert weight_in_words([0.2, 0.8]) == "0.2…0.8"
    assert weight_in_words([0.1, 0.2, 0.3, 0.4]) == "0.1…0.4"
    assert weight_in_words({"*": 1.0}) == "by module"
    assert joined(["a"]) == "a"
    assert joined(["a", "b", "c"]) == "a, b and c"
    assert norm_ratio(1.0, [0.5, -0.5], [4.0, 16.0]) == pytest.approx(1 / 3)
    assert norm_ratio(1.0, [0.5, [1.0, 0.0]], [4.0, 16.0]) is None
    assert norm_ratio(0.0, [1.0], [0.0]) is None
