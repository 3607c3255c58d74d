"""Every recipe is read by the job that it names, and opens with its command."""

import sys
from pathlib import Path

import pytest
import yaml

from jobs import demo
from paml.cli import read_settings
from paml.compare.grid import plan_grid
from paml.compare.halving import candidates
from paml.compare.settings import CompareSettings, SearchSettings, SweepSettings
from paml.compare.trials import plan_sweep
from paml.prepare import PrepareSettings
from paml.training.settings import TrainSettings
from tests.helpers.jobs import ROOT

RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))


def kind_of(recipe: Path) -> type:
    """Settings of the job that a recipe is for."""
    if recipe.stem.startswith("compare_"):
        return CompareSettings
    if recipe.stem.startswith("search_"):
        return SearchSettings
    if recipe.stem.startswith("sweep_"):
        return SweepSettings
    return PrepareSettings if recipe.stem.startswith("prepare_") or recipe.stem.endswith("_data") else TrainSettings


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_read(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["job", "--config", str(recipe)])
    settings = read_settings(kind_of(recipe), "")
    if isinstance(settings, SearchSettings):
        assert candidates(settings, str(ROOT))
    if isinstance(settings, SweepSettings):
        assert plan_sweep(settings, str(ROOT)).settings.count > 1
    monkeypatch.setattr(sys, "argv", ["job", "--config", str(recipe), "--print_config"])
    with pytest.raises(SystemExit) as stop:
        read_settings(kind_of(recipe), "")
    assert stop.value.code == 0
    assert capsys.readouterr().out
    head = "".join(line for line in recipe.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "jobs/" in head or "make demo" in head


def test_the_comparison_is_as_large_as_its_recipe_says(monkeypatch: pytest.MonkeyPatch):
    recipe = ROOT / "jobs" / "recipes" / "compare_coco18.yaml"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["job", "--config", str(recipe), "--seeds", "[0]"])
    grid = plan_grid(read_settings(CompareSettings, ""), str(ROOT))
    assert f"{len(grid.trainings)} trainings a seed" in recipe.read_text()
    assert [len(rows) for rows in grid.tables.values()] == [44, 44]


def test_the_demos_sweep_finds_what_the_demo_leaves():
    common = yaml.safe_load((ROOT / "jobs" / "recipes" / "sweep_demo.yaml").read_text())["common"]
    assert common["data.root"] == str(demo.data_folder(0))
    assert common["model.weights"] == str(demo.weights_file())
