"""Every recipe can be read by its command, and starts with it."""

import re
from pathlib import Path

import pytest
import yaml

from paml import demo
from paml.cli.commands import COMMANDS
from paml.compare.grid import plan_grid
from paml.compare.settings import CompareSettings, TuneSettings
from paml.compare.sweep import plan_sweep
from paml.preparation.settings import PrepareSettings
from paml.recipes import FOLDER, find_recipe, recipe_names, summary
from paml.settings import read_settings
from paml.training.settings import TrainSettings
from tests.helpers.jobs import ROOT


def kind_of(name: str) -> type:
    """Settings class of the command that a recipe is for."""
    if name.startswith("compare_"):
        return CompareSettings
    if name.startswith("tune_"):
        return TuneSettings
    return PrepareSettings if name.startswith("prepare_") or name.endswith("_data") else TrainSettings


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_read(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    settings = read_settings(kind_of(name), ["--config", name])
    if isinstance(settings, TuneSettings):
        assert plan_sweep(settings, str(ROOT)).settings.schedule
    with pytest.raises(SystemExit) as stop:
        read_settings(kind_of(name), ["--config", name, "--print_config"])
    assert stop.value.code == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_starts_with_a_description_and_names_its_command(name: str):
    comments = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert len(summary(name)) > 20
    commands = re.findall(r"paml (?:submit )?(\w+)", "\n".join(comments))
    assert any(command in COMMANDS for command in commands)
    for named in re.findall(r"--config ([a-z]\w+)(?= |$)", "\n".join(comments)):
        assert named in recipe_names()


def test_the_comparison_has_the_number_of_trainings_its_recipe_states(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    grid = plan_grid(read_settings(CompareSettings, ["--config", "compare_coco18", "--seeds", "[0]"]), str(ROOT))
    assert f"{len(grid.trainings)} trainings per seed" in Path(find_recipe("compare_coco18")).read_text()
    assert [len(rows) for rows in grid.tables.values()] == [44, 44]


def test_the_recipe_tune_demo_uses_the_files_of_the_demo():
    common = yaml.safe_load(Path(find_recipe("tune_demo")).read_text())["common"]
    assert common["data.root"] == str(demo.scenes_folder(Path("data/demo"), 0))
    assert common["model.weights"] == str(demo.backbone_file(Path("data/demo")))
