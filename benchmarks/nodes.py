"""A training over three nodes of which one is killed and one is added: images a second by time, with the faults marked.

python benchmarks/nodes.py [--epochs 24] [--out benchmarks/nodes.png]

The nodes are raylets of this machine with one CPU each, beside a head without work; three workers, LL-Cp, averaged
weights, flips, a checkpoint every three steps. What is drawn are the steps of the newest checkpoint: what a kill cannot
take away.
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

IMAGES_A_STEP, WINDOW_SECONDS = 20, 4.0


@dataclasses.dataclass
class Timeline:
    """The newest checkpoint's step by time, and what was done to the cluster."""

    folder: Path
    begun: float = dataclasses.field(default_factory=time.monotonic)
    steps: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    marks: list[tuple[float, str]] = dataclasses.field(default_factory=list)

    def watch(self, over: threading.Event) -> None:
        while not over.wait(0.25):
            self.steps.append((time.monotonic() - self.begun, newest_step(self.folder)))

    def mark(self, what: str) -> None:
        self.marks.append((time.monotonic() - self.begun, what))
        print(f"{self.marks[-1][0]:6.1f} s, step {newest_step(self.folder)}: {what}", flush=True)


def draw(timeline: Timeline, path: str) -> None:
    seconds, steps = np.array(timeline.steps).T
    at = np.arange(0, seconds[-1], 0.5)
    reached = np.interp(at, seconds, steps)
    before = np.interp(np.clip(at - WINDOW_SECONDS, 0, None), seconds, steps)
    figure, axis = plt.subplots(figsize=(9, 3.6), constrained_layout=True)
    axis.plot(at, (reached - before) * IMAGES_A_STEP / WINDOW_SECONDS, color="#2a78d6", linewidth=2)
    top = axis.get_ylim()[1]
    for place, (when, what) in enumerate(timeline.marks):
        axis.axvline(when, color="#8a8a85", linewidth=1)
        axis.text(when, top * (1.02 + 0.09 * (place % 2)), what, fontsize=9, rotation=0, ha="center", va="bottom")
    axis.set_ylim(0, top)
    axis.set_xlabel("seconds since the job began")
    axis.set_ylabel("images a second, kept in a checkpoint")
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
        timeline, over = Timeline(run), threading.Event()
        watching = threading.Thread(target=timeline.watch, args=(over,), daemon=True)
        watching.start()
        command = hard_options(data, folder / "runs", "nodes", 3, options.epochs)
        with train_job(command, folder / "job.log", env=cluster.environment) as job:
            job.until(lambda: newest_step(run) >= last // 3, "a third of the run")
            timeline.mark("node killed")
            cluster.kill(cluster.at_work()[0])
            time.sleep(10)
            timeline.mark("node added")
            cluster.add()
            job.until(lambda: newest_step(run) >= 2 * last // 3, "two thirds of the run")
            timeline.mark("node cut off")
            cluster.pause(cluster.at_work()[0])
            cluster.add()
            assert job.wait() == 0, job.output
            timeline.mark("end")
        over.set()
        watching.join()
        draw(timeline, options.out)
        for line in job.output.splitlines():
            if "restart" in line:
                print(line)


if __name__ == "__main__":
    main()
