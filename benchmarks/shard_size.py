"""The mAP cost of storing images at the training size: coco18 at 160 px from two sets of shards, paired seeds.

Run: python benchmarks/shard_size.py [--seeds 3] [--epochs 3] [--train-from features.18] [--out runs/shard-size]

The photos have 320 px. One set of shards has them resized to 160 px (JPEG of --quality); the other has the originals,
which the loader resizes. Trains the layers after --train-from on cached features, with full labels and otherwise the
recipe coco18. Both runs of a seed have the same batches and flips. Prints the test mAP of each run's best epoch
(by validation) and the paired differences; the target is a mean within 0.3 points. Existing data and runs are reused.
$PAML_SHARED contains data/coco18.
"""

import argparse
import dataclasses
import json
import os
import statistics
from pathlib import Path

import torch
import yaml

from paml.losses import LossSettings
from paml.models import BoostSettings
from paml.preparation.prepare import prepare
from paml.preparation.settings import PrepareSettings
from paml.settings import flatten, unflatten
from paml.shards import ShardSettings
from paml.training.hooks import RunHooks
from paml.training.loop import train
from paml.training.result import Result
from paml.training.settings import TrainSettings
from paml.training.world import World

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "paml" / "recipes" / "coco18.yaml"
SHARDS = {"stored": "squash", "original": "original"}


def name_of(kind: str, shards: ShardSettings) -> str:
    """A name with the settings that differ from the defaults."""
    if kind == "original":
        return f"{kind}-{shards.size}"
    quality = f"-q{shards.quality}" if shards.quality != ShardSettings.quality else ""
    chroma = "-" + shards.chroma.replace(":", "") if shards.chroma != ShardSettings.chroma else ""
    return f"{kind}-{shards.size}{quality}{chroma}"


def prepare_photos(data: Path, out: Path, kind: str, shards: ShardSettings) -> Path:
    """Prepare the photos and their full labels, unless the folder exists."""
    folder = out / f"data-{name_of(kind, shards)}"
    if not (folder / "labels" / "test.arrow").exists():
        prepare(
            PrepareSettings(
                out=str(folder),
                labels=str(data / "2017_11"),
                images=str(data / "images"),
                full_labels=str(data / "full-labels"),
                shards=dataclasses.replace(shards, resize=SHARDS[kind]),
            )
        )
    return folder


def result_of(settings: TrainSettings) -> Result:
    """Train, unless the run is finished."""
    stored = Path(settings.run.folder) / "result.json"
    if stored.exists():
        return Result.from_json(json.loads(stored.read_text()))
    print(f"\n{settings.run.name}", flush=True)
    result = train(settings, World(), RunHooks(log=lambda line: print(line, flush=True)))
    stored.write_text(json.dumps(result.to_json()))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--quality", type=int, default=ShardSettings.quality, help="JPEG quality of the stored images")
    parser.add_argument("--chroma", default=ShardSettings.chroma, help="chroma subsampling: 4:2:0 or 4:4:4")
    parser.add_argument(
        "--train-from", default="features.18", help="layer of mobilenet_v2; the features before it are cached"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/shard-size"))
    parser.add_argument("--data", type=Path, help="default: data/coco18 in $PAML_SHARED")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shared = Path(os.environ.get("PAML_SHARED", ROOT.parent / "shared")) / "data"
    data = options.data or shared / "coco18"
    base = unflatten(TrainSettings, flatten(yaml.safe_load(RECIPE.read_text())))
    if base.model.weights is not None:
        weights = shared / "weights" / Path(base.model.weights).name
        base = dataclasses.replace(base, model=dataclasses.replace(base.model, weights=str(weights)))
    shards = ShardSettings(size=options.size, quality=options.quality, chroma=options.chroma, samples_per_shard=500)
    scores: dict[str, list[float]] = {kind: [] for kind in SHARDS}
    for seed in range(options.seeds):
        for kind in SHARDS:
            folder = prepare_photos(data, options.out, kind, shards)
            settings = dataclasses.replace(
                base,
                run=dataclasses.replace(
                    base.run,
                    storage=str(options.out / "runs"),
                    name=f"{name_of(kind, shards)}-{seed}",
                    trackers=[],
                ),
                data=dataclasses.replace(
                    base.data,
                    root=str(folder),
                    train_labels="labels/train-full.arrow",
                    image_size=options.size,
                ),
                model=dataclasses.replace(base.model, frozen_layers=0, train_from=options.train_from),
                boost=BoostSettings(train=1.0, eval=1.0),
                loss=LossSettings(name="full"),
                epochs=options.epochs,
                seed=seed,
            )
            scores[kind].append(100 * result_of(settings).test["1"].map)
    print(
        f"\n| seed | stored at {options.size} px | originals, resized by the loader | difference |\n|---|---|---|---|"
    )
    pairs = list(zip(scores["stored"], scores["original"], strict=True))
    for seed, (stored, original) in enumerate(pairs):
        print(f"| {seed} | {stored:.2f} | {original:.2f} | {stored - original:+.2f} |")
    differences = [stored - original for stored, original in pairs]
    mean, spread = statistics.mean(differences), statistics.stdev(differences) if len(differences) > 1 else float("nan")
    print(f"mean difference {mean:+.2f} points of mAP (standard deviation of a pair {spread:.2f}); target: within 0.3")


if __name__ == "__main__":
    main()
