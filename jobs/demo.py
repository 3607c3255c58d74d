"""The whole way on one machine: pictures of digits, shards and label tables, two runs through Ray, a table, a picture.

A backbone first learns single digits, as a stand-in for ImageNet weights. Then AN (unobserved labels taken as
negative) and LL-R + BoostLU train on the same sparse labels by `ray job submit`, on a Ray of the demo's own, and are
compared. Nothing is downloaded.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from paml.cli import run_job
from paml.distributed.local_head import ray_head
from paml.errors import PamlError

DATA = Path("data/demo")
SIDE = 64
IMAGES = {"train": 2400, "validation": 600, "test": 900}
SINGLE_SIDE = 40
SINGLES = {"train": 8000, "validation": 300, "test": 100}
RECIPE = "jobs/recipes/demo.yaml"
ROWS = {
    "AN": ["--loss.name=an", "--boost.train=1", "--boost.eval=1"],
    "LL-R + BoostLU": [],
}


def make_data(seed: int) -> Path:
    """Scenes as JPEG files and Open Images CSV, then shards and label tables; kept where they are whole."""
    return _prepared(data_folder(seed), IMAGES, SIDE, seed, single=False)


def data_folder(seed: int) -> Path:
    """Where `make_data` leaves shards and label tables."""
    return _folder(f"scenes-{SIDE}px-{IMAGES['train']}-seed{seed}")


def weights_file() -> Path:
    """Where `make_weights` leaves the backbone."""
    return _folder("single-digits").parent / "backbone.safetensors"


def _folder(name: str) -> Path:
    from paml.sources.digit_scenes import VERSION

    return DATA / f"{name}-v{VERSION}" / "prepared"  # what an older demo left is no hindrance


def _prepared(out: Path, images: dict[str, int], side: int, seed: int, *, single: bool) -> Path:
    from paml.prepare import PrepareSettings, prepare
    from paml.shards import ShardSettings
    from paml.sources.digit_scenes import write_digit_scenes

    scenes = out.parent
    report = write_digit_scenes(
        scenes, images=images, size=side, seed=seed, single=single, progress=_bar("drawing scenes")
    )
    print(report, flush=True)
    settings = PrepareSettings(
        out=str(out),
        release=str(scenes / "2017_11"),
        images=str(scenes / "images"),
        full_labels=str(scenes / "full-labels"),
        shards=ShardSettings(size=side, samples_per_shard=500),
    )
    prepare(settings, say=lambda line: None)
    print(f"shards and label tables in {out}", flush=True)
    return out


def make_weights() -> Path:
    """A backbone that knows single digits: what ImageNet weights are to photos. Kept where it is there already.

    It serves the scenes of every seed: their test handwriting is never in a training split.
    """
    from safetensors.torch import save_file

    from paml.data.settings import DataSettings
    from paml.losses import LossSettings
    from paml.models import BoostSettings, ModelSettings
    from paml.training.checkpoint import read_checkpoint
    from paml.training.loop import Watcher, run_folder_of, terminal_bar, train
    from paml.training.optimiser import OptimiserSettings
    from paml.training.settings import TrackingSettings, TrainSettings
    from paml.training.world import World

    data = _prepared(_folder("single-digits"), SINGLES, SINGLE_SIDE, seed=0, single=True)
    weights = weights_file()
    if weights.exists():
        return weights
    settings = TrainSettings(
        run=TrackingSettings(storage=str(data.parent), name="run"),
        data=DataSettings(
            root=str(data), train_labels="labels/train-full.arrow", train_truth=None, test_split=None, flip=0.0
        ),
        model=ModelSettings(backbone="resnet18", weights=None, feature_layer="layer2", output_stride=8),
        boost=BoostSettings(train=1.0, eval=1.0),
        loss=LossSettings(name="full"),
        optimiser=OptimiserSettings(learning_rate=1e-3, head_factor=1.0, schedule="one_cycle"),
        epochs=3,
        batch_size=64,
    )
    print("\nbackbone: learning single digits from full labels, in this process", flush=True)
    shutil.rmtree(run_folder_of(settings), ignore_errors=True)  # of an earlier demo that was stopped here
    result = train(settings, World(), Watcher(bar=terminal_bar))
    newest = read_checkpoint(run_folder_of(settings), result.best["1"]["checkpoint"], groups=("weights",))
    tensors = newest.tensors["weights"]
    kept = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    save_file(kept, weights)
    return weights


def _bar(title: str):
    from paml.training.loop import terminal_bar

    bars: list = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(terminal_bar(title, total))
        bars[0].update(done - getattr(bars[0], "n", done - 1))
        if done == total:
            bars[0].close()

    return show


def submit(name: str, data: Path, options: list[str], environment: dict[str, str]) -> None:
    """One run by `ray job submit`, as on a cluster."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--log-style=record", "--log-color=false"]
    job = ["python", "jobs/train_openimages.py", f"--config={RECIPE}", f"--run.name={name}", f"--data.root={data}"]
    print(f"\n$ ray job submit -- {' '.join(job + options)}", flush=True)
    with subprocess.Popen(
        [*command, "--", *job, *options], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip()
            if _worth_showing(line):
                print(line, flush=True)
    if process.returncode:
        raise PamlError(f"the job {name} failed; what it said stands above")


def _worth_showing(line: str) -> bool:
    """Ray's own hints on how to follow and stop a job are of no use here: the demo does both."""
    return bool(line) and not re.match(r"\d{4}-\d\d-\d\d .*(INFO|SUCC)|.*PreemptionWatcher|Running entrypoint", line)


def compare(names: dict[str, str], data: Path) -> Path:
    """Print the table of both runs and draw the picture; returns the picture's path."""
    from paml.explain.panel import draw_panel
    from paml.explain.runs import open_runs
    from paml.training.data import open_split
    from paml.training.loop import Result

    runs = open_runs({title: str(Path("runs") / name) for title, name in names.items()})
    print(f"\n{'method':<16} {'best epoch':>10} {'test mAP, %':>12} {'rejected':>9} {'truly FN':>9} {'precision':>10}")
    for run in runs:
        result = Result.from_json(json.loads((Path(run.folder) / "result.json").read_text()))
        alpha = f"{run.settings.boost.eval:g}"
        best = result.best[alpha]["epoch"]
        figures = result.history[best - 1]
        rejected = figures.get("rejection/rejected")
        cells = ["-", "-", "-"]
        if rejected:
            hits = figures["rejection/rejected_false_negatives"]
            cells = [f"{rejected:,.0f}", f"{hits:,.0f}", f"{hits / rejected:.3f}"]
        score = f"{100 * result.test[alpha].map:.2f}"
        print(f"{run.title:<16} {best:>10} {score:>12} {cells[0]:>9} {cells[1]:>9} {cells[2]:>10}")
    print("rejected labels and their precision are those of the best epoch (by validation mAP)")
    picture = Path("runs") / "demo.png"
    split = open_split(runs[0].settings.data, "test", "labels/test.arrow", images="observed")
    draw_panel(runs, split, str(picture))
    return picture


def demo(seed: int, options: list[str]) -> None:
    """Data, a backbone, two runs, the comparison."""
    begun = time.monotonic()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = {title: f"demo-{stamp}-{title.lower().replace(' + ', '-')}" for title in ROWS}
    print("starting Ray beside what follows (on free ports, stopped at the end)", flush=True)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as beside:
        head = beside.submit(stack.enter_context, ray_head(ROOT))
        data = make_data(seed)
        weights = make_weights()
        environment = head.result()
        for title, name in names.items():
            own = [*ROWS[title], f"--model.weights={weights}", f"--seed={seed}", *options]
            submit(name, data, own, environment)
    picture = compare(names, data)
    print(f"\npicture: {picture}\nevery figure by epoch: `make ui` opens MLflow on runs/mlflow.db")
    print(f"{time.monotonic() - begun:.0f} s in all")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes, their labels and the training")
    arguments, options = parser.parse_known_args()
    return run_job(lambda: demo(arguments.seed, options))


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
