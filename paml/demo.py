"""The demo: generated images of digits, two runs through Ray on the same sparse labels, a table and a figure.

A backbone first learns single digits, in place of ImageNet weights. Then AN (assume negative) and LL-R + BoostLU train,
each by `ray job submit`. Nothing is downloaded.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import save_file

from paml.data.settings import DataSettings
from paml.distributed.local_head import ray_head
from paml.errors import PamlError, SettingsError
from paml.explain.analysis import draw_run_comparison
from paml.losses import LossSettings
from paml.models import BoostSettings, ModelSettings
from paml.preparation.prepare import prepare
from paml.preparation.settings import PrepareSettings
from paml.progress import progress_display
from paml.runs.folder import Run
from paml.runs.spec import open_runs
from paml.runs.stopping import stopping
from paml.shards import ShardSettings
from paml.sources.digit_scenes import VERSION, write_digit_scenes
from paml.training.checkpoint import read_checkpoint
from paml.training.data import open_split
from paml.training.hooks import RunHooks, terminal_progress
from paml.training.loop import train
from paml.training.optimizer import OptimizerSettings
from paml.training.settings import RunSettings, TrainSettings
from paml.training.world import World

SIDE = 64
IMAGES = {"train": 2400, "validation": 600, "test": 900}
DIGIT_SIDE = 40
DIGITS = {"train": 8000, "validation": 300, "test": 100}
METHODS = {
    "AN": ["--loss.name=an", "--boost.train=1", "--boost.eval=1"],
    "LL-R + BoostLU": [],
}


def demo(seed: int = 0, scale: float = 1.0, epochs: int = 4, data: str = "data/demo", storage: str = "runs") -> None:
    """Generate the data, train the backbone and both methods, and compare them.

    Args:
        seed: of the images, their labels and the training.
        scale: fraction of the demo's images; at 0.1 it takes a minute or two, and the scores mean little.
        epochs: passes over the images of each method.
        data: folder for images, shards and the backbone; they are reused.
        storage: folder for the runs.
    """
    if not 0 < scale <= 1:
        raise SettingsError(f"scale is {scale}; it must be above 0 and at most 1")
    start = time.monotonic()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folders = {title: f"{storage}/demo-{stamp}-{title.lower().replace(' + ', '-')}" for title in METHODS}
    print("starting Ray in the background (on free ports, stopped at the end)", flush=True)
    with stopping(), contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as background:
        head = background.submit(stack.enter_context, ray_head(Path.cwd(), start_seconds=600))
        scenes = prepare_scenes(Path(data), seed, scale)
        weights = pretrain_backbone(Path(data), scale)
        for title, folder in folders.items():
            options = {
                "run.name": Path(folder).name, "run.storage": storage, "data.root": scenes, "model.weights": weights,
                "seed": seed, "epochs": epochs, "workers.num_workers": 2,
            }  # fmt: skip
            _submit([*METHODS[title], *(f"--{key}={value}" for key, value in options.items())], head.result())
    _show(folders, f"{storage}/demo.png")
    print(f"metrics of every epoch: `paml ui` opens MLflow on {storage}\n{time.monotonic() - start:.0f} s in all")


def prepare_scenes(root: Path, seed: int, scale: float = 1.0) -> Path:
    """Scenes of digits with sparse labels, as shards and label tables; a finished folder is reused."""
    return _prepare(scenes_folder(root, seed, scale), _scaled(IMAGES, scale), SIDE, seed, single=False)


def pretrain_backbone(root: Path, scale: float = 1.0) -> Path:
    """A backbone that has learned single digits; a finished file is reused.

    It serves the scenes of every seed: handwriting of their test split is in no training split.
    """
    weights = backbone_file(root, scale)
    data = _prepare(weights.parent / "prepared", _scaled(DIGITS, scale), DIGIT_SIDE, seed=0, single=True)
    if weights.exists():
        return weights
    settings = TrainSettings(
        run=RunSettings(storage=str(data.parent), name="run"),
        data=DataSettings(
            root=str(data), train_labels="labels/train-full.arrow", train_truth=None, test_split=None, flip_prob=0.0
        ),
        model=ModelSettings(backbone="resnet18", weights=None, feature_layer="layer2", output_stride=8),
        boost=BoostSettings(train=1.0, eval=1.0),
        loss=LossSettings(name="full"),
        optimizer=OptimizerSettings(learning_rate=1e-3, head_lr_multiplier=1.0, schedule="one_cycle"),
        epochs=3,
        batch_size=64,
    )
    print("\nbackbone: learning single digits from full labels, in this process", flush=True)
    shutil.rmtree(settings.run.folder, ignore_errors=True)  # of a demo that was stopped here
    result = train(settings, World(), RunHooks(progress=terminal_progress))
    best = read_checkpoint(settings.run.folder, result.best["1"]["checkpoint"], groups=("weights",))
    tensors = best.tensors["weights"].items()
    save_file({name.removeprefix("backbone."): t for name, t in tensors if name.startswith("backbone.")}, weights)
    return weights


def scenes_folder(root: Path, seed: int, scale: float = 1.0) -> Path:
    """Folder that `prepare_scenes` writes."""
    return root / f"scenes-{SIDE}px-{_scaled(IMAGES, scale)['train']}-seed{seed}-v{VERSION}" / "prepared"


def backbone_file(root: Path, scale: float = 1.0) -> Path:
    """File that `pretrain_backbone` writes."""
    return root / f"digits-{_scaled(DIGITS, scale)['train']}-v{VERSION}" / "backbone.safetensors"


def _scaled(counts: Mapping[str, int], scale: float) -> dict[str, int]:
    return {split: max(60, round(scale * count)) for split, count in counts.items()}


def _prepare(out: Path, images: dict[str, int], side: int, seed: int, *, single: bool) -> Path:
    """Write JPEG files and Open Images CSV files to the parent of `out`, and shards and label tables to `out`."""
    source = out.parent
    with progress_display(None) as progress:
        report = write_digit_scenes(
            source, images=images, size=side, seed=seed, single=single, progress=lambda n, of: progress("scenes", n, of)
        )
    print(report, flush=True)
    settings = PrepareSettings(
        out=str(out),
        source="openimages",
        labels=str(source / "2017_11"),
        images=str(source / "images"),
        full_labels=str(source / "full-labels"),
        shards=ShardSettings(size=side, samples_per_shard=500),
    )
    prepare(settings, log=lambda line: None)
    print(f"shards and label tables in {out}", flush=True)
    return out


def _submit(options: Sequence[str], environment: Mapping[str, str]) -> None:
    """Train through `ray job submit` and print the job's output without Ray's own hints."""
    command = ["train", "--config=demo", *options]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--log-style=record", "--log-color=false"]
    print(f"\n$ ray job submit -- paml {' '.join(command)}", flush=True)
    with subprocess.Popen(
        [*ray, "--", sys.executable, "-m", "paml", *command],
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            if line.strip() and not re.match(
                r"\d{4}-\d\d-\d\d .*(INFO|SUCC)|.*PreemptionWatcher|Running entrypoint", line
            ):
                print(line.rstrip(), flush=True)
    if process.returncode:
        raise PamlError(f"the job ended with status {process.returncode}; its output is above")


def _show(folders: Mapping[str, str], figure: str) -> None:
    """Print the test scores of the runs and what they rejected in their best epoch, and draw their maps."""
    columns = ("method", "best epoch", "test mAP, %", "rejected", "false neg.", "precision")
    layout = "{:<16} {:>10} {:>12} {:>9} {:>10} {:>10}"
    print("\n" + layout.format(*columns))
    for title, folder in folders.items():
        run = Run.open(folder)
        metrics = run.history[run.best_epoch - 1]
        counts = ["-", "-", "-"]
        if rejected := metrics.get("rejection/rejected"):
            hits = metrics["rejection/rejected_false_negatives"]
            counts = [f"{rejected:,.0f}", f"{hits:,.0f}", f"{hits / rejected:.3f}"]
        score = f"{100 * run.scores[run.settings.boost.eval].map:.2f}"
        print(layout.format(title, run.best_epoch, score, *counts))
    print("rejected labels and their precision are those of the best epoch (by validation mAP)")
    runs = open_runs(folders)
    split = open_split(runs[0].settings.data, "test", "labels/test.arrow", images="observed")
    draw_run_comparison(runs, split, figure)
    print(f"\nfigure: {figure}")
