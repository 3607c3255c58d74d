"""Ray on several "hosts" of this machine: a head without work, and nodes that join, die and freeze."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.jobs import QUIET, WORKER, environment, processes_named

SOON = {  # Ray reports a node as lost after 50 s without an answer; here after 20 s, enough for a busy machine
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
}


class Nodes:
    """A cluster whose nodes have one CPU each. Its processes are children of this one."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        self._before = dict(os.environ)
        os.environ.update(QUIET | SOON)
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.environment = environment(RAY_ADDRESS=self._cluster.address)
        self.nodes: list[Any] = []
        for _ in range(count):
            self.add()

    def add(self) -> Any:
        """Add a node. Ray gives one 30 s to start, which is too little on a busy machine: three attempts."""
        for attempt in range(3):
            try:
                self.nodes.append(self._cluster.add_node(num_cpus=1))
            except Exception as error:
                if "timed out during startup" not in str(error) or attempt == 2:
                    raise
            else:
                break
        return self.nodes[-1]

    def raylet(self, node: Any) -> psutil.Process:
        """The raylet process of a node."""
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def at_work(self) -> list[Any]:
        """Nodes that run workers of a training."""
        return [node for node in self.nodes if processes_named(self.raylet(node).children(recursive=True), WORKER)]

    def kill(self, node: Any) -> None:
        """Kill a node with all its processes."""
        left = self.raylet(node).children(recursive=True)
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def pause(self, node: Any) -> None:
        """Freeze a node with all its processes, as if it had lost the network."""
        for process in [self.raylet(node), *self.raylet(node).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)

    def announce(self, node: Any, seconds: int) -> None:
        """Announce the preemption of a node, as a cloud does for a spot machine."""
        notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        address = ["--address", self._cluster.address, "--node-id", node.node_id]
        ray = str(Path(sys.executable).parent / "ray")
        command = [ray, "drain-node", *address, *notice, "--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, check=True, env=self.environment, capture_output=True, timeout=60)

    def close(self) -> None:
        """Stop all nodes."""
        for node in self.nodes:
            for process in [*self.raylet(node).children(recursive=True), self.raylet(node)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
        self._cluster.shutdown()
        os.environ.clear()
        os.environ.update(self._before)  # later heads of this process use Ray's default


@contextlib.contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """A head without work and `count` nodes of one CPU; they stop when the context ends."""
    cluster = Nodes(count)
    try:
        yield cluster
    finally:
        cluster.close()
