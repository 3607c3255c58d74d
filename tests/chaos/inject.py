"""Inside a training under faults: a trace of its steps, and faults of the program itself.

PAML_CHAOS names a folder. `trace/` receives a line per step; a file `orders/<rank>-<point>` is executed once, there.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paml.data.loader import Batch, Loader
from paml.training import loop
from paml.training.state import TrainState

POINTS = ("step", "loader")


def folder() -> Path:
    """Folder of traces and orders."""
    return Path(os.environ["PAML_CHAOS"])


def install() -> None:
    """Trace the steps of this process and execute orders."""
    if getattr(loop, "injected", False):
        return
    loop.injected = True  # pyright: ignore[reportAttributeAccessIssue]
    real_step, real_iter = loop.train_step, Loader.__iter__

    @functools.wraps(real_step)
    def traced(state: TrainState, batch: Batch, *, last: bool) -> None:
        execute_order("step")
        real_step(state, batch, last=last)
        line = {
            "time": time.monotonic(),
            "rank": state.world.rank,
            "epoch": state.epoch,
            "step": batch.step,
            "done": state.optimizer_step,
            "images": batch.index.tolist(),
        }
        with (folder() / "trace" / f"{os.getpid()}-{state.world.rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def with_orders(self: Loader) -> Iterator[Batch]:
        for batch in real_iter(self):
            execute_order("loader")
            yield batch

    loop.train_step = traced
    Loader.__iter__ = with_orders


def execute_order(point: str) -> None:
    """Execute an order, once."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    order = folder() / "orders" / f"{rank}-{point}"
    try:
        kind = order.read_text()
        order.unlink()
    except FileNotFoundError:
        return
    if kind == "exception":
        raise RuntimeError("an injected fault")
    if kind == "allocation":
        torch.empty(1 << 55)
    elif kind == "deadlock":
        dist.recv(torch.empty(1), src=(rank + 1) % dist.get_world_size())
    elif kind == "hang":
        while True:
            time.sleep(3600)


def install_on_workers() -> None:
    """In the driver: have Ray Train's workers trace and execute orders."""
    from paml.distributed import ray_train

    ray_train._worker = functools.partial(_worker, ray_train._worker)


def _worker(real: Callable[[dict[str, Any]], None], config: dict[str, Any]) -> None:
    install()
    real(config)
