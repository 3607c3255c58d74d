"""The label audit on coco18: are the finds right, and does answering them make a better model?

python benchmarks/audit.py [--seeds 1] [--labels single] [--loss ll-r] [--train-from features.18] [--out …]

For each seed --loss is trained on partial labels (recipe coco18.yaml, averaged weights, every epoch kept, cached
features of --train-from). Its finds among the unobserved training labels are held to the full labels: precision of
the first 100, 1,000 and 3,000, beside cleanlab's multi-label issue finder on the same scores (pip install -e
'.[dev]'), whose issues are ranked by its label quality, the labels it flags first. Then the first 1,000 are answered
from the full labels, as a page's verdicts, merged into the label table, and the model is trained again; as a control
also with as many unobserved labels drawn at random (--control). What was trained already is read, not repeated.
Prepare with jobs/recipes/prepare_coco18.yaml first; $PAML_SHARED holds data/weights.
"""

import argparse
import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import yaml

from paml.audit.audit import Auditor, open_auditor
from paml.audit.best import Labels
from paml.audit.rank import choose, scale_of
from paml.audit.scoring import Observed, Scored, score_labels
from paml.compare.bootstrap import bootstrap_map, interval
from paml.data.device import features_as_float
from paml.data.loader import Batch
from paml.labels import LabelTable, apply_verdicts
from paml.labels.build import HEADER
from paml.labels.states import POSITIVE
from paml.metrics.pairs import read_pairs
from paml.spreadsheet import defused
from paml.training.data import RunData, eval_loader, open_data
from paml.training.features import with_features
from paml.training.loop import Result, Watcher, pairs_path, run_folder_of, train
from paml.training.settings import TrainSettings, flatten, unflatten
from paml.training.world import World

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "jobs" / "recipes" / "coco18.yaml"
TABLES = {"single": "train-single", "partial": "train"}
DEPTHS = (100, 1000, 3000)
ANSWERED = 1000
NOISE = 0.05


def own_root(data: Path, out: Path) -> Path:
    """A data root with the shards of `data` and tables of its own."""
    root = out / "data"
    (root / "labels").mkdir(parents=True, exist_ok=True)
    if not (root / "shards").exists():
        (root / "shards").symlink_to((data / "shards").resolve())
    for table in (data / "labels").glob("*.arrow"):
        if not (root / "labels" / table.name).exists():
            shutil.copy(table, root / "labels")
    return root


