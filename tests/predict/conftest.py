"""A tiny trained run, and its calibration in a copy."""

import json
import shutil
from pathlib import Path

import pytest

from paml.predict.calibrate import CalibrateSettings, calibrate_run
from paml.training.settings import flatten
from tests.helpers.prepared import tiny_settings
from tests.helpers.runs import run


@pytest.fixture(scope="session")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a run; never write into it."""
    settings = tiny_settings(prepared, tmp_path_factory.mktemp("runs"), run={"name": "trained"}, epochs=2)
    assert run(settings) is not None
    folder = Path(settings.run.storage) / settings.run.name
    (folder / "run.json").write_text(json.dumps({"settings": flatten(settings)}))
    return str(folder)


@pytest.fixture(scope="session")
def calibrated(trained: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """(folder of the run with a calibration, what was said while it was made); never write into it."""
    folder = str(tmp_path_factory.mktemp("calibrated") / "run")
    shutil.copytree(trained, folder)
    said: list[str] = []
    calibrate_run(CalibrateSettings(run=folder, check="test"), said.append)
    return folder, said
