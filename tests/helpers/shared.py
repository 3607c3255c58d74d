"""Where the data for tests and benchmarks lies, if it lies here at all."""

import os
from pathlib import Path

import pytest


def shared(*parts: str) -> Path:
    """The path under the shared data folder; the calling test is skipped, with the reason, where it is absent."""
    root = Path(os.environ.get("PAML_SHARED", Path(__file__).resolve().parents[2].parent / "shared")) / "data"
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} of the shared data (set PAML_SHARED to the folder holding data/)")
    return path
