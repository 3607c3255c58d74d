"""A bucket behind a fault proxy, with waits short enough for tests."""

import os
from collections.abc import Iterator

import pytest

from paml.storage import s3_requests
from tests.helpers.fault_proxy import FaultyS3, faulty_s3

PATIENCE = {"PAML_S3_READ_SECONDS": "0.5", "PAML_S3_WAIT_SECONDS": "0.01", "PAML_S3_MAX_WAIT_SECONDS": "0.1"}


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyS3]:
    with faulty_s3(fraction=0.0, silence_seconds=5.0, slow_seconds=0.2) as running:
        yield running


@pytest.fixture
def faulty(server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """The server without planned faults, and the environment to use it."""
    for name, value in (server.environment | PATIENCE).items():
        monkeypatch.setenv(name, value)
    before = server.proxy.plan
    server.proxy.plan = type(before)(fraction=0.0, silence_seconds=5.0, slow_seconds=0.2)
    server.proxy.seen.clear()
    monkeypatch.setattr(s3_requests, "_logged", set())
    yield server
    server.proxy.plan = before
    server.proxy.clear_script()


@pytest.fixture
def bucket(faulty: FaultyS3) -> str:
    return faulty.make_bucket("b" + os.urandom(6).hex())
