from pathlib import Path

import pytest


@pytest.fixture
def run_folder(tmp_path: Path) -> str:
    return str(tmp_path / "runs" / "one")
