"""The folder with data for tests and benchmarks."""

import os
from pathlib import Path

import pytest


def shared(*parts: str, within: str = "data") -> Path:
    """A path in the shared folder; skips the calling test if it does not exist."""
    root = Path(os.environ.get("PAML_SHARED", Path(__file__).resolve().parents[2].parent / "shared")) / within
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} of the shared data (set PAML_SHARED to the folder holding {within}/)")
    return path
