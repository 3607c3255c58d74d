"""The cluster that a job finds: how to join it, and what its tasks need to find this paml and the storage."""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from paml.errors import SettingsError

T = TypeVar("T")
_STAYS = "~/paml"
STORAGE_VARIABLES = ("AWS_", "PAML_", "NO_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "SSL_CERT_FILE")
"""Beginnings of the environment variables that reading and writing depend on."""


def is_at_hand() -> bool:
    """Whether this process belongs to a cluster: it was submitted to one, or RAY_ADDRESS names one."""
    return bool(os.environ.get("RAY_ADDRESS")) or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def join(address: str | None = None, environment: dict[str, Any] | None = None) -> None:
    """Join the cluster of `address` or RAY_ADDRESS; where there is none, start Ray in this process.

    environment: the runtime environment of all this driver's actors and tasks, where they cannot be given their own.
    """
    import ray  # seconds, and not needed to ask the questions below

    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        refuse_silence(address or os.environ.get("RAY_ADDRESS", ""))
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, runtime_env=environment or None)


def refuse_silence(address: str, seconds: float = 30.0) -> None:
    """Raise SettingsError where nothing listens at `host:port`: ray.init would ask there for ever."""
    host, _, port = address.rpartition(":")
    if not host or "://" in host or not port.isdigit():
        return
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise SettingsError(
                    f"no Ray answers at {address} ({error}): start it (`ray start --head`), or set RAY_ADDRESS or "
                    "workers.address to where it is"
                ) from error
        time.sleep(0.5)


def beside(work: Callable[[], T]) -> T:
    """Call `work` in a thread of its own and return what it returns.

    A main thread within ray.get() heeds no signal, and a stopped job has three seconds.
    """
    outcome = in_thread(work)
    while not outcome.done():
        time.sleep(0.2)
    return outcome.result()


def in_thread(work: Callable[[], T]) -> "Future[T]":
    """What `work` will return, called in a thread that ends with the process at the latest."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="ray", daemon=True).start()
    return outcome


def leave() -> None:
    """Stop the Ray that `join` has started in this process; one of others is left alone."""
    import ray

    if ray.is_initialized() and not is_at_hand():
        ray.shutdown()


def working_dir() -> str | None:
    """The working_dir of the Ray job that this process belongs to, if it has one."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return (job.get("runtime_env") or {}).get("working_dir")


def base_folder() -> str:
    """Where relative paths begin: PAML_HOME, else the current folder.

    A job submitted with --working-dir runs in an unpacked copy that Ray removes, where no data lie and no result
    would stay; there it is the folder `paml` of the user's home, and a line says so.
    """
    home = os.environ.get("PAML_HOME")
    if home is not None:
        return home
    if working_dir() is None:
        return os.getcwd()
    home = os.path.expanduser(_STAYS)
    print(f"relative paths begin at {home}, since Ray removes the folder of this job (PAML_HOME sets another one)")
    return home


def task_environment() -> dict[str, Any]:
    """Let tasks find this paml: by the job's working_dir where it has one, else at this checkout's path."""
    if working_dir():
        return {}
    return {"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}}


def storage_environment() -> dict[str, str]:
    """This process's settings and keys for storage. They are to travel as data: Ray shows runtime environments."""
    return {name: value for name, value in os.environ.items() if name.upper().startswith(STORAGE_VARIABLES)}
