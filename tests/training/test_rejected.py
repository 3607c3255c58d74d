"""What is kept of the rejected labels: the strongest, an even sample, counts by class; whole after a kill, bounded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from paml.labels.states import POSITIVE, UNOBSERVED
from paml.training import rejected
from paml.training.data import open_data
from paml.training.rejected import DRAWN, STRONGEST, Rejected, add_found, kept_rejected, lot
from paml.training.settings import TrainSettings
from tests.helpers.prepared import CLASSES, tiny_settings
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import run, unbroken_and_resumed

K = 7
NOTHING = np.zeros((2, K), np.int64)


def labels(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Codes in any order, and logits with many ties."""
    draw = np.random.default_rng(seed)
    return draw.permutation(10 * count)[:count], draw.integers(-20, 20, count).astype(np.float32) / 4


@pytest.mark.parametrize("parts", [1, 3, 50])
def test_the_strongest_and_the_drawn_do_not_depend_on_the_steps(parts: int) -> None:
    codes, logits = labels(1000)
    kept = Rejected(K, seed=3, epoch=2)
    for some in np.array_split(np.arange(1000), parts):
        kept.add(codes[some], logits[some], NOTHING)
    strongest = np.lexsort([codes, -logits])[:STRONGEST]
    assert kept.codes[kept.strongest()].tolist() == codes[strongest].tolist()
    assert kept.logits[kept.strongest()].tolist() == logits[strongest].tolist()
    drawn = codes[np.argsort(lot(codes, kept.salt))[:DRAWN]]
    assert kept.codes[kept.drawn()].tolist() == drawn.tolist()
    assert len(kept.codes) == len(set(drawn) | set(codes[strongest]))


def test_every_label_is_drawn_as_often_as_any_other() -> None:
    """Chi-square of 800 epochs' draws of 24 from 200 labels of neighbouring images and classes; its bound is 1e-6."""
    codes, times = np.arange(200), np.zeros(200)
    for epoch in range(800):
        kept = Rejected(K, seed=0, epoch=epoch)
        kept.add(codes, np.zeros(200, np.float32), NOTHING)
        times[kept.codes[kept.drawn()]] += 1
    expected = 800 * DRAWN / 200
    assert ((times - expected) ** 2 / expected).sum() < 306


def test_lots_are_the_same_numbers_for_torch_and_numpy() -> None:
    codes = np.array([0, 1, 5_000, 9_000_000 * 5_000, (1 << 62) + 1])
    found = lot(codes, 123)
    assert found.tolist() == lot(torch.from_numpy(codes), 123).tolist()
    assert (found >= 0).all()
    assert len(set(found.tolist())) == len(codes)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_what_a_gpu_sends_home_is_enough(share: float) -> None:
    """Of shapes that do not depend on the labels, and yet the epoch keeps the same."""
    generator = torch.Generator().manual_seed(1)
    all_of, some_of = (Rejected(K, seed=0, epoch=2) for _ in range(2))
    for step in range(20):
        logits = torch.randn(32, K, generator=generator)
        mask = torch.rand(32, K, generator=generator) < share
        false = torch.rand(32, K, generator=generator) < 0.5
        index = torch.arange(32) + 32 * step
        add_found(all_of, rejected.find_rejected(logits, mask, false, index, all_of.salt), index.numpy())
        bounded = rejected._bounded(logits, mask, false, index, some_of.salt)
        assert len(bounded.places) == STRONGEST + DRAWN
        add_found(some_of, bounded, index.numpy())
    for name in ("codes", "logits", "by_class"):
        np.testing.assert_array_equal(getattr(all_of, name), getattr(some_of, name))
    assert bool(len(all_of.codes)) == bool(share)


def settings_of(prepared: Path, runs: Path, name: str) -> TrainSettings:
    return tiny_settings(
        prepared,
        runs / name,
        data={"train_truth": "labels/train-full.arrow"},
        checkpoint={"every_steps": 1},
        epochs=3,
        eval_batch_size=24,  # one batch of which all workers have some: they are stopped after the same step
    )


def files(settings: TrainSettings) -> dict[str, bytes]:
    folder = Path(settings.run.storage) / settings.run.name / "rejected"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def unbroken(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSettings, list[dict]]:
    settings = settings_of(prepared, tmp_path_factory.mktemp("unbroken"), "whole")
    result = run(settings)
    assert result is not None
    return settings, result.history


def test_counts_by_class_add_up_to_those_of_the_epoch(unbroken: tuple[TrainSettings, list[dict]]) -> None:
    settings, history = unbroken
    folder = f"{settings.run.storage}/{settings.run.name}"
    assert kept_rejected(folder, 1, settings.seed) is None  # the warm-up
    for figures in history[1:]:
        kept = kept_rejected(folder, int(figures["epoch"]), settings.seed)
        assert kept is not None
        found = kept.by_class.sum(1).tolist()
        assert found == [figures["rejection/rejected"], figures["rejection/rejected_false_negatives"]]


def test_what_is_kept_was_unobserved_and_counts_its_truth(unbroken: tuple[TrainSettings, list[dict]]) -> None:
    settings, _ = unbroken
    train = open_data(settings.data).train
    assert train.truth is not None
    assert train.truth_rows is not None
    kept = kept_rejected(f"{settings.run.storage}/{settings.run.name}", 3, settings.seed)
    assert kept is not None
    true = np.zeros(len(CLASSES), np.int64)
    for image, cls in zip(*np.divmod(kept.codes, len(CLASSES)), strict=True):
        (at,) = np.flatnonzero(train.samples.index == image)
        seen, full = train.table.lookup(train.samples.row[[at]]), train.truth.lookup(train.truth_rows[[at]])
        assert UNOBSERVED in (seen.state[seen.cls == cls].tolist() or [UNOBSERVED])
        true[cls] += full.state[full.cls == cls].tolist() == [POSITIVE]
    rejected_by_class = np.bincount(kept.codes % len(CLASSES), minlength=len(CLASSES))
    assert (rejected_by_class <= kept.by_class[0]).all()
    assert (true <= kept.by_class[1]).all()
    assert true.sum() > 0


@pytest.mark.parametrize("stop", [5, 8, 10])
def test_a_run_that_was_killed_keeps_the_same(
    stop: int, unbroken: tuple[TrainSettings, list[dict]], prepared: Path, tmp_path: Path
) -> None:
    settings = settings_of(prepared, tmp_path, "broken")
    assert run(settings, stop_at=stop) is None
    assert run(settings) is not None
    assert files(settings) == files(unbroken[0])


def test_two_workers_keep_the_same_after_kills(prepared: Path, tmp_path: Path) -> None:
    whole, broken = (settings_of(prepared, tmp_path, name) for name in ("whole", "broken"))
    run_on_ranks(unbroken_and_resumed, 2, whole, broken, [9, 2])  # within the second epoch, twice
    assert files(whole) == files(broken)
    assert sorted(files(whole)) == ["epoch-0002.safetensors", "epoch-0003.safetensors"]
    facts = load(files(whole)["epoch-0003.safetensors"])
    assert facts["by_class"][0].sum() >= len(facts["codes"]) > 0
