"""A tiny trained run, and a calibrated copy."""

import json
import shutil
from pathlib import Path

import pytest

from paml.inference.calibrate import CalibrateSettings, calibrate_run
from paml.settings import flatten
from tests.helpers.prepared import tiny_settings
from tests.helpers.runs import run


@pytest.fixture(scope="session")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run. Do not write to it."""
    settings = tiny_settings(prepared, tmp_path_factory.mktemp("runs"), run={"name": "trained"}, epochs=2)
    assert run(settings) is not None
    folder = Path(settings.run.storage) / settings.run.name
    (folder / "run.json").write_text(json.dumps({"settings": flatten(settings)}))
    return str(folder)


@pytest.fixture(scope="session")
def calibrated(trained: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """(folder of a calibrated run, log lines of its calibration). Do not write to it."""
    folder = str(tmp_path_factory.mktemp("calibrated") / "run")
    shutil.copytree(trained, folder)
    lines: list[str] = []
    calibrate_run(CalibrateSettings(run=folder, check="test"), lines.append)
    return folder, lines
