import io

import numpy as np
import pytest
from PIL import Image

from paml.tracking import Journal, read_journal
from paml.tracking.figures import rejected_by_epoch_figure, rejection_history

TRUTH = [
    {"epoch": epoch, "rejected": 1e3 * epoch, "rejected_false_negatives": 600 * epoch, "precision": 0.6}
    for epoch in range(1, 8)
]
PROBE = [
    {"epoch": epoch, "rejected": 1e3 * epoch, "probe_recall": 0.4, "probe_false_rejection": 0.01}
    for epoch in range(1, 8)
]


def colours(path):
    pixels = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")).reshape(-1, 3)
    return {tuple(int(value) for value in row) for row in np.unique(pixels, axis=0)}


@pytest.mark.parametrize(("history", "true"), [(TRUTH, True), (PROBE, False)])
def test_the_figure_shows_what_is_known(tmp_path, history, true):
    path = tmp_path / "rejected.png"
    rejected_by_epoch_figure(history, str(path))
    drawn = colours(path)
    assert (158, 202, 225) in drawn
    assert ((8, 81, 156) in drawn) == true
    assert (217, 72, 1) in drawn


def test_a_gap_or_one_epoch_is_drawn_and_none_is_an_error(tmp_path):
    path = tmp_path / "rejected.png"
    rejected_by_epoch_figure([{"epoch": 1, "rejected": 0.0, "precision": float("nan")}], str(path))
    assert path.stat().st_size > 1000
    with pytest.raises(ValueError, match="no epoch"):
        rejected_by_epoch_figure([], str(path))


def test_the_history_comes_from_the_journal(run_folder):
    journal = Journal(run_folder, "rank0")
    for epoch in (2, 1):
        journal.metrics({"rejection/rejected": 5 * epoch, "train/loss": 1, "rejection/precision": 0.5}, epoch)
    assert rejection_history(read_journal(run_folder)) == [
        {"epoch": 1, "rejected": 5, "precision": 0.5},
        {"epoch": 2, "rejected": 10, "precision": 0.5},
    ]
