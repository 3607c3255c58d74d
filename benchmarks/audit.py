"""Label audit on coco18: precision of the listed issues, and the gain from training on the corrected labels.

    python benchmarks/audit.py [--seeds 1] [--labels single] [--loss ll-r] [--train-from features.18] [--out …]

For each seed, --loss is trained on partial labels (recipe coco18.yaml with EMA weights, a checkpoint per epoch and
cached features of --train-from). The issues among its unobserved training labels are compared with the full labels:
precision of the first 100, 1,000 and 3,000, next to cleanlab's multi-label issues for the same scores, flagged labels
first, ordered by label quality. Then the first 1,000 are answered from the full labels as verdicts, merged into the
label table, and the model is trained again; with --control also with 1,000 random unobserved labels. Finished runs are
reused. Prepare the data with paml/recipes/prepare_coco18.yaml; $PAML_SHARED contains data/weights. Needs `.[dev]`.
"""

import argparse
import csv
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import yaml

from paml.audit.evidence import open_checkpoints
from paml.audit.rank import fit_class_scale, rank_issues
from paml.audit.scoring import ScoredLabels, SplitScores, score_labels
from paml.compare.bootstrap import bootstrap_map, interval
from paml.data.device import features_as_float
from paml.data.loader import Batch
from paml.labels import LabelTable, apply_verdicts
from paml.labels.rejects import HEADER
from paml.labels.states import POSITIVE
from paml.metrics.pairs import read_pairs
from paml.runs.folder import Run, pairs_path
from paml.runs.spec import OpenRun
from paml.runs.train import train
from paml.settings import flatten, unflatten
from paml.spreadsheet import escape_formula
from paml.training.data import RunData, eval_loader, open_data
from paml.training.features import with_features
from paml.training.hooks import RunHooks, terminal_progress
from paml.training.settings import TrainSettings
from paml.training.world import World

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "paml" / "recipes" / "coco18.yaml"
TABLES = {"single": "train-single", "partial": "train"}
DEPTHS = (100, 1000, 3000)
ANSWERED = 1000
FLIPPED_FRACTION = 0.05


def link_data(data: Path, out: Path) -> Path:
    """A data folder with links to the shards of `data` and copies of its label tables."""
    root = out / "data"
    (root / "labels").mkdir(parents=True, exist_ok=True)
    if not (root / "shards").exists():
        (root / "shards").symlink_to((data / "shards").resolve())
    for table in (data / "labels").glob("*.arrow"):
        if not (root / "labels" / table.name).exists():
            shutil.copy(table, root / "labels")
    return root


def train_or_open(settings: TrainSettings) -> Run:
    if (Path(settings.run.folder) / "result.json").exists():
        return Run.open(settings.run.folder)
    print(f"\n{settings.run.name}", flush=True)
    return train(settings)


def score_train_split(run: OpenRun, data: RunData, mirror: bool) -> SplitScores:
    """Scores of all labels of the training images, from the cached features."""
    features = data.train.features
    assert features is not None

    def mirrored(batch: Batch) -> torch.Tensor:
        return run.model.maps(features_as_float(torch.from_numpy(features.mirrored[batch.index]), None)).float()

    def plain(batch: Batch) -> torch.Tensor:
        return run.model.maps(features_as_float(batch.images, None)).float()

    return score_labels(
        (plain, mirrored) if mirror else (plain,),
        eval_loader(run.settings.data, data.train, data.image_size, World(), batch_size=250),
        alpha=run.alpha,
        num_classes=len(data.classes),
        per_class=len(data.train.samples),
    )


def dense_logits(scores: SplitScores, images: int) -> np.ndarray:
    """float64 [N, K]."""
    logits = np.empty((images, scores.num_classes))
    for labels in (scores.unobserved, scores.observed):
        logits[labels.image, labels.cls] = labels.score
    return logits


def dense_states(table: LabelTable, keys: list[str]) -> np.ndarray:
    """int8 [N, K]: label states, -1 for unobserved."""
    states = np.full((len(keys), table.num_classes), -1, np.int8)
    labels = table.lookup(table.rows_of(keys))
    states[labels.image, labels.cls] = labels.state
    return states


