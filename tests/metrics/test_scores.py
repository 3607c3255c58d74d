"""Means, groups, conventions, tables, and pairs gathered from workers."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from paml.errors import SettingsError
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.metrics import (
    MetricSettings,
    Pairs,
    average_precision_by_class,
    five_groups,
    gather_pairs,
    join_pairs,
    pairs_of,
    pairs_of_states,
    read_pairs,
    score_table,
    scores,
    write_pairs,
    write_per_class,
)
from tests.helpers.ranks import run_on_ranks

# Class 0: AP 1/2. 1: no positives. 2: no negatives. 3: no pairs. 4: AP 1.
CLS = np.array([0, 0, 1, 1, 2, 4, 4])
SCORE = np.array([1, 0, 1, -1, -1, 2, 1], np.float32)
POSITIVES = np.array([False, True, False, False, True, True, False])


def test_conventions():
    def per_class(**settings):
        return scores(CLS, SCORE, POSITIVES, 5, settings=MetricSettings(**settings))

    nan = np.nan
    default = per_class()
    np.testing.assert_array_equal(default.per_class, [0.5, nan, 1, nan, 1])
    assert default.map == pytest.approx(2.5 / 3)
    assert default.num_counted == 3
    zero = per_class(no_positives="zero")
    np.testing.assert_array_equal(zero.per_class, [0.5, 0, 1, nan, 1])
    assert zero.map == pytest.approx(2.5 / 4)
    assert "without positives counted as 0" in zero.convention
    assert default.convention != zero.convention
    np.testing.assert_array_equal(default.positives, [1, 0, 1, 0, 1])
    np.testing.assert_array_equal(default.negatives, [1, 2, 0, 0, 1])


def test_micro_metrics():
    """Scores of 0 or more are predicted positive."""
    result = scores(CLS, SCORE - np.float32(1), POSITIVES, 5)
    assert result.micro_precision == pytest.approx(1 / 4)
    assert result.micro_recall == pytest.approx(1 / 3)
    assert result.micro_f1 == pytest.approx(2 / 7)
    assert result.micro_ap == pytest.approx(average_precision_by_class(0 * CLS, SCORE, POSITIVES, 1)[0])


def test_no_annotations():
    result = scores(np.array([], int), np.array([], np.float32), np.array([], bool), 3)
    assert np.isnan([result.map, result.micro_ap, result.micro_f1]).all()
    assert np.isnan(list(result.metrics().values())).all()
    assert "0 of 3" in score_table(result)


def test_five_groups_with_ties_and_remainder():
    """Ascending by (count, class index); 12 classes give groups of 3, 3, 2, 2 and 2."""
    counts = np.array([5, 5, 5, 9, 1, 5, 5, 0, 5, 5, 2, 9])
    groups = five_groups(counts)
    # In order: 7, 4, 10 | 0, 1, 2 | 5, 6 | 8, 9 | 3, 11
    assert groups.tolist() == [2, 2, 2, 5, 1, 3, 3, 1, 4, 4, 1, 5]
    assert five_groups(np.arange(5000)[::-1]).tolist() == sorted([5, 4, 3, 2, 1] * 1000, reverse=True)
    assert five_groups(torch.tensor([3, 1])).tolist() == [2, 1]


def test_groups_are_means_of_their_classes():
    positives, negatives = np.array([9, 0, 1, 3, 2]), np.array([0, 100, 1, 0, 0])
    result = scores(CLS, SCORE, POSITIVES, 5, train_counts=positives + negatives)
    # Annotations 9, 100, 2, 3, 2 order the classes 2, 4, 3, 0, 1; classes 3 and 1 do not count.
    np.testing.assert_array_equal(list(result.groups.values()), [1, 1, np.nan, 0.5, np.nan])
    assert result.metrics().keys() >= {"G1", "G2", "G4", "mAP", "micro_AP"}
    assert np.isnan(result.metrics()["G3"])
    with pytest.raises(ValueError, match=r"\(4,\).*\(5,\)"):
        scores(CLS, SCORE, POSITIVES, 5, train_counts=positives[:4])


def test_invalid_settings_are_refused():
    with pytest.raises(SettingsError, match=r"metrics\.no_positives is 'other'"):
        MetricSettings(no_positives="other")  # pyright: ignore


def test_per_class_table(tmp_path):
    result = scores(CLS, SCORE, POSITIVES, 5, train_counts=2 * np.arange(5))
    path = str(tmp_path / "per_class.parquet")
    # Names repeat in Open Images; MIDs do not.
    write_per_class(path, result, [f"/m/{k}" for k in range(5)], ["Cat", "Dog", "Dog", "Hat", "Car"])
    table = pq.read_table(path)
    assert table.column("mid").to_pylist() == [f"/m/{k}" for k in range(5)]
    assert table.column("name").to_pylist() == ["Cat", "Dog", "Dog", "Hat", "Car"]
    assert table.column("ap").to_pylist() == [0.5, None, 1.0, None, 1.0]
    assert table.column("counts_in_mean").to_pylist() == [True, False, True, False, True]
    assert table.column("positives").to_pylist() == [1, 0, 1, 0, 1]
    assert table.column("negatives").to_pylist() == [1, 2, 0, 0, 1]
    assert table.column("group").to_pylist() == [1, 2, 3, 4, 5]
    assert table.column("train_count").to_pylist() == [0, 2, 4, 6, 8]
    assert table.schema.metadata[b"convention"].decode() == result.convention
    with pytest.raises(ValueError, match=r"5 classes.* 4 MIDs"):
        write_per_class(path, result, ["a", "b", "c", "d"])


def test_score_table_is_in_percent_and_has_the_convention():
    result = scores(CLS, SCORE, POSITIVES, 5, train_counts=2 * np.arange(5))
    text = score_table({"AN": result, "LL-R + BoostLU": result})
    lines = text.splitlines()
    assert lines[0].split() == ["G1", "G2", "G3", "G4", "G5", "all", "(mAP)", "micro", "AP", "classes", "pairs"]
    assert lines[2].split()[:7] == ["AN", "50.00", "-", "100.00", "-", "100.00", "83.33"]
    assert lines[3].startswith("LL-R + BoostLU")
    assert lines[-1] == result.convention
    other = scores(CLS, SCORE, POSITIVES, 5, settings=MetricSettings(no_positives="zero"))
    with pytest.raises(ValueError, match="different conventions"):
        score_table({"one": result, "other": other})


def test_pairs_of_a_batch():
    logits = torch.tensor([[0.5, 1.5, 2.5], [3.5, 4.5, 5.5]], dtype=torch.bfloat16)
    image, cls = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([2, 0, 1], dtype=torch.int32)
    state = torch.tensor([POSITIVE, NEGATIVE, POSITIVE], dtype=torch.int8)
    pairs = pairs_of(logits, image, cls, state)
    assert pairs.cls.tolist() == [2, 0, 1]
    assert pairs.score.tolist() == [2.5, 3.5, 4.5]
    assert pairs.positive.tolist() == [True, False, True]
    assert pairs.image.tolist() == [0, 1, 1]
    assert pairs_of(logits, image, cls, state, torch.tensor([70, 60])).image.tolist() == [70, 60, 60]
    dense = torch.full((2, 3), UNOBSERVED, dtype=torch.int8)
    dense[image.long(), cls.long()] = state
    for of_states, of_triples in zip(pairs_of_states(logits, dense), pairs, strict=True):
        assert torch.equal(of_states, of_triples)
    assert len(join_pairs([pairs, pairs]).cls) == 6
    assert join_pairs([]).score.dtype == torch.float32


def test_pairs_survive_a_file(tmp_path):
    expected, path = all_pairs(), str(tmp_path / "pairs.parquet")
    write_pairs(path, expected, 5000, {"split": "abc"})
    loaded, metadata = read_pairs(path)
    assert all(
        torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(loaded, expected, strict=True)
    )
    assert (metadata["num_classes"], metadata["split"]) == ("5000", "abc")


def all_pairs():
    rng = np.random.default_rng(5)
    return Pairs(
        torch.from_numpy(rng.integers(0, 5000, 300).astype(np.int32)),
        torch.from_numpy(rng.standard_normal(300).astype(np.float32) * 50),
        torch.from_numpy(rng.random(300) < 0.5),
        torch.from_numpy(rng.integers(0, 2**40, 300)),
    )


def gathering_worker(rank, cuts):
    pairs = Pairs(*(values[cuts[rank] : cuts[rank + 1]] for values in all_pairs()))
    joined = gather_pairs(pairs, dist.group.WORLD)
    empty = gather_pairs(join_pairs([]), dist.group.WORLD)
    return [values.numpy() for values in joined], len(empty.cls)


def test_workers_gather_uneven_pairs():
    """Each worker has each pair once."""
    cuts = [0, 211, 211, 300]
    expected = all_pairs()
    for (cls, score, positive, image), num_empty in run_on_ranks(gathering_worker, 3, cuts):
        assert np.array_equal(cls, expected.cls.numpy())
        assert np.array_equal(score, expected.score.numpy())
        assert np.array_equal(positive, expected.positive.numpy())
        assert np.array_equal(image, expected.image.numpy())
        assert num_empty == 0
    assert gather_pairs(expected, None) is expected
