"""A Ray head of our own on free ports, beside any other Ray of this machine, stopped alone."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
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

    Dashboard and job API listen on 127.0.0.1 alone, but Ray's other ports on every address of the machine. So all of
    them ask for a token, which is made for this head and stands in that environment. On leaving, this head and its
    workers are stopped and no other Ray. Raises RuntimeError, with what Ray said, where it does not come up in time.
    """
    head = LocalHead(folder, cpus=cpus)
    try:
        head.start(start_seconds)
        yield head.environment
    finally:
        head.close()


class LocalHead:
    """A head whose ports, token and temporary folder stay the same when it is started again.

    options: more of `ray start`'s. variables: more of its environment than this process has.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cpus: int | None = None,
        options: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
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
        if cpus is not None:
            self._command.append(f"--num-cpus={cpus}")
        self.address = f"127.0.0.1:{gcs}"
        """Where nodes and drivers join."""
        self.environment = self._environment | {"RAY_API_SERVER_ADDRESS": self._url, "RAY_ADDRESS": self.address}
        """In which jobs find it."""
        self.process: subprocess.Popen | None = None

    def start(self, seconds: float = 240.0) -> None:
        """Raises RuntimeError, with what Ray said, where it does not come up in time."""
        log = Path(self._temporary, "head.log")
        Path(self._temporary, "ray_current_cluster").unlink(missing_ok=True)  # else Ray takes nodes for the old head
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + seconds
        while not _answers(f"{self._url}/api/jobs/", self._environment.get("RAY_AUTH_TOKEN", "")):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start within {seconds:g} s:\n{log.read_text()[-2000:]}")
            time.sleep(0.3)

    def close(self) -> None:
        """Stop it and its workers, and no other Ray."""
        if self.process is not None:
            stop(self.process)
        shutil.rmtree(self._temporary, ignore_errors=True)


def ray_start(*options: str) -> list[str]:
    """The command of one more Ray node of this machine, which ends with its processes (`stop`)."""
    agent, agent_grpc, metrics, environments = free_ports(4)
    return [
        sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics}",
        f"--runtime-env-agent-port={environments}",
    ]  # fmt: skip


def node_environment() -> dict[str, str]:
    """The environment of a node: this Python's commands come first, no token, no other Ray's address."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    environment.pop("RAY_ADDRESS", None)
    return environment


def _answers(url: str, token: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def stop(node: subprocess.Popen) -> None:
    """`ray start --block` takes its processes along on SIGTERM; what is left of its session is killed."""
    if node.poll() is None:
        node.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait(timeout=15)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(node.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        node.wait(timeout=5)