def cleanlab_rankings(logits_NK: np.ndarray, states_NK: np.ndarray, among: np.ndarray) -> dict[str, np.ndarray]:
    """By method: positions in the flattened [N, K] of the labels `among` bool [N, K], the most likely issue first.

    cleanlab has no unobserved labels: they are passed as negatives, which is what the audit questions.
    """
    from cleanlab.multilabel_classification import filter as issues
    from cleanlab.multilabel_classification.rank import get_label_quality_scores_per_class

    positives = [np.flatnonzero(row == POSITIVE).tolist() for row in states_NK]
    probabilities = 1 / (1 + np.exp(-logits_NK))
    flagged = np.asarray(issues.find_multilabel_issues_per_class(positives, probabilities, n_jobs=1))
    rankings = {}
    for name, options in {
        "self confidence (default)": {"method": "self_confidence"},
        "normalized margin": {"method": "normalized_margin"},
        "self confidence, adjusted by class": {"method": "self_confidence", "adjust_pred_probs": True},
    }.items():
        quality = np.asarray(get_label_quality_scores_per_class(positives, probabilities, **options))
        order = np.lexsort((quality.ravel(), ~flagged.ravel()))
        rankings[f"cleanlab, {name}"] = order[among.ravel()[order]]
    return rankings


def write_verdicts(path: Path, keys: list[str], mids: tuple[str, ...], pairs: np.ndarray, truth_NK: np.ndarray) -> str:
    """Answer pairs (positions in the flattened [N, K]) from the full labels, in the format of the review page."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for image, cls in zip(*np.unravel_index(pairs, truth_NK.shape), strict=True):
            state = int(truth_NK[image, cls] == POSITIVE)
            writer.writerow((escape_formula(keys[image]), "verification", escape_formula(mids[cls]), state))
    return str(path)


def audit_flipped_labels(table: LabelTable, keys: list[str], logits_NK: np.ndarray, seed: int) -> None:
    """Flip FLIPPED_FRACTION of a table's observed labels and print the precision of the issues among them.

    The logits are of a model that was not trained on the flipped labels.
    """
    states_NK = dense_states(table, keys)
    image, cls = np.nonzero(states_NK >= 0)
    flipped = np.random.default_rng(seed).random(len(cls)) < FLIPPED_FRACTION
    states_NK[image[flipped], cls[flipped]] = 1 - states_NK[image[flipped], cls[flipped]]
    logits = logits_NK[image, cls].astype(np.float32)
    observed = ScoredLabels(image, cls.astype(np.int32), logits, states_NK[image, cls])
    none = ScoredLabels(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int8))
    scores = SplitScores(len(keys), table.num_classes, none, observed)
    issues = rank_issues(scores, fit_class_scale(scores), 0, len(cls))
    wrong_NK = np.zeros(states_NK.shape, bool)
    wrong_NK[image, cls] = flipped
    rankings = {"paml": issues.image * table.num_classes + issues.cls}
    rankings |= cleanlab_rankings(logits_NK, states_NK, among=states_NK >= 0)
    print(f"\n{flipped.sum():,} of {len(cls):,} observed labels flipped; precision in % of the first N")
    for name, order in rankings.items():
        depths = (100, 300, int(flipped.sum()))
        print(f"| {name} | {' | '.join(f'{100 * wrong_NK.ravel()[order][:k].mean():.2f} ({k:,})' for k in depths)} |")


def gain_interval(before: TrainSettings, after: TrainSettings, alpha: str) -> tuple[float, float]:
    """95 % interval of the difference in test mAP, in points, by paired bootstrap over the images."""
    maps = []
    for settings in (before, after):
        pairs, metadata = read_pairs(pairs_path(settings.run.folder, alpha))
        images, num_classes = np.unique(pairs.image.numpy()), int(metadata["num_classes"])
        maps.append(bootstrap_map(pairs, num_classes, images, replicates=1000, seed=0, settings=settings.metrics))
    low, high = interval(maps[1] - maps[0], 0.95)
    return 100 * low, 100 * high


class Benchmark:
    """Settings shared by the runs of the benchmark, and its steps for one seed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.root = options, link_data(options.data, options.out)
        shared = Path(os.environ.get("PAML_SHARED", ROOT.parent / "shared")) / "data"
        self.common = flatten(yaml.safe_load(RECIPE.read_text())) | {
            "run.storage": str(options.out),
            "run.trackers": [],
            "data.root": str(self.root),
            "data.features_dir": str(options.features or options.out / "features"),
            "data.image_size": options.image_size,
            "model.weights": str(shared / "weights" / "mobilenet_v2_imagenet_features.pth"),
            "model.frozen_layers": 0,
            "model.train_from": options.train_from,
            "boost.train": 1.0,
            "loss.name": options.loss,
            "optimizer.ema_decay": 0.99,
            "checkpoint.keep": None,
            "epochs": options.epochs,
        }

    def settings(self, name: str, table: str, seed: int) -> TrainSettings:
        labels = f"labels/{table}.arrow"
        changes = {"run.name": f"{name}-{self.options.labels}-{seed}", "data.train_labels": labels, "seed": seed}
        return unflatten(TrainSettings, self.common | changes)

    def run(self, seed: int) -> dict[str, float]:
        """Print the precision of the issues; returns the test mAP before and after training on corrected labels."""
        options, table_name = self.options, TABLES[self.options.labels]
        settings = self.settings("before", table_name, seed)
        runs = {"before": train_or_open(settings)}
        (opened,) = open_checkpoints(settings.run.folder, 1)
        opened.model.on_features = True
        data = open_data(settings.data)
        data = with_features(settings, data, opened.model, World(), RunHooks(progress=terminal_progress))
        keys, truth = data.train.manifest.keys().to_pylist(), data.train.truth
        assert truth is not None
        truth_NK = dense_states(truth, keys)
        issues, unobserved, logits_NK = self.print_precision(opened, data, keys, truth_NK, seed)
        audit_flipped_labels(LabelTable.open(self.root / "labels" / "train.arrow"), keys, logits_NK, seed)
        if options.no_training:
            return {}
        answered = {"audited": issues[:ANSWERED]}
        if options.control:
            answered["random"] = np.random.default_rng(seed).choice(unobserved, ANSWERED, replace=False)
        for name, pairs in answered.items():
            path = options.out / f"{name}-{options.labels}-{seed}.csv"
            verdicts, table = write_verdicts(path, keys, data.classes, pairs, truth_NK), f"{table_name}-{name}-{seed}"
            if not (self.root / "labels" / f"{table}.arrow").exists():
                print(apply_verdicts(data.train.table, [verdicts], str(self.root / "labels" / f"{table}.arrow")))
            after = self.settings(name, table, seed)
            runs[name] = train_or_open(after)
            low, high = gain_interval(settings, after, f"{opened.alpha:g}")
            print(f"{name}: gain between {low:+.2f} and {high:+.2f} points (95 %, bootstrap over the test images)")
        return {name: 100 * run.scores[opened.alpha].map for name, run in runs.items()}

    def print_precision(
        self, opened: OpenRun, data: RunData, keys: list[str], truth_NK: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(issues and unobserved labels as positions in the flattened [N, K], logits_NK) of scoring with both views."""
        states_NK = dense_states(data.train.table, keys)
        unobserved = np.flatnonzero(states_NK.ravel() < 0)
        rankings: dict[str, np.ndarray] = {}
        issues, logits_NK = unobserved, np.empty(0)
        for view in ("one view", "with mirror images"):
            scores = score_train_split(opened, data, mirror=view != "one view")
            logits_NK = dense_logits(scores, len(keys))
            ranked = rank_issues(scores, fit_class_scale(scores), max(DEPTHS), 0)
            issues = ranked.image * len(data.classes) + ranked.cls
            rankings[f"paml, {view}"] = issues
            by_logit = unobserved[np.argsort(-logits_NK.ravel()[unobserved], kind="stable")]
            rankings[f"paml without class scale, {view}"] = by_logit
            cleanlab = cleanlab_rankings(logits_NK, states_NK, among=states_NK < 0)
            rankings |= {f"{name}, {view}": order for name, order in cleanlab.items()}
        positives = int((truth_NK.ravel()[unobserved] == POSITIVE).sum())
        print(
            f"\nseed {seed}, {self.options.labels}: {len(unobserved):,} unobserved labels, {positives:,} positive\n\n"
            f"| precision, % | {' | '.join(f'{k:,}' for k in DEPTHS)} |\n|---|{'---|' * len(DEPTHS)}"
        )
        for name, order in rankings.items():
            correct = truth_NK.ravel()[order] == POSITIVE
            print(f"| {name} | {' | '.join(f'{100 * correct[:k].mean():.2f}' for k in DEPTHS)} |", flush=True)
        return issues, unobserved, logits_NK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--labels", choices=TABLES, default="single")
    parser.add_argument("--loss", default="ll-r", help="training loss: ll-r, an, ...")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--train-from", default="features.18")
    parser.add_argument("--no-training", action="store_true", help="measure precision only")
    parser.add_argument("--control", action="store_true", help="also train with random labels answered")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "coco18", help="prepared data folder")
    parser.add_argument("--features", type=Path, help="folder of cached features; default: in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/audit-benchmark"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    benchmark = Benchmark(options)
    scores = [row for seed in range(options.seeds) if (row := benchmark.run(seed))]
    if scores:
        print(f"\n| test mAP, seed | {' | '.join(scores[0])} |\n|---|{'---|' * len(scores[0])}")
        for seed, row in enumerate(scores):
            print(f"| {seed} | {' | '.join(f'{value:.2f}' for value in row.values())} |")
        for name in list(scores[0])[1:]:
            gains = [row[name] - row["before"] for row in scores]
            print(f"{name}: {np.mean(gains):+.2f} points of mAP ({', '.join(f'{gain:+.2f}' for gain in gains)})")


if __name__ == "__main__":
    main()
