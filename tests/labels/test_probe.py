"""The probe hides a fixed fraction of labels that depends only on (key, class, seed)."""

from pathlib import Path

import numpy as np
import pytest

from paml.labels import LabelError, LabelTable, is_probe, split_probe, table_from_triples
from paml.labels.hashing import hash_keys, hash_pairs, mix64

CLASSES = [f"/m/{number}" for number in range(20)]


def make(folder: Path, keys: list[str], name: str = "t") -> LabelTable:
    image, cls = (axis.reshape(-1) for axis in np.indices((len(keys), 20)))
    return table_from_triples(keys, CLASSES, None, image, cls, (image + cls) % 2, str(folder / name))


def probe_mask(table: LabelTable, rows: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    labels = table.lookup(rows)
    return is_probe(table.key_hashes(rows)[labels.image], labels.cls, fraction, seed)


@pytest.fixture
def table(tmp_path: Path) -> LabelTable:
    return make(tmp_path, [f"{value:016x}" for value in range(3000)])


def test_hidden_fraction_of_each_class_and_state(table: LabelTable) -> None:
    rows = np.arange(table.num_images)
    triples = table.lookup(rows)
    hidden = probe_mask(table, rows, 0.05, seed=1)
    for chosen in (triples.state == 0, triples.state == 1, triples.cls == 0, triples.cls == 19, triples.image < 1000):
        expected, n = 0.05, chosen.sum()
        assert abs(hidden[chosen].mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / n)


def test_visible_and_hidden_labels_are_a_partition(table: LabelTable) -> None:
    rows = np.array([7, 3, 2999, 7])
    triples = table.lookup(rows)
    visible, hidden = split_probe(triples, rows, table, 0.3, seed=2)
    both = sorted(zip(*(np.concatenate(pair) for pair in zip(visible, hidden, strict=True)), strict=True))
    assert both == sorted(zip(*triples, strict=True))
    assert len(hidden.image) > 0
    first = {(c, s) for i, c, s in zip(*hidden, strict=True) if i == 0}
    assert first == {(c, s) for i, c, s in zip(*hidden, strict=True) if i == 3}


def test_membership_depends_only_on_key_class_and_seed(table: LabelTable, tmp_path: Path) -> None:
    key = table.keys([2500])[0]
    mask = probe_mask(table, np.array([2500]), 0.5, seed=9)
    # The same image in a table with other images and text keys.
    other = make(tmp_path, ["a photo", key, "zebra"], "other")
    assert not other.has_hex_keys
    np.testing.assert_array_equal(probe_mask(other, other.rows_of([key]), 0.5, seed=9), mask)
    assert (probe_mask(table, np.array([2500]), 0.5, seed=10) != mask).any()


def test_larger_fraction_hides_a_superset(table: LabelTable) -> None:
    rows = np.arange(100)
    small, large = (probe_mask(table, rows, fraction, seed=0) for fraction in (0.1, 0.4))
    assert (large | ~small).all()
    assert large.sum() > small.sum()
    assert not probe_mask(table, rows, 0.0, seed=0).any()
    assert probe_mask(table, rows, 1.0, seed=0).all()
    visible, hidden = split_probe(table.lookup(rows), rows, table, 0.0, seed=0)
    assert len(visible.image) == 2000
    assert len(hidden.image) == 0


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_fraction_outside_0_to_1(fraction: float) -> None:
    with pytest.raises(LabelError, match=r"fraction is .*, allowed is 0 to 1"):
        is_probe(np.zeros(1, np.uint64), np.zeros(1, np.int32), fraction, 0)


def test_hashes_are_stable() -> None:
    # SplitMix64 from state 0 (Steele et al.; the reference code's first output).
    assert mix64(np.array([0], np.uint64))[0] == 0xE220A8397B1DCDAF
    keys = ["000000000000002a", "photo 7", "a name longer than eight bytes", "é"]
    hashes = hash_keys(keys)
    assert len(set(hashes.tolist())) == 4
    assert hashes[0] == mix64(np.array([42], np.uint64))[0]
    np.testing.assert_array_equal(hash_keys(keys[::-1]), hashes[::-1])
    assert hash_keys(["photo"])[0] != hash_keys(["photo\0"])[0]
    assert hash_pairs(hashes[:1], np.array([1]), 0) != hash_pairs(hashes[:1], np.array([1]), 1)
