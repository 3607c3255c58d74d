"""What the tests of several rooms share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny prepared data folder; never write into it."""
    from tests.helpers.prepared import prepare_tiny

    return prepare_tiny(tmp_path_factory.mktemp("prepared"))
