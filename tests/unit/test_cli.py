"""What a newcomer meets: help, lists, a dry run, and one line for a typo."""

import json
from pathlib import Path

import pytest
from project import RECURRENT, project, write_project
from typer.testing import CliRunner

from unroll import place
from unroll.cli import app, main

run = CliRunner()
COMMANDS = [
    "ls",
    "show",
    "prepare",
    "train",
    "predict",
    "evaluate",
    "report",
    "results",
    "generate",
    "doctor",
    "track",
    "repro",
    "submit",
]


def test_help_names_every_command() -> None:
    shown = run.invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert [command for command in COMMANDS if command not in shown.output] == []


def test_ls_shows_the_state_before_and_after_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_project(tmp_path))
    assert "data not prepared" in " ".join(run.invoke(app, ["ls"]).output.split())
    assert run.invoke(app, ["prepare", "own"]).exit_code == 0
    shown = run.invoke(app, ["ls"])
    assert "small" in shown.output
    assert "not trained" in " ".join(shown.output.split())


def test_show_states_parameters_and_what_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    shown = " ".join(run.invoke(app, ["show", "small"]).output.split())
    assert "would run train (not trained), predict, evaluate for seeds [1]" in shown
    assert f"[{4 * RECURRENT['width']}, {RECURRENT['embedding']}]" in shown
    assert "batch 4 rows x 9 tokens" in shown
    assert "40 steps" in shown


def test_scores_join_the_run_that_trained_the_model_also_when_the_code_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(tmp_path, train={"steps": 2})
    monkeypatch.chdir(tmp_path)
    assert run.invoke(app, ["train", "small", "--plain"]).exit_code == 0
    monkeypatch.setattr(place, "code_hash", lambda recipe: "another")
    for command in (["predict", "small"], ["evaluate", "small", "--no-track"]):
        assert run.invoke(app, command).exit_code == 0
    [journal] = tmp_path.glob("runs/small-*/seed-1/journal.jsonl")
    assert '"test/nats_per_char"' in journal.read_text()


def test_a_tiny_twin_overwrites_nothing_of_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its seconds would otherwise replace hours of training, and a score that git keeps."""
    project(tmp_path, tiny={"train": {"steps": 2}})
    monkeypatch.chdir(tmp_path)
    for command in (["train", "small", "--plain"], ["predict", "small"], ["evaluate", "small", "--no-track"]):
        assert run.invoke(app, command).exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "runs" not in path.parts}
    for command in (["train", "small", "--plain"], ["predict", "small"], ["evaluate", "small", "--no-track"]):
        assert run.invoke(app, [*command, "--tiny"]).exit_code == 0
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads((tmp_path / "histories/small-tiny/seed-1/cost.json").read_text())["steps"] == 2
    assert (tmp_path / "results/tiny/small-tiny.json").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "smal"], "no recipe 'smal'; did you mean 'small'?"),
        (["prepare", "onw"], "no data set 'onw'; did you mean 'own'?"),
        (["predict", "small"], "no such file; train the recipe first"),
        (["ls", "--suite", "cup"], "suite 'cup'"),
    ],
)
def test_a_typo_is_one_line_and_exit_code_two(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["unroll", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    errors = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert errors[-1].startswith("error: ")
    assert expected in errors[-1]


def test_outside_a_project_it_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["unroll", "ls"])
    with pytest.raises(SystemExit):
        main()
    assert "no params.yaml here or above" in capsys.readouterr().err
