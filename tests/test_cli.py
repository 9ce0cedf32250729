"""The command line: its help, its exit statuses, and that nobody meets a traceback unasked."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from raymerge.cli import app, main
from raymerge.errors import ProjectError

COMMANDS = sorted(command.callback.__name__ for command in app.registered_commands)


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0)


def raises(monkeypatch, error: BaseException) -> None:
    def pipeline(*arguments, **options):
        raise error

    monkeypatch.setattr("raymerge.pipelines.compare.compare", pipeline)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda c: "".join(c) or "raymerge")
def test_help_fits_eighty_columns_and_says_all(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert status(*command, "--help") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "..." not in re.sub(r"[\]}]\.\.\.", "", out)  # nothing is cut short
    if not command:
        assert set(COMMANDS) <= set(re.findall(r"^  (\w+) ", out, re.MULTILINE))


def test_importing_the_command_line_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'ray', 'matplotlib', 'pandas', 'scipy', 'sklearn', 'sentence_transformers'}"
    code = f"import sys, raymerge.cli; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("items_failed", [0, 1])
def test_the_status_is_the_pipeline_s(items_failed, monkeypatch):
    monkeypatch.setattr("raymerge.pipelines.compare.compare", lambda *arguments, **options: items_failed)
    assert status("compare", "p.yaml") == items_failed


@pytest.mark.parametrize(
    ("error", "first_line"),
    [
        (ProjectError("p.yaml: says nothing.\nExpected more."), "raymerge: p.yaml: says nothing."),
        (TypeError("odd\nand long"), "raymerge: TypeError: odd"),
        (IsADirectoryError(21, "Is a directory", "personas.jsonl"),
         "raymerge: IsADirectoryError: [Errno 21] Is a directory: 'personas.jsonl'"),
        (AssertionError(), "raymerge: AssertionError"),
    ],
)  # fmt: skip
def test_an_error_is_one_message_and_status_2(error, first_line, monkeypatch, capsys):
    raises(monkeypatch, error)
    assert status("compare", "p.yaml") == 2
    printed = capsys.readouterr().err
    assert printed.splitlines()[0] == first_line
    assert "Traceback" not in printed
    assert ("--debug shows" in printed) == (not isinstance(error, ProjectError))
    with pytest.raises(type(error)):
        main(["compare", "p.yaml", "--debug"])


def test_ctrl_c_is_no_failed_item(monkeypatch, capsys):
    raises(monkeypatch, KeyboardInterrupt())
    assert status("compare", "p.yaml") == 130
    assert "goes on where it stopped" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "pipeline"), [("prompt", "prompt.prompt"), ("inspect", "inspect.inspect")])
def test_what_keeps_nothing_does_not_promise_to_go_on(command, pipeline, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"raymerge.pipelines.{pipeline}", interrupted)
    assert status(command, "a", *(["--base", "b"] if command == "prompt" else [])) == 130
    assert capsys.readouterr().err.splitlines() == ["raymerge: interrupted."]


def test_threads_that_wait_do_not_spin_in_any_command(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert status("methods") == 0
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert status("methods") == 0
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize("arguments", [["marge"], ["merge"], ["merge", "p.yaml", "--k", "0"], ["merge", "--rnak", "2"]])
def test_a_mistyped_command_is_bad_input(arguments, capsys):
    assert status(*arguments) == 2
    assert "Error" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1: x", "a: [", "recipes: {1: 2}", "output: [a]", "? [a]\n: b", "", "\0"])
def test_a_broken_project_file_is_named(text, tmp_path, capsys):
    (tmp_path / "p.yaml").write_text(text)
    assert status("merge", str(tmp_path / "p.yaml"), "--plan") == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"raymerge: {tmp_path}/p.yaml: ")
    assert "not foreseen" not in printed


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, capsys):
    (tmp_path / "personas.jsonl").mkdir()
    (tmp_path / "p.yaml").write_text("personas: personas.jsonl\nrecipes: {own: {strategy: own}}")
    for project in ("p.yaml", "personas.jsonl"):
        assert status("merge", str(tmp_path / project), "--plan") == 2
        printed = capsys.readouterr().err
        assert "personas.jsonl" in printed.splitlines()[0]
        assert "Traceback" not in printed


def test_uris_reach_the_pipelines_as_they_are(tmp_path, capsys):
    folder = f"file://{tmp_path}"
    assert status("init", folder) == 2
    assert capsys.readouterr().err.startswith(f"raymerge: {folder}: holds no adapters")
    Path(tmp_path / "world.json").mkdir()
    assert status("demo", "--out", folder, "--quick", "--local") == 2
    assert f"{folder}/" in capsys.readouterr().err
