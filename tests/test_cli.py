"""The `paml` command: its help, its errors and how it reads settings."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from paml.cli import main
from paml.cli.commands import COMMANDS
from paml.cli.generate import all_help
from paml.recipes import find_recipe, recipe_names

HEAVY = ("torch", "pyarrow", "numpy", "ray", "mlflow", "jsonargparse", "yaml")
HELP = Path(__file__).parents[1] / "paml" / "cli" / "help"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m paml` in a process of its own, which prints the modules it has imported after its output."""
    code = (
        "import sys; from paml.cli import main; status = main(); print(*sys.modules, file=sys.stderr); sys.exit(status)"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_help_texts_match_the_settings():
    expected = all_help()
    assert {path.name for path in HELP.glob("*.txt")} == expected.keys()
    stale = [name for name, text in expected.items() if (HELP / name).read_text() != text]
    assert not stale, "run `make help-text`"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["labels", "-h"], ["labels", "filter", "--help"]]
)
def test_help_imports_no_library(arguments: list[str]):
    done = run(*arguments)
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: paml {arguments[0] if len(arguments) > 1 else 'COMMAND'}")
    assert not set(HEAVY) & set(done.stderr.split())


def test_help_is_fast():
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        run("train", "--help")
        seconds.append(time.monotonic() - start)
    reference = time.monotonic()
    subprocess.run([sys.executable, "-c", "import json, difflib, subprocess"], check=True)
    reference = time.monotonic() - reference
    assert min(seconds) < max(1.5, 20 * reference)


def test_every_command_has_a_summary_and_an_example():
    for name, command in COMMANDS.items():
        assert command.summary
        assert not command.summary.endswith(".")
        assert any(re.match(rf"paml (submit )?{name}\b", example) for example in command.examples), name


def test_version_names_the_commit():
    head = ["git", "-C", str(HELP), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    done = run("--version")
    assert done.stdout.startswith("paml 0.2.0")
    assert commit in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--loss.alhpa", "3"], ["--loss.alhpa"]),
        (["train", "--loss.nme", "ll-r"], ["--loss.nme", "loss.name"]),
        (["train", "--loss.nam=ll-r"], ["--loss.nam;", "--loss.name"]),
        (["labels", "filter", "a.arrow", "b.arrow", "--class", "c"], ["--class"]),
        (["train", "--epochs", "abc"], ["epochs", "abc", "int"]),
        (["train", "--patience", "x"], ["patience", "x", "int | null"]),
        (["train", "--loss.name", "foo"], ["loss.name", "foo", "ll-r"]),
        (["train", "--config", "openimages_v33"], ["openimages_v33", "openimages_v3"]),
        (["train", "stray"], ["stray"]),
        (["verify"], ["folder"]),
        (["trian"], ["trian", "train"]),
        (["labels", "mrge"], ["mrge", "merge"]),
        (["--verbose"], ["--verbose"]),
    ],
)
def test_bad_arguments_give_one_line_and_status_2(
    arguments: list[str], named: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("paml")
    assert ": error: " in line
    for part in named:
        assert part in line


def test_an_error_of_the_command_gives_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", str(tmp_path / "nothing")]) == 1
    assert "paml verify: error: " in capsys.readouterr().err


@pytest.mark.parametrize("position", [0, 1, 2])
def test_print_config_prints_all_settings_in_any_order(position: int, capsys: pytest.CaptureFixture[str]):
    arguments = ["--config=demo", "--epochs=7"]
    arguments.insert(position, "--print_config")
    with pytest.raises(SystemExit) as exit_info:
        main(["train", *arguments])
    assert exit_info.value.code in (0, None)
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["epochs"] == 7
    assert settings["batch_size"] == yaml.safe_load(Path(find_recipe("demo")).read_text())["batch_size"]
    assert settings["checkpoint"]


def test_recipes_are_listed_and_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == recipe_names()
    assert "openimages_v3" in listed
    assert main(["recipes", "demo"]) == 0
    assert "batch_size" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", ["recipes", "recipes demo", "train --help"])
def test_reader_that_closes_the_pipe(arguments: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "paml", *arguments.split()], stdout=writing, stderr=subprocess.PIPE, timeout=120
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_file_wins_over_a_recipe_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo") == find_recipe("demo.yaml")
    Path("demo").write_text("epochs: 1\n")
    assert find_recipe("demo") == "demo"
