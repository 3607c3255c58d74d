"""Checks of a training that was run under faults."""

import collections
import contextlib
import os
import time
from pathlib import Path

import psutil

from paml import storage
from paml.tracking import sync
from paml.training.checkpoint import read_checkpoint
from tests.chaos.faulty_run import InjectedFault, Training
from tests.helpers.kills import differing, final_tensors
from tests.tracking.conftest import differences


def lost_steps(training: Training, injected: list[InjectedFault]) -> None:
    """Set for each fault the number of steps that rank 0 repeated after it."""
    _ = training.done
    first = sorted((line for line in training.lines if line["rank"] == 0), key=lambda line: line["time"])
    before, pid = 0, None
    for line in first:
        if pid is not None and line["pid"] != pid:
            causes = [each for each in injected if each.at <= line["time"]]
            if causes:
                causes[-1].lost = max(causes[-1].lost, before - (line["done"] - 1))
        before, pid = max(before, line["done"]), line["pid"]


def sample_problems(training: Training, images: int) -> list[str]:
    """Epochs in which an image was not used exactly once, by the steps that led to the final weights."""
    _ = training.done
    taken: dict[tuple[int, int, int], list[int]] = {}
    problems = []
    for line in training.lines:
        place = line["epoch"], line["step"], line["rank"]
        if taken.setdefault(place, line["images"]) != line["images"]:
            problems.append(f"epoch {place[0]}, step {place[1]}, rank {place[2]} had other images when repeated")
    by_epoch = collections.defaultdict(list)
    for (epoch, _, _), found in taken.items():
        by_epoch[epoch] += found
    for epoch in range(1, training.epochs + 1):
        counts = collections.Counter(by_epoch[epoch])
        if len(counts) != images or set(counts.values()) != {1}:
            problems.append(
                f"epoch {epoch}: {len(counts)} of {images} images, most {max(counts.values(), default=0)} times"
            )
    return problems


def leftover_files(training: Training) -> list[str]:
    """Unreadable checkpoints and temporary files in the run's storage."""
    found = []
    names = {name.split("/")[0] for name in storage.list_files(storage.join(training.run_folder, "checkpoints"))}
    for name in sorted(names):
        try:
            read_checkpoint(training.run_folder, name)
        except Exception as error:
            found.append(str(error))
    if len(names) > 4:
        found.append(f"{len(names)} checkpoints are retained")
    if not storage.is_remote(training.run_folder):
        found += [str(path) for path in Path(training.run_folder).rglob("*.paml-tmp")]
    return found


def remaining_processes(mark: str, seconds: float = 30.0) -> list[str]:
    """Processes whose environment names this folder."""
    end = time.monotonic() + seconds
    while True:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get("PAML_CHAOS") == mark:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.5)


def problems_of(training: Training, expected: dict, images: int) -> dict[str, list[str]]:
    """Violations at the end, by guarantee."""
    sync(training.run_folder, training.services.mlflow.uri)
    return {
        "weights differ": differing(expected, final_tensors(training.run_folder)),  # pyright: ignore[reportArgumentType]
        "images not used exactly once": sample_problems(training, images),
        "journal and MLflow differ": differences(training.run_folder, training.services.mlflow.uri),
        "leftover files": leftover_files(training),
        "exit status": [] if training.ended() == 0 else [f"status {training.ended()}"],
    }
