"""A private Ray head on free ports, independent of any other Ray on this machine."""

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Below the range that Linux and Ray's workers take ports from (32768 on and 10002 to 19999), so that nothing else takes
# a port between this choice and the moment at which a starting Ray listens on it.
_PORTS = range(20_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that are not in use. Raises RuntimeError if there are fewer."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
            if len(found) == count:
                return found
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                found.append(port)
    raise RuntimeError(f"only {len(found)} of {count} ports from {_PORTS.start} to {_PORTS.stop} are free")


@contextlib.contextmanager
def ray_head(folder: Path, *, cpus: int | None = None, start_seconds: float = 240.0) -> Iterator[dict[str, str]]:
    """Start a head with `folder` as its working directory, and stop it and its workers when the block ends.

    Yields the environment variables for jobs to find it. Ray listens on all addresses of the machine (dashboard and job
    API only on 127.0.0.1), so a token, part of these variables, is required. Raises RuntimeError with Ray's output if
    the head does not start in time.
    """
    head = LocalHead(folder, *([] if cpus is None else [f"--num-cpus={cpus}"]))
    try:
        head.start(start_seconds)
        yield head.environment
    finally:
        head.close()


class LocalHead:
    """A head that keeps its ports, token and temporary folder when it is restarted.

    options: for `ray start`. variables: added to the environment of this process.
    """

    def __init__(self, folder: Path, *options: str, variables: Mapping[str, str] | None = None) -> None:
        gcs, dashboard, client = free_ports(3)
        self._folder = folder
        self._temporary = tempfile.mkdtemp(prefix="paml-ray-")
        self._url = f"http://127.0.0.1:{dashboard}"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._environment = node_environment() | token | dict(variables or {})
        self._command = [
            *ray_start("--head"), f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}", f"--temp-dir={self._temporary}", *options,
        ]  # fmt: skip
        self.address = f"127.0.0.1:{gcs}"
        """Address for nodes and drivers."""
        self.environment = self._environment | {"RAY_API_SERVER_ADDRESS": self._url, "RAY_ADDRESS": self.address}
        """Environment for jobs."""
        self.process: subprocess.Popen | None = None

    def start(self, seconds: float = 300.0) -> None:
        """Start it. Raises RuntimeError with Ray's output if it does not answer in time.

        `ray start` gives up if its raylet needs more than 30 seconds, as on a busy machine, and continues without the
        dashboard if that needs more than 60; it is then repeated.
        """
        log = Path(self._temporary, "head.log")
        deadline = time.monotonic() + seconds
        self._launch(log)
        while "Ray runtime started" not in (output := log.read_text()) or not self._answers():
            if time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start within {seconds:g} s:\n{output[-2000:]}")
            failed = "Failed to start the dashboard" in output
            if self.process is not None and (failed or self.process.poll() is not None):
                stop(self.process)
                self._launch(log)
            time.sleep(0.3)

    def _launch(self, log: Path) -> None:
        current = Path(self._temporary, "ray_current_cluster")
        current.unlink(missing_ok=True)  # otherwise new nodes would join the old head
        options: Any = {"cwd": self._folder, "env": self._environment, "start_new_session": True}
        with log.open("wb") as output:
            self.process = subprocess.Popen(self._command, stdout=output, stderr=output, **options)

    def _answers(self) -> bool:
        token = {"Authorization": f"Bearer {self._environment['RAY_AUTH_TOKEN']}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{self._url}/api/jobs/", headers=token), timeout=2):
                return True
        except OSError:
            return False

    def close(self) -> None:
        """Stop the head and its workers."""
        if self.process is not None:
            stop(self.process)
        shutil.rmtree(self._temporary, ignore_errors=True)


def ray_start(*options: str) -> list[str]:
    """The command that starts a Ray node on this machine; `stop` ends it."""
    agent, agent_grpc, metrics, environments = free_ports(4)
    return [
        sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics}",
        f"--runtime-env-agent-port={environments}",
    ]  # fmt: skip


def node_environment() -> dict[str, str]:
    """The environment of a node: this Python first in PATH, no token, no RAY_ADDRESS."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    environment.pop("RAY_ADDRESS", None)
    return environment


def stop(node: subprocess.Popen) -> None:
    """Stop a node: `ray start --block` ends its processes on SIGTERM; the rest of its session is killed."""
    if node.poll() is None:
        node.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait(timeout=15)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(node.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        node.wait(timeout=5)
