"""Join a Ray cluster, and give its tasks this paml and the storage credentials."""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from paml.errors import PamlError, SettingsError
from paml.runs.stopping import stopping

T = TypeVar("T")
CONTINUE = "repeat the command to continue"
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_STORAGE_VARIABLES = ("AWS_", "PAML_", "NO_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "SSL_CERT_FILE")


def is_available() -> bool:
    """Whether this process was submitted to a cluster, or RAY_ADDRESS is set."""
    return bool(os.environ.get("RAY_ADDRESS")) or _JOB_VARIABLE in os.environ


def join(address: str | None = None, environment: dict[str, Any] | None = None) -> None:
    """Join the cluster at `address` or RAY_ADDRESS, or start Ray in this process if both are unset.

    environment: Ray's runtime environment for all actors and tasks of this driver. Raises SettingsError if nothing
    listens at the address, PamlError if Ray does not start in time.
    """
    import ray  # takes seconds

    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        check_reachable(address or os.environ.get("RAY_ADDRESS", ""))
        options = {"logging_level": logging.WARNING, "log_to_driver": False, "runtime_env": environment or None}
        try:
            ray.init(address=address, **options)
        except Exception as error:  # Ray has no type for it
            if "timed out during startup" not in str(error):
                raise
            raise PamlError("Ray did not start within 30 s; this machine may be too busy: try again") from error


def check_reachable(address: str, seconds: float = 30.0) -> None:
    """Raise SettingsError if nothing listens at `host:port`; ray.init would retry forever."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while host and "://" not in host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise SettingsError(
                    f"Ray does not answer at {address} ({error}): start it with `ray start --head`, or correct "
                    "RAY_ADDRESS or workers.address"
                ) from error
        time.sleep(0.5)


def print_line(line: str) -> None:
    """Print to stdout at once."""
    print(line, flush=True)


def print_to_stderr(line: str) -> None:
    """Print to stderr at once."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stoppable_tasks(ray: bool | None) -> Iterator[bool]:
    """Join a cluster to run tasks, if asked to; null: if there is one. Yields whether it did.

    Ends the process with 128 + signal on SIGTERM and Ctrl-C, without waiting for threads: one may wait for a server
    for a minute, and files are complete or absent at any time.
    """
    use_ray = is_available() if ray is None else ray
    if use_ray:
        join()  # installs signal handlers, which `stopping` then replaces
    with stopping() as signals:
        try:
            yield use_ray
        except KeyboardInterrupt:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            print(f"stopped; {CONTINUE}", flush=True)
            sys.stderr.flush()
            if use_ray and not is_available():  # `join` started it in this process
                import ray as ray_module

                ray_module.shutdown()
            os._exit(128 + (signals[0] if signals else signal.SIGINT))


def call_in_thread(function: Callable[[], T]) -> T:
    """Call `function` in a thread and return its result.

    The main thread handles signals only outside of Ray calls, and a stopped job is killed after three seconds.
    """
    outcome = start_thread(function)
    while not outcome.done():
        time.sleep(0.1)
    return outcome.result()


def start_thread(function: Callable[[], T]) -> "Future[T]":
    """The future result of `function`, called in a daemon thread."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="ray", daemon=True).start()
    return outcome


def base_folder() -> str:
    """The folder that relative paths are resolved against: PAML_HOME, or the current folder.

    A job submitted with --working-dir runs in a copy that Ray deletes. It uses ~/paml, and prints that.
    """
    if "PAML_HOME" in os.environ:
        return os.environ["PAML_HOME"]
    if not _has_job_working_dir():
        return os.getcwd()
    home = os.path.expanduser("~/paml")
    print(f"relative paths are resolved in {home}, since Ray deletes the working directory of this job; to change "
          "that, set PAML_HOME")  # fmt: skip
    return home


def task_environment() -> dict[str, Any]:
    """Ray's runtime environment for tasks to import this paml: the job's working_dir, or this checkout."""
    return {} if _has_job_working_dir() else {"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}}


def _has_job_working_dir() -> bool:
    job = json.loads(os.environ.get(_JOB_VARIABLE, "{}"))
    return bool((job.get("runtime_env") or {}).get("working_dir"))


def storage_environment() -> dict[str, str]:
    """Settings and credentials for storage. Send them as data: Ray's dashboard shows runtime environments."""
    return {name: value for name, value in os.environ.items() if name.upper().startswith(_STORAGE_VARIABLES)}
