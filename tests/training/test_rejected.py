"""The saved rejected labels: highest losses, a random sample, counts per class; also after a kill."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from paml.labels.states import POSITIVE, UNOBSERVED
from paml.training import rejected
from paml.training.data import open_data
from paml.training.rejected import NUM_HIGHEST_LOSS, NUM_SAMPLED, EpochRejections, load_rejected, sample_key
from paml.training.settings import TrainSettings
from tests.helpers.prepared import CLASSES, tiny_settings
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import run, uninterrupted_and_resumed

K = 7
NO_COUNTS = np.zeros((2, K), np.int64)


def labels(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unordered codes, and logits with many ties."""
    generator = np.random.default_rng(seed)
    return generator.permutation(10 * count)[:count], generator.integers(-20, 20, count).astype(np.float32) / 4


@pytest.mark.parametrize("parts", [1, 3, 50])
def test_the_selection_does_not_depend_on_the_steps(parts: int) -> None:
    codes, logits = labels(1000)
    rejections = EpochRejections(K, seed=3, epoch=2)
    for part in np.array_split(np.arange(1000), parts):
        rejections.add(codes[part], logits[part], NO_COUNTS)
    highest_loss = np.lexsort([codes, -logits])[:NUM_HIGHEST_LOSS]
    assert rejections.codes[rejections.highest_loss()].tolist() == codes[highest_loss].tolist()
    assert rejections.logits[rejections.highest_loss()].tolist() == logits[highest_loss].tolist()
    sampled = codes[np.argsort(sample_key(codes, rejections.salt))[:NUM_SAMPLED]]
    assert rejections.codes[rejections.random_sample()].tolist() == sampled.tolist()
    assert len(rejections.codes) == len(set(sampled) | set(codes[highest_loss]))


def test_the_sample_is_uniform() -> None:
    """Chi-square test with p < 1e-6 on 800 samples of 24 from 200 neighboring codes."""
    codes, times = np.arange(200), np.zeros(200)
    for epoch in range(800):
        rejections = EpochRejections(K, seed=0, epoch=epoch)
        rejections.add(codes, np.zeros(200, np.float32), NO_COUNTS)
        times[rejections.codes[rejections.random_sample()]] += 1
    expected = 800 * NUM_SAMPLED / 200
    assert ((times - expected) ** 2 / expected).sum() < 306


def test_sample_keys_are_the_same_in_torch_and_numpy() -> None:
    codes = np.array([0, 1, 5_000, 9_000_000 * 5_000, (1 << 62) + 1])
    keys = sample_key(codes, 123)
    assert keys.tolist() == sample_key(torch.from_numpy(codes), 123).tolist()
    assert (keys >= 0).all()
    assert len(set(keys.tolist())) == len(codes)


@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.5])
def test_the_candidates_of_a_gpu_give_the_same_selection(fraction: float) -> None:
    """Their number does not depend on the number of rejected labels."""
    generator = torch.Generator().manual_seed(1)
    from_all, from_candidates = (EpochRejections(K, seed=0, epoch=2) for _ in range(2))
    for step in range(20):
        logits = torch.randn(32, K, generator=generator)
        mask = torch.rand(32, K, generator=generator) < fraction
        false = torch.rand(32, K, generator=generator) < 0.5
        index = torch.arange(32) + 32 * step
        from_all.add_step(rejected.find_rejections(logits, mask, false, index, from_all.salt), index.numpy())
        candidates = rejected._candidates(logits, mask, false, index, from_candidates.salt)
        assert len(candidates.entries) == NUM_HIGHEST_LOSS + NUM_SAMPLED
        from_candidates.add_step(candidates, index.numpy())
    for name in ("codes", "logits", "by_class"):
        np.testing.assert_array_equal(getattr(from_all, name), getattr(from_candidates, name))
    assert bool(len(from_all.codes)) == bool(fraction)


def settings_of(prepared: Path, runs: Path, name: str) -> TrainSettings:
    return tiny_settings(
        prepared,
        runs / name,
        data={"train_truth": "labels/train-full.arrow"},
        checkpoint={"every_steps": 1},
        epochs=3,
        batch_size=12,  # validation is one batch, of which all workers have images, so they stop after the same step
    )


def files(settings: TrainSettings) -> dict[str, bytes]:
    folder = Path(settings.run.folder) / "rejected"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSettings, list[dict]]:
    settings = settings_of(prepared, tmp_path_factory.mktemp("uninterrupted"), "whole")
    result = run(settings)
    assert result is not None
    return settings, result.history


def test_counts_per_class_sum_to_those_of_the_epoch(uninterrupted: tuple[TrainSettings, list[dict]]) -> None:
    settings, history = uninterrupted
    folder = settings.run.folder
    assert load_rejected(folder, 1, settings.seed) is None  # the warm-up
    for metrics in history[1:]:
        saved = load_rejected(folder, int(metrics["epoch"]), settings.seed)
        assert saved is not None
        assert saved.by_class.sum(1).tolist() == [
            metrics["rejection/rejected"],
            metrics["rejection/rejected_false_negatives"],
        ]


def test_saved_labels_are_unobserved_and_their_truth_is_counted(
    uninterrupted: tuple[TrainSettings, list[dict]],
) -> None:
    settings, _ = uninterrupted
    train = open_data(settings.data).train
    assert train.truth is not None
    assert train.truth_rows is not None
    saved = load_rejected(settings.run.folder, 3, settings.seed)
    assert saved is not None
    true = np.zeros(len(CLASSES), np.int64)
    for image, cls in zip(*np.divmod(saved.codes, len(CLASSES)), strict=True):
        (position,) = np.flatnonzero(train.samples.index == image)
        observed, full = (
            train.table.lookup(train.samples.row[[position]]),
            train.truth.lookup(train.truth_rows[[position]]),
        )
        assert UNOBSERVED in (observed.state[observed.cls == cls].tolist() or [UNOBSERVED])
        true[cls] += full.state[full.cls == cls].tolist() == [POSITIVE]
    rejected_by_class = np.bincount(saved.codes % len(CLASSES), minlength=len(CLASSES))
    assert (rejected_by_class <= saved.by_class[0]).all()
    assert (true <= saved.by_class[1]).all()
    assert true.sum() > 0


@pytest.mark.parametrize("stop", [3, 6, 8])
def test_a_killed_run_saves_the_same_labels(
    stop: int, uninterrupted: tuple[TrainSettings, list[dict]], prepared: Path, tmp_path: Path
) -> None:
    settings = settings_of(prepared, tmp_path, "resumed")
    assert run(settings, stop_at=stop) is None
    assert run(settings) is not None
    assert files(settings) == files(uninterrupted[0])


def test_two_workers_save_the_same_labels_after_kills(prepared: Path, tmp_path: Path) -> None:
    whole, resumed = (settings_of(prepared, tmp_path, name) for name in ("whole", "resumed"))
    run_on_ranks(uninterrupted_and_resumed, 2, whole, resumed, [6, 1])  # twice in the second epoch
    assert files(whole) == files(resumed)
    assert sorted(files(whole)) == ["epoch-0002.safetensors", "epoch-0003.safetensors"]
    saved = load(files(whole)["epoch-0003.safetensors"])
    assert saved["by_class"][0].sum() >= len(saved["codes"]) > 0
