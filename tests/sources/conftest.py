"""A web server for the tests of the sources."""

from collections.abc import Iterator

import pytest

from tests.sources.server import Server, running


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with running() as server:
        yield server
