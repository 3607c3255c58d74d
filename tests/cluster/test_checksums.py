"""The shared environment keeps boto3 and pyarrow from sending checksums, which many S3-compatible stores refuse."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.jobs import ROOT
from tests.helpers.manifests import OVERLAYS, render

WRITERS = {
    "boto3": "import boto3; boto3.client('s3').put_object(Bucket='bucket', Key='boto3', Body=b'x' * 100)",
    "pyarrow": (
        "import os; from pyarrow.fs import S3FileSystem\n"
        "store = S3FileSystem(endpoint_override=os.environ['AWS_ENDPOINT_URL_S3'], scheme='http', region='us-east-1')\n"
        "with store.open_output_stream('bucket/pyarrow') as out: out.write(b'x' * 100)"
    ),
}
CHECKSUMS = ("HTTP_X_AMZ_TRAILER", "HTTP_X_AMZ_SDK_CHECKSUM_ALGORITHM", "HTTP_X_AMZ_CHECKSUM")
VARIABLES = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")


@pytest.fixture(scope="module")
def strict_store() -> Iterator[str]:
    """moto's S3, but a write with a checksum header or trailer is refused with status 411."""
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    store = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("PUT", "POST") and any(name.startswith(CHECKSUMS) for name in environ):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("411 Length Required", [("Content-Length", "0")])
            return [b""]
        return store(environ, start_response)

    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket="bucket")
    yield url
    server.shutdown()
    server.server_close()
    thread.join()


def write(writer: str, url: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    command = [sys.executable, "-c", WRITERS[writer]]
    return subprocess.run(command, capture_output=True, text=True, env=environment | variables, timeout=120)


def shared_environment(where: str) -> dict[str, Any]:
    if where.startswith("compose "):
        services = yaml.safe_load(Path(ROOT / "docker" / "compose.yaml").read_text())["services"]
        return services[where.removeprefix("compose ")]["environment"]
    (site,) = [each for each in render(where) if each["metadata"]["name"] == "paml-site"]
    return site["data"]


@pytest.mark.parametrize(
    "where", [*OVERLAYS, "compose mlflow", "compose ray-head", "compose ray-worker", "compose bucket"]
)
def test_the_shared_environment_sets_both(where: str):
    assert {name: shared_environment(where)[name] for name in VARIABLES} == dict.fromkeys(VARIABLES, "when_required")


@pytest.mark.parametrize("writer", WRITERS)
def test_a_store_without_checksums_accepts_writes(strict_store: str, writer: str):
    done = write(writer, strict_store, {name: shared_environment("gcp")[name] for name in VARIABLES})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("writer", WRITERS)
def test_without_the_environment_it_refuses_them(strict_store: str, writer: str):
    assert write(writer, strict_store, {}).returncode != 0
