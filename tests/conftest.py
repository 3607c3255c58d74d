"""Fixtures and marks that several packages of tests share."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tiny networks gain nothing from threads, and waiting threads are many times slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MARKED_FOLDERS = ("faults", "chaos", "security")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests in tests/faults, tests/chaos and tests/security with the folder's name."""
    root = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(root).parts[0] if item.path.is_relative_to(root) else ""
        if folder in MARKED_FOLDERS:
            item.add_marker(folder)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would start after PAML_TESTS_END (seconds since the epoch), so that a slow machine's CI still ends."""
    end = os.environ.get("PAML_TESTS_END")
    if end and time.time() > float(end):
        pytest.skip("not run: the time for slow tests is over")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny prepared data folder; tests must not write to it."""
    from tests.helpers.prepared import prepare_tiny

    return prepare_tiny(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty bucket on moto's S3 server, which the AWS variables name."""
    for name, value in {
        "AWS_ENDPOINT_URL_S3": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    import boto3

    bucket = "b" + os.urandom(6).hex()
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=bucket)
    return f"s3://{bucket}"
