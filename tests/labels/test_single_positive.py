"""The single-positive protocol: equal to the output of the released script, and its properties."""

from pathlib import Path

import numpy as np
import pytest

from paml.labels import LabelTable, observe_single_positive, single_positive, table_from_triples
from tests.helpers.shared import shared


@pytest.mark.parametrize("split", ["train", "val"])
def test_equals_the_released_script(split: str) -> None:
    golden = np.load(shared("golden", "single_positive_seed1200.npz"))
    observed = single_positive(golden[f"{split}_full"], seed=1200)
    np.testing.assert_array_equal(observed, golden[f"{split}_observed"] == 1)


def full_table(folder: Path, num_images: int = 400, keys: list[str] | None = None) -> LabelTable:
    rng = np.random.default_rng(5)
    full = rng.random((num_images, 12)) < 0.3
    full[::7] = False
    image, cls = (axis.reshape(-1) for axis in np.indices(full.shape))
    keys = keys or [f"{value:016x}" for value in rng.integers(0, 2**63, num_images)]
    classes = [f"/m/{number}" for number in range(12)]
    return table_from_triples(keys, classes, None, image, cls, full.reshape(-1), str(folder / "full"))


@pytest.mark.parametrize("protocol", ["hash", "released"])
def test_exactly_one_positive_per_image(protocol: str, tmp_path: Path) -> None:
    full = full_table(tmp_path)
    observed = observe_single_positive(full, str(tmp_path / "single"), seed=3, protocol=protocol)
    assert observed.keys() == full.keys()
    rows = np.arange(full.num_images)
    truth, seen = full.lookup(rows), observed.lookup(rows)
    positives = np.bincount(truth.image[truth.state == 1], minlength=len(rows))
    np.testing.assert_array_equal(observed.label_counts(rows), positives > 0)
    assert (seen.state == 1).all()
    true_pairs = set(zip(truth.image[truth.state == 1], truth.cls[truth.state == 1], strict=True))
    assert set(zip(seen.image, seen.cls, strict=True)) <= true_pairs
    other = observe_single_positive(full, str(tmp_path / "other"), seed=4, protocol=protocol)
    assert other.digest != observed.digest
    again = observe_single_positive(full, str(tmp_path / "again"), seed=3, protocol=protocol)
    assert again.digest == observed.digest
    assert again.metadata["single_positive"] == {"seed": 3, "protocol": protocol, "full": full.digest}


def test_hash_protocol_does_not_depend_on_other_images(tmp_path: Path) -> None:
    full = full_table(tmp_path)
    whole = observe_single_positive(full, str(tmp_path / "whole"), seed=3)
    triples = full.lookup([11, 5])
    keys = full.keys([11, 5])
    part = table_from_triples(keys, full.classes, None, *triples, str(tmp_path / "part"))
    seen = observe_single_positive(part, str(tmp_path / "seen"), seed=3)
    expected = whole.lookup(whole.rows_of(keys))
    np.testing.assert_array_equal(seen.lookup(seen.rows_of(keys)).cls, expected.cls)


def test_positives_are_equally_likely(tmp_path: Path) -> None:
    count, classes = 6000, ["/m/a", "/m/b", "/m/c"]
    image, cls = (axis.reshape(-1) for axis in np.indices((count, 3)))
    keys = [f"photo {number}" for number in range(count)]
    full = table_from_triples(keys, classes, None, image, cls, np.ones(3 * count, int), str(tmp_path / "full"))
    counts = observe_single_positive(full, str(tmp_path / "single"), seed=0).class_counts()[0]
    assert counts.sum() == count
    assert abs(counts - count / 3).max() < 5 * np.sqrt(count * 2 / 9)


def test_unknown_protocol(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cole'"):
        observe_single_positive(full_table(tmp_path, 10), str(tmp_path / "x"), protocol="cole")
