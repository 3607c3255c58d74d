"""Inside a training that is to be struck: what each step was computed from, and faults of the program's own.

PAML_CHAOS names a folder. `trace/` gets a line a step; a file `orders/<rank>-<place>` is obeyed once, at that place.
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

PLACES = ("step", "loader")


def folder() -> Path:
    """Where traces and orders lie."""
    return Path(os.environ["PAML_CHAOS"])


def install() -> None:
    """Trace the steps of this process and obey orders."""
    if getattr(loop, "struck", False):
        return
    loop.struck = True  # pyright: ignore[reportAttributeAccessIssue]
    real_step, real_iter = loop.train_step, Loader.__iter__

    @functools.wraps(real_step)
    def traced(state: TrainState, batch: Batch, *, last: bool) -> None:
        obey("step")
        real_step(state, batch, last=last)
        line = {
            "time": time.monotonic(),
            "rank": state.world.rank,
            "epoch": state.epoch,
            "step": batch.step,
            "done": state.optimiser_step,
            "images": batch.index.tolist(),
        }
        with (folder() / "trace" / f"{os.getpid()}-{state.world.rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def obedient(self: Loader) -> Iterator[Batch]:
        for batch in real_iter(self):
            obey("loader")
            yield batch

    loop.train_step = traced
    Loader.__iter__ = obedient


def obey(place: str) -> None:
    """Do what an order says, once."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    order = folder() / "orders" / f"{rank}-{place}"
    try:
        kind = order.read_text()
        order.unlink()
    except FileNotFoundError:
        return
    if kind == "exception":
        raise RuntimeError("a fault that was ordered")
    if kind == "allocation":
        torch.empty(1 << 55)
    elif kind == "deadlock":
        dist.recv(torch.empty(1), src=(rank + 1) % dist.get_world_size())
    elif kind == "hang":
        while True:
            time.sleep(3600)


def install_on_workers() -> None:
    """In the driver: let Ray Train's workers be traced and obey."""
    from paml.distributed import ray_train

    ray_train._worker = functools.partial(_worker, ray_train._worker)


def _worker(real: Callable[[dict[str, Any]], None], config: dict[str, Any]) -> None:
    install()
    real(config)
