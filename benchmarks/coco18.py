"""The rows of the paper on the 18-class photos: one recipe, one seed, every row's epoch chosen on validation.

python benchmarks/coco18.py --labels single    (or partial; prepare with jobs/recipes/prepare_coco18.yaml first)

Each of five trainings is scored with and without boost at inference by one pass, so seven rows come of them. A run
that is there already is read, not repeated.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
import yaml

from paml.losses import LossSettings
from paml.models import BoostSettings
from paml.training.loop import Result, Watcher, run_folder_of, train
from paml.training.settings import TrainSettings, flatten, unflatten
from paml.training.world import World

RECIPE = Path(__file__).resolve().parents[1] / "jobs" / "recipes" / "coco18.yaml"
TABLES = {"single": "labels/train-single.arrow", "partial": "labels/train.arrow"}
ROWS = {  # name: (training, alpha in scoring)
    "full labels": ("full", "1"),
    "AN": ("an", "1"),
    "AN + boost at inference": ("an", "5"),
    "AN + boost in training": ("an-boost", "5"),
    "LL-R": ("llr", "1"),
    "LL-R + boost at inference": ("llr", "5"),
    "LL-R + BoostLU": ("llr-boost", "5"),
}


def settings_of(
    training: str,
    labels: str,
    storage: str,
    frozen_layers: int | None = None,
    epochs: int | None = None,
    image_size: int | None = None,
) -> TrainSettings:
    """The recipe with the loss, the boost and the label table of a training."""
    base = unflatten(TrainSettings, flatten(yaml.safe_load(RECIPE.read_text())))
    if frozen_layers is not None:
        base = dataclasses.replace(base, model=dataclasses.replace(base.model, frozen_layers=frozen_layers))
    if epochs is not None:
        base = dataclasses.replace(base, epochs=epochs)
    boosted = training.endswith("-boost")
    alphas = (5.0, 1.0) if boosted else (1.0, 5.0)
    name = {"full": "full", "an": "an", "llr": "ll-r"}[training.removesuffix("-boost")]
    table = "labels/train-full.arrow" if training == "full" else TABLES[labels]
    return dataclasses.replace(
        base,
        run=dataclasses.replace(base.run, storage=storage, name=f"{labels}-{training}"),
        data=dataclasses.replace(base.data, train_labels=table, image_size=image_size),
        boost=BoostSettings(train=alphas[0], eval=alphas[0], eval_also=alphas[1:]),
        loss=LossSettings(name=name, reject_rate_step=base.loss.reject_rate_step),
    )


def run(settings: TrainSettings) -> Result:
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
    parser.add_argument("--labels", choices=TABLES, default="single")
    parser.add_argument("--storage", default="runs/coco18")
    parser.add_argument("--frozen-layers", type=int, help="other than the recipe's; 0 trains end to end")
    parser.add_argument("--epochs", type=int, help="other than the recipe's")
    parser.add_argument("--image-size", type=int, help="pixels, other than those of the shards")
    parser.add_argument("--only", nargs="*", help="of the trainings full, an, an-boost, llr, llr-boost; no table then")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = options.only or dict.fromkeys(name for name, _ in ROWS.values())
    found = {
        name: run(
            settings_of(
                name, options.labels, options.storage, options.frozen_layers, options.epochs, options.image_size
            )
        )
        for name in names
    }
    if options.only:
        return
    scores = {row: 100 * found[name].test[alpha].map for row, (name, alpha) in ROWS.items()}
    below, above = scores["AN"], scores["full labels"]
    print(f"\n| {options.labels} | test mAP | gap closed | best epoch |\n|---|---|---|---|")
    for row, (name, alpha) in ROWS.items():
        gap = (scores[row] - below) / (above - below)
        print(f"| {row} | {scores[row]:.2f} | {gap:.0%} | {found[name].best[alpha]['epoch']} |")
    for name in ("llr", "llr-boost"):
        cells = [
            f"{f['rejection/rejected']:,.0f} ({f['rejection/precision']:.2f})" if f["rejection/rejected"] else "0"
            for f in found[name].history
        ]
        print(f"{name}: rejected by epoch (precision): {', '.join(cells)}")


if __name__ == "__main__":
    main()
