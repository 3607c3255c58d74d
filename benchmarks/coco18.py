"""The rows of the paper's main table on COCO-18: five trainings with one seed, scored as seven rows.

paml prepare --config prepare_coco18
python benchmarks/coco18.py --labels single    (or partial)

A comparison in this process, without Ray and trackers. Finished runs are reused. `paml compare` does the same for any
methods and seeds, in parallel.
"""

import argparse
import os
import sys

import torch

from paml.compare.grid import plan_grid
from paml.compare.settings import CompareSettings
from paml.distributed.compare import run_compare
from paml.runs.folder import read_result

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
    parser.add_argument("--frozen-layers", type=int, help="default: the recipe's; 0 trains all layers")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--image-size", type=int, help="pixels; default: the size of the stored images")
    parser.add_argument("--only", nargs="*", choices=METHODS, help="train only these; the tables then have no gap")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    changes = {
        "model.frozen_layers": options.frozen_layers,
        "epochs": options.epochs,
        "data.image_size": options.image_size,
    }
    references = {"baseline_row": None, "upper_bound_row": None, "compare_to": None} if options.only else {}
    settings = CompareSettings(
        base="coco18",
        common={"workers.num_workers": 0} | {name: value for name, value in changes.items() if value is not None},
        methods={name: METHODS[name] for name in options.only or METHODS},
        labels={options.labels: TABLES[options.labels]},
        storage=options.storage,
        published="coco",
        trackers=[],
        max_concurrent=0,
        **references,
    )
    status = run_compare(settings)
    for training in plan_grid(settings, os.getcwd()).trainings.values():
        if training.method.startswith("llr") and status == 0:
            cells = [
                f"{m['rejection/rejected']:,.0f} ({m['rejection/precision']:.2f})" if m["rejection/rejected"] else "0"
                for m in read_result(training.folder).history
            ]
            print(f"{training.method}: rejected labels by epoch (precision): {', '.join(cells)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
