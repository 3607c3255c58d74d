"""A Ray head of our own on free ports, beside any other Ray of this machine, stopped alone."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@contextlib.contextmanager
def ray_head(folder: Path, *, cpus: int | None = None, start_seconds: float = 240.0) -> Iterator[dict[str, str]]:
    """Start a head with `folder` as its working directory; yields the environment in which jobs find it.

    Dashboard and job API listen on 127.0.0.1 alone, Ray's other ports on every address of the machine. On leaving, this
    head and its workers are stopped and no other Ray. Raises RuntimeError, with what Ray said, where it does not come
    up in time.
    """
    gcs, dashboard, agent, agent_grpc, metrics, client, environments = free_ports(7)
    temporary = tempfile.mkdtemp(prefix="paml-ray-")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    environment.pop("RAY_ADDRESS", None)
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}",
        f"--runtime-env-agent-port={environments}", f"--temp-dir={temporary}",
    ]  # fmt: skip
    if cpus is not None:
        command.append(f"--num-cpus={cpus}")
    log = Path(temporary, "head.log")
    with log.open("wb") as output:
        head = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + start_seconds
        while not _answers(f"{address}/api/jobs/"):
            if head.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start within {start_seconds:g} s:\n{log.read_text()[-2000:]}")
            time.sleep(0.3)
        yield environment | {"RAY_API_SERVER_ADDRESS": address, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    finally:
        _stop(head)
        shutil.rmtree(temporary, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _stop(head: subprocess.Popen) -> None:
    """`ray start --block` takes its processes along on SIGTERM; what is left of its session is killed."""
    if head.poll() is None:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=15)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(head.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=5)
