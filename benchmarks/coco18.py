"""The rows of the paper on the 18-class photos: one recipe, one seed, every row's epoch chosen on validation.

python benchmarks/coco18.py --labels single    (or partial; prepare with jobs/recipes/prepare_coco18.yaml first)

A comparison in this process, without Ray or MLflow: five trainings serve seven rows. One that is there already is
read, not repeated. jobs/compare.py does the same for any methods and seeds, side by side.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from paml.compare.grid import plan_grid
from paml.compare.settings import CompareSettings
from paml.compare.table import result_of
from paml.distributed.compare_run import run_compare

RECIPE = Path(__file__).resolve().parents[1] / "jobs" / "recipes" / "coco18.yaml"
TABLES = {"single": "labels/train-single.arrow", "partial": "labels/train.arrow"}
METHODS = {
    "full": {
        "loss.name": "full",
        "boost.train": 1,
        "data.train_labels": "labels/train-full.arrow",
        "rows": {"full labels": 1},
    },
    "an": {"loss.name": "an", "boost.train": 1, "rows": {"AN": 1, "AN + boost at inference": 5}},
    "an-boost": {"loss.name": "an", "boost.train": 5, "rows": {"AN + boost in training": 5}},
    "llr": {"loss.name": "ll-r", "boost.train": 1, "rows": {"LL-R": 1, "LL-R + boost at inference": 5}},
    "llr-boost": {"loss.name": "ll-r", "boost.train": 5, "rows": {"LL-R + BoostLU": 5}},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", choices=TABLES, default="single")
    parser.add_argument("--storage", default="runs/coco18")
    parser.add_argument("--frozen-layers", type=int, help="other than the recipe's; 0 trains end to end")
    parser.add_argument("--epochs", type=int, help="other than the recipe's")
    parser.add_argument("--image-size", type=int, help="pixels, other than those of the shards")
    parser.add_argument("--only", nargs="*", choices=METHODS, help="of the trainings; no gap and no difference then")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    changed = {
        "model.frozen_layers": options.frozen_layers,
        "epochs": options.epochs,
        "data.image_size": options.image_size,
    }
    rows = {"below": None, "above": None, "against": None} if options.only else {}
    settings = CompareSettings(
        base=str(RECIPE),
        common={"workers.num_workers": 0} | {name: value for name, value in changed.items() if value is not None},
        methods={name: METHODS[name] for name in options.only or METHODS},
        labels={options.labels: TABLES[options.labels]},
        storage=options.storage,
        published="coco",
        mlflow=False,
        at_once=0,
        **rows,
    )
    status = run_compare(settings)
    for each in plan_grid(settings, os.getcwd()).trainings.values():
        if each.method.startswith("llr") and status == 0:
            cells = [
                f"{f['rejection/rejected']:,.0f} ({f['rejection/precision']:.2f})" if f["rejection/rejected"] else "0"
                for f in result_of(each).history
            ]
            print(f"{each.method}: rejected by epoch (precision): {', '.join(cells)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