def trained(settings: TrainSettings) -> Result:
    """Train, or read what an earlier call trained."""
    folder = Path(run_folder_of(settings))
    if (folder / "result.json").exists():
        return Result.from_json(json.loads((folder / "result.json").read_text()))
    print(f"\n{settings.run.name}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"settings": flatten(settings)}))
    result = train(settings, World(), Watcher(say=lambda line: print(line, flush=True)))
    (folder / "result.json").write_text(json.dumps(result.to_json()))
    return result


def scored_by(auditor: Auditor, data: RunData, mirror: bool) -> Scored:
    """All labels of the training images, by the auditor's last checkpoint on the cached features."""
    features = data.train.features
    assert features is not None

    def mirrored(batch: Batch) -> torch.Tensor:
        return features_as_float(torch.from_numpy(features.mirrored[batch.index]), None)

    def plain(batch: Batch) -> torch.Tensor:
        return features_as_float(batch.images, None)

    return score_labels(
        auditor.models,
        eval_loader(dataclasses.replace(auditor.settings, eval_batch_size=250), data.train, data.image_size, World()),
        (plain, mirrored) if mirror else (plain,),
        alpha=auditor.alpha,
        num_classes=len(data.classes),
        keep=len(data.train.samples),
    )


def dense(scored: Scored, images: int) -> np.ndarray:
    """float64 [N, K]: every label's mean logit, by the image's place."""
    logits = np.empty((images, scored.num_classes))
    for labels in (scored.unobserved, scored.observed):
        logits[labels.place, labels.cls] = labels.score
    return logits


def states(table: LabelTable, keys: list[str]) -> np.ndarray:
    """int8 [N, K]: the state of every label, -1 where it is unobserved."""
    found = np.full((len(keys), table.num_classes), -1, np.int8)
    labels = table.lookup(table.rows_of(keys))
    found[labels.image, labels.cls] = labels.state
    return found


def cleanlab_orders(logits_NK: np.ndarray, states_NK: np.ndarray, among: np.ndarray) -> dict[str, np.ndarray]:
    """By way of cleanlab: places in the flat [N, K] of the labels `among` bool [N, K], the likeliest issue first.

    cleanlab knows no unobserved label: what is not listed is absent, which is what is being doubted here.
    """
    from cleanlab.multilabel_classification import filter as issues
    from cleanlab.multilabel_classification.rank import get_label_quality_scores_per_class

    listed = [np.flatnonzero(row == POSITIVE).tolist() for row in states_NK]
    chances = 1 / (1 + np.exp(-logits_NK))
    flagged = np.asarray(issues.find_multilabel_issues_per_class(listed, chances, n_jobs=1))
    orders = {}
    for name, options in {
        "self confidence (its default)": {"method": "self_confidence"},
        "normalized margin": {"method": "normalized_margin"},
        "self confidence, adjusted by class": {"method": "self_confidence", "adjust_pred_probs": True},
    }.items():
        quality = np.asarray(get_label_quality_scores_per_class(listed, chances, **options))
        order = np.lexsort((quality.ravel(), ~flagged.ravel()))
        orders[name] = order[among.ravel()[order]]
    return orders


def write_answers(path: Path, keys: list[str], mids: tuple[str, ...], pairs: np.ndarray, truth_NK: np.ndarray) -> str:
    """Verdicts from the full labels on pairs (places in the flat [N, K]), as the page writes them."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for image, cls in zip(*np.unravel_index(pairs, truth_NK.shape), strict=True):
            state = int(truth_NK[image, cls] == POSITIVE)
            writer.writerow((defused(keys[image]), "verification", defused(mids[cls]), state))
    return str(path)


def wrong_observed(table: LabelTable, keys: list[str], logits_NK: np.ndarray, seed: int) -> None:
    """Flip NOISE of a table's observed labels and print how many of the first finds among them are flipped ones.

    The logits are of a model that did not learn from the flipped table.
    """
    states_NK = states(table, keys)
    image, cls = np.nonzero(states_NK >= 0)
    flipped = np.random.default_rng(seed).random(len(cls)) < NOISE
    states_NK[image[flipped], cls[flipped]] = 1 - states_NK[image[flipped], cls[flipped]]
    score = logits_NK[image, cls].astype(np.float32)
    observed = Observed(image, cls.astype(np.int32), states_NK[image, cls] == POSITIVE, score)
    none = Labels(*(np.empty(0, kind) for kind in (np.int64, np.int32, np.float32)))
    scored = Scored(len(keys), table.num_classes, none, observed, np.zeros((1, 1), np.int64))
    finds = choose(scored, scale_of(scored), 0, len(cls))
    wrong_NK = np.zeros(states_NK.shape, bool)
    wrong_NK[image, cls] = flipped
    orders = {"paml": finds.place * table.num_classes + finds.cls}
    found = cleanlab_orders(logits_NK, states_NK, among=states_NK >= 0)
    orders |= {f"cleanlab, {name}": order for name, order in found.items()}
    depths = (100, 300, int(flipped.sum()))
    print(f"\n{flipped.sum():,} of {len(cls):,} observed labels flipped; share of flipped ones, %, among the first")
    for name, order in orders.items():
        print(f"| {name} | {' | '.join(f'{100 * wrong_NK.ravel()[order][:k].mean():.2f} ({k:,})' for k in depths)} |")


def gain_interval(before: TrainSettings, after: TrainSettings, alpha: str) -> tuple[float, float]:
    """95 % of the paired bootstrap over the test images, of the difference in mAP, in points."""
    found = []
    for settings in (before, after):
        pairs, facts = read_pairs(pairs_path(run_folder_of(settings), alpha))
        images = np.unique(pairs.image.numpy())
        found.append(
            bootstrap_map(pairs, int(facts["num_classes"]), images, replicates=1000, seed=0, settings=settings.metrics)
        )
    low, high = interval(found[1] - found[0], 0.95)
    return 100 * low, 100 * high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--labels", choices=TABLES, default="single")
    parser.add_argument("--loss", default="ll-r", help="that trains: ll-r, an, ...")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--train-from", default="features.18")
    parser.add_argument("--no-training", action="store_true", help="precision alone")
    parser.add_argument("--control", action="store_true", help="also with labels drawn at random")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "coco18", help="the prepared folder")
    parser.add_argument("--features", type=Path, help="folder of cached features; default: below --out")
    parser.add_argument("--out", type=Path, default=Path("runs/audit-benchmark"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shared = Path(os.environ.get("PAML_SHARED", ROOT.parent / "shared")) / "data"
    root, table_name = own_root(options.data, options.out), TABLES[options.labels]
    common = flatten(yaml.safe_load(RECIPE.read_text())) | {
        "run.storage": str(options.out),
        "run.mlflow": False,
        "data.root": str(root),
        "data.features_dir": str(options.features or options.out / "features"),
        "data.image_size": options.image_size,
        "model.weights": str(shared / "weights" / "mobilenet_v2_imagenet_features.pth"),
        "model.frozen_layers": 0,
        "model.train_from": options.train_from,
        "boost.train": 1.0,
        "loss.name": options.loss,
        "optimiser.average": 0.99,
        "checkpoint.keep": None,
        "workers.num_workers": 0,
        "epochs": options.epochs,
    }

    def settings_of(name: str, table: str, seed: int) -> TrainSettings:
        own = {
            "run.name": f"{name}-{options.labels}-{seed}",
            "data.train_labels": f"labels/{table}.arrow",
            "seed": seed,
        }
        return unflatten(TrainSettings, common | own)

    gains: list[dict[str, float]] = []
    for seed in range(options.seeds):
        before_settings = settings_of("before", table_name, seed)
        before = trained(before_settings)
        auditor = open_auditor(run_folder_of(before_settings), 1)
        data = open_data(before_settings.data)
        data = with_features(
            before_settings, data, auditor.models[-1], World(), say=print, bar=lambda *_: Watcher().bar("", 0)
        )
        keys = data.train.manifest.keys().to_pylist()
        truth = data.train.truth
        assert truth is not None
        truth_NK, states_NK = states(truth, keys), states(data.train.table, keys)
        unobserved = np.flatnonzero(states_NK.ravel() < 0)
        orders, flat_finds = {}, unobserved
        for view in ("one view", "mirrored too"):
            scored = scored_by(auditor, data, mirror=view == "mirrored too")
            logits_NK = dense(scored, len(keys))
            np.save(options.out / f"logits-{options.labels}-{seed}-{view.split()[0]}.npy", logits_NK)
            finds = choose(scored, scale_of(scored), max(DEPTHS), 0)
            flat_finds = finds.place * len(data.classes) + finds.cls
            orders[f"paml, {view}"] = flat_finds
            plain = unobserved[np.argsort(-logits_NK.ravel()[unobserved], kind="stable")]
            orders[f"paml without the class's scale, {view}"] = plain
            found = cleanlab_orders(logits_NK, states_NK, among=states_NK < 0)
            orders |= {f"cleanlab, {name}, {view}": order for name, order in found.items()}
        print(
            f"\nseed {seed}, {options.labels}: {len(unobserved):,} unobserved labels, "
            f"{int((truth_NK.ravel()[unobserved] == POSITIVE).sum()):,} of them positive\n\n"
            f"| precision, % | {' | '.join(f'{k:,}' for k in DEPTHS)} |\n|---|{'---|' * len(DEPTHS)}"
        )
        for name, order in orders.items():
            right = truth_NK.ravel()[order] == POSITIVE
            print(f"| {name} | {' | '.join(f'{100 * right[:k].mean():.2f}' for k in DEPTHS)} |", flush=True)
        wrong_observed(LabelTable.open(root / "labels" / "train.arrow"), keys, dense(scored, len(keys)), seed)
        if options.no_training:
            continue
        drawn = np.random.default_rng(seed).choice(unobserved, ANSWERED, replace=False)
        scores = {"before": before}
        for name, pairs in {"audited": flat_finds[:ANSWERED], "random": drawn}.items():
            if name == "random" and not options.control:
                continue
            answers = write_answers(
                options.out / f"{name}-{options.labels}-{seed}.csv", keys, data.classes, pairs, truth_NK
            )
            table = f"{table_name}-{name}-{seed}"
            if not (root / "labels" / f"{table}.arrow").exists():
                print(apply_verdicts(data.train.table, [answers], str(root / "labels" / f"{table}.arrow")))
            after_settings = settings_of(name, table, seed)
            scores[name] = trained(after_settings)
            low, high = gain_interval(before_settings, after_settings, f"{auditor.alpha:g}")
            print(f"{name}: the gain lies between {low:+.2f} and {high:+.2f} (95 %, bootstrap over the test images)")
        gains.append({name: 100 * result.test[f"{auditor.alpha:g}"].map for name, result in scores.items()})
    if gains:
        print(f"\n| test mAP, seed | {' | '.join(gains[0])} |\n|---|{'---|' * len(gains[0])}")
        for seed, row in enumerate(gains):
            print(f"| {seed} | {' | '.join(f'{value:.2f}' for value in row.values())} |")
        for name in list(gains[0])[1:]:
            gain = [row[name] - row["before"] for row in gains]
            print(f"{name}: {np.mean(gain):+.2f} points of mAP ({', '.join(f'{value:+.2f}' for value in gain)})")


if __name__ == "__main__":
    main()
