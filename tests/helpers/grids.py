"""Tiny comparisons, in this process unless a test asks for Ray."""

from pathlib import Path
from typing import Any

from paml.compare.settings import CompareSettings
from paml.settings import flatten
from tests.helpers.prepared import tiny_settings

METHODS: dict[str, dict[str, Any]] = {
    "full labels": {"loss.name": "full", "boost.train": 1, "data.train_labels": "labels/train-full.arrow"},
    "an": {"loss.name": "an", "boost.train": 1, "rows": {"AN": 1, "AN + boost at inference": 5}},
    "LL-R + BoostLU": {"loss.name": "ll-r", "boost.train": 5},
}


def tiny_base(root: Path) -> dict[str, Any]:
    """Settings of a run of seconds by dotted name, with the truth of the training labels."""
    settings = tiny_settings(root, root, data={"train_truth": "labels/train-full.arrow"})
    return {name: value for name, value in flatten(settings).items() if not name.startswith("run.")}


def tiny_grid(root: Path, storage: Path, **changes: Any) -> CompareSettings:
    """Three methods, four rows, one seed, in this process."""
    given: dict[str, Any] = {
        "base": tiny_base(root),
        "methods": METHODS,
        "storage": str(storage),
        "labels": {"partial": "labels/train.arrow"},
        "replicates": 20,
        "trackers": [],
        "max_concurrent": 0,
    }
    return CompareSettings(**given | changes)
