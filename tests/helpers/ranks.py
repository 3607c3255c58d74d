"""Run a function on n worker processes connected by Gloo."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def run_on_ranks(function: Callable[..., Any], ranks: int, *args: Any, timeout_s: float = 270) -> list[Any]:
    """The results of `function(rank, *args)`, each run in its own process with torch.distributed initialized.

    `function` must be importable. The error of the first worker that fails is raised here with its traceback, and the
    others are stopped, as all are after `timeout_s`.
    """
    # Forked from a server that has imported torch but computed nothing, so workers start fast.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.runs"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_worker, args=(function, rank, ranks, folder, timeout_s, args), daemon=True)
            for rank in range(ranks)
        ]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + timeout_s
            while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
                if any(process.exitcode not in (None, 0) for process in processes):
                    # The others may wait for the one that failed: give them a moment to report their own error.
                    time.sleep(0.5)
                    break
                time.sleep(0.02)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
        outcomes = [_outcome(Path(folder), rank, processes[rank].exitcode) for rank in range(ranks)]
    failures = [(time_, text) for ok, text, time_ in outcomes if not ok]
    if failures:
        raise RuntimeError(min(failures, key=lambda failure: failure[0])[1])
    return [value for _, value, _ in outcomes]


def _outcome(folder: Path, rank: int, exitcode: int | None) -> tuple[bool, Any, float]:
    try:
        return pickle.loads((folder / f"result-{rank}").read_bytes())
    except FileNotFoundError:
        return (
            False,
            f"rank {rank} gave no result (exit status {exitcode}; -9: stopped at the time limit)",
            float("inf"),
        )


def _worker(
    function: Callable[..., Any], rank: int, ranks: int, folder: str, timeout_s: float, args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        # The loopback interface also works if the host's name does not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout_s),
        )
        outcome = (True, function(rank, *args), time.time())
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        outcome = (False, f"rank {rank} of {ranks} failed:\n{traceback.format_exc()}", time.time())
    temporary = Path(folder, f"part-{rank}")
    temporary.write_bytes(pickle.dumps(outcome))
    temporary.rename(Path(folder, f"result-{rank}"))
    if not outcome[0]:
        raise SystemExit(1)
