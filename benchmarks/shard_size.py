"""What storing pictures at the training size costs in mAP: coco18 at 160 px from two sets of shards, paired seeds.

python benchmarks/shard_size.py [--seeds 3] [--epochs 3] [--train-from features.18] [--out runs/shard-size]

The photos have 320 px. One set of shards holds them resized to 160 px (JPEG of --quality), the other as they are,
resized by the loader. The network is trained from a late layer on, on cached features. Both trainings of a seed see
the same batches and flips; full labels, the recipe coco18.yaml else. Prints test mAP of each run's best epoch (by
validation) and the paired differences: to reach is a mean within 0.3 points. What was prepared or trained already is
read, not repeated. $PAML_SHARED holds data/coco18.
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
from paml.prepare import PrepareSettings, prepare
from paml.shards import ShardSettings
from paml.training.loop import Result, Watcher, run_folder_of, train
from paml.training.settings import TrainSettings, flatten, unflatten
from paml.training.world import World

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "jobs" / "recipes" / "coco18.yaml"
SHARDS = {"stored": "squash", "original": "original"}


def name_of(way: str, shards: ShardSettings) -> str:
    """Of the shards made in one of the two ways; what is not the default shows."""
    if way == "original":
        return f"{way}-{shards.size}"
    quality = f"-q{shards.quality}" if shards.quality != ShardSettings.quality else ""
    chroma = "-" + shards.chroma.replace(":", "") if shards.chroma != ShardSettings.chroma else ""
    return f"{way}-{shards.size}{quality}{chroma}"


def prepared(data: Path, out: Path, way: str, shards: ShardSettings) -> Path:
    """The photos and their full labels in one of the two ways."""
    folder = out / f"data-{name_of(way, shards)}"
    if not (folder / "labels" / "test.arrow").exists():
        prepare(
            PrepareSettings(
                out=str(folder),
                release=str(data / "2017_11"),
                images=str(data / "images"),
                full_labels=str(data / "full-labels"),
                shards=dataclasses.replace(shards, resize=SHARDS[way]),
            )
        )
    return folder


def result_of(settings: TrainSettings) -> Result:
    """Train, or read what an earlier call trained."""
    stored = Path(run_folder_of(settings)) / "result.json"
    if stored.exists():
        return Result.from_json(json.loads(stored.read_text()))
    print(f"\n{settings.run.name}", flush=True)
    result = train(settings, World(), Watcher(say=lambda line: print(line, flush=True)))
    stored.write_text(json.dumps(result.to_json()))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--quality", type=int, default=ShardSettings.quality, help="of the stored JPEG files")
    parser.add_argument("--chroma", default=ShardSettings.chroma, help="of the stored JPEG files: 4:2:0 or 4:4:4")
    parser.add_argument(
        "--train-from", default="features.18", help="layer of mobilenet_v2; what comes before is cached"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/shard-size"))
    parser.add_argument("--data", type=Path, help="default: data/coco18 below $PAML_SHARED")
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
    found: dict[str, list[float]] = {way: [] for way in SHARDS}
    for seed in range(options.seeds):
        for way in SHARDS:
            folder = prepared(data, options.out, way, shards)
            settings = dataclasses.replace(
                base,
                run=dataclasses.replace(
                    base.run,
                    storage=str(options.out / "runs"),
                    name=f"{name_of(way, shards)}-{seed}",
                    mlflow=False,
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
            found[way].append(100 * result_of(settings).test["1"].map)
    print(
        f"\n| seed | stored at {options.size} px | originals, resized by the loader | difference |\n|---|---|---|---|"
    )
    pairs = list(zip(found["stored"], found["original"], strict=True))
    for seed, (stored, original) in enumerate(pairs):
        print(f"| {seed} | {stored:.2f} | {original:.2f} | {stored - original:+.2f} |")
    differences = [stored - original for stored, original in pairs]
    mean, spread = statistics.mean(differences), statistics.stdev(differences) if len(differences) > 1 else float("nan")
    print(
        f"mean difference {mean:+.2f} points of mAP (standard deviation of a pair {spread:.2f}); to reach: within 0.3"
    )


if __name__ == "__main__":
    main()
