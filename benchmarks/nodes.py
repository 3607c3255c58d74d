"""Images per second over time of a training on three nodes, of which one is killed and one loses the network.

python benchmarks/nodes.py [--epochs 24] [--out benchmarks/nodes.png]

The nodes are raylets on this machine with one CPU each; the head runs no tasks. Three workers, LL-Cp, EMA weights,
flips, a checkpoint every three steps. The rate is that of the steps in checkpoints, which a kill cannot undo.
"""

import argparse
import dataclasses
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tests.helpers.jobs import newest_step, prepare_scenes, train_job, write_scenes
from tests.helpers.kills import STEPS, hard_options
from tests.helpers.nodes import nodes

IMAGES_PER_STEP, WINDOW_SECONDS = 20, 4.0


@dataclasses.dataclass
class Timeline:
    """The step of the newest checkpoint over time, and the events of the cluster."""

    folder: Path
    started: float = dataclasses.field(default_factory=time.monotonic)
    steps: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    events: list[tuple[float, str]] = dataclasses.field(default_factory=list)

    def watch(self, done: threading.Event) -> None:
        while not done.wait(0.25):
            self.steps.append((time.monotonic() - self.started, newest_step(self.folder)))

    def add_event(self, event: str) -> None:
        self.events.append((time.monotonic() - self.started, event))
        print(f"{self.events[-1][0]:6.1f} s, step {newest_step(self.folder)}: {event}", flush=True)


def draw(timeline: Timeline, path: str) -> None:
    seconds, steps = np.array(timeline.steps).T
    times = np.arange(0, seconds[-1], 0.5)
    reached = np.interp(times, seconds, steps)
    before = np.interp(np.clip(times - WINDOW_SECONDS, 0, None), seconds, steps)
    figure, axis = plt.subplots(figsize=(9, 3.6), constrained_layout=True)
    axis.plot(times, (reached - before) * IMAGES_PER_STEP / WINDOW_SECONDS, color="#2a78d6", linewidth=2)
    top = axis.get_ylim()[1]
    for number, (when, event) in enumerate(timeline.events):
        axis.axvline(when, color="#8a8a85", linewidth=1)
        axis.text(when, top * (1.02 + 0.09 * (number % 2)), event, fontsize=9, ha="center", va="bottom")
    axis.set_ylim(0, top)
    axis.set_xlabel("seconds since the start of the job")
    axis.set_ylabel("images per second (checkpointed)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--out", default=str(Path(__file__).with_name("nodes.png")))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, nodes(3) as cluster:
        folder = Path(temporary)
        data = prepare_scenes(write_scenes(folder / "scenes"), folder / "data")
        run, last = folder / "runs" / "nodes", options.epochs * STEPS
        timeline, done = Timeline(run), threading.Event()
        watcher = threading.Thread(target=timeline.watch, args=(done,), daemon=True)
        watcher.start()
        command = hard_options(data, folder / "runs", "nodes", 3, options.epochs)
        with train_job(command, folder / "job.log", env=cluster.environment) as job:
            job.until(lambda: newest_step(run) >= last // 3, "a third of the run")
            timeline.add_event("node killed")
            cluster.kill(cluster.at_work()[0])
            time.sleep(10)
            timeline.add_event("node added")
            cluster.add()
            job.until(lambda: newest_step(run) >= 2 * last // 3, "two thirds of the run")
            timeline.add_event("node loses network")
            cluster.pause(cluster.at_work()[0])
            cluster.add()
            assert job.wait() == 0, job.output
            timeline.add_event("end")
        done.set()
        watcher.join()
        draw(timeline, options.out)
        for line in job.output.splitlines():
            if "restart" in line:
                print(line)


if __name__ == "__main__":
    main()
