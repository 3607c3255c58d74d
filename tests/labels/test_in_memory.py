"""Tables made in memory from arrays, Arrow tables and data frames equal a dictionary of pairs."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.labels import LabelError, LabelTable, table_from_triples
from tests.labels.test_table import ANY_KEYS, HEX_KEYS, pairs_of

CLASSES = ["/m/a", "/m/b", "/m/c"]
ROWS = st.one_of(HEX_KEYS, ANY_KEYS).flatmap(
    lambda key: st.lists(
        st.tuples(st.sampled_from([key, "photo 1", f"{7:016x}"]), st.sampled_from(CLASSES), st.integers(0, 1)),
        min_size=1,
        max_size=20,
    )
)


def reference(rows: list[tuple[str, str, int]], conflict: str) -> dict[tuple[str, str], int]:
    """The state of each pair, computed row by row."""
    votes: dict[tuple[str, str], set[int]] = {}
    for key, cls, state in rows:
        votes.setdefault((key, cls), set()).add(state)
    winner = {"negative": min, "positive": max, "drop": lambda states: None if len(states) == 2 else min(states)}
    states = {pair: winner[conflict](states) for pair, states in votes.items()}
    return {pair: state for pair, state in states.items() if state is not None}


@given(ROWS, st.sampled_from(["negative", "positive", "drop"]))
@settings(max_examples=60, deadline=None)
def test_from_arrays_equals_the_reference(rows: list[tuple[str, str, int]], conflict: Any) -> None:
    keys, classes, states = (list(column) for column in zip(*rows, strict=True))
    table = LabelTable.from_arrays(keys, classes, states, classes=CLASSES, conflict=conflict)
    expected = reference(rows, conflict)
    assert pairs_of(table) == expected
    assert table.keys() == sorted(set(keys))
    dense = np.full((len(table.keys()), 3), -1)
    for (key, cls), state in expected.items():
        dense[table.keys().index(key), CLASSES.index(cls)] = state
    shuffled = np.random.default_rng(0).permutation(len(dense))
    assert table.states([table.keys()[row] for row in shuffled]).tolist() == dense[shuffled].tolist()


def test_equals_the_table_of_a_file(tmp_path: Path) -> None:
    keys, image, cls, state = ["b", "a", "none"], [0, 0, 1], [0, 1, 1], [1, 0, 1]
    file = table_from_triples(keys, CLASSES, ["A", "B", "C"], image, cls, state, str(tmp_path / "t.arrow"))
    memory = LabelTable.from_arrays(
        ["b", "b", "a"], cls, state, classes=CLASSES, names=["A", "B", "C"], images=["none", "a", "b"]
    )
    assert memory.digest == file.digest
    assert memory.write(str(tmp_path / "again.arrow")).digest == file.digest
    again = pickle.loads(pickle.dumps(memory))
    assert (again.digest, again.states(keys).tolist()) == (file.digest, file.states(keys).tolist())
    assert memory.states(keys).dtype == np.int8
    for part in ("3 images", "3 classes", "3 labels", "2 positive", "1 negative"):
        assert part in repr(memory)


def test_classes_default_to_the_sorted_ones_and_repeats_are_counted() -> None:
    table = LabelTable.from_arrays(np.array(["x", "x", "y"]), ["dog", "dog", "cat"], np.array([True, True, False]))
    assert table.classes == table.names == ("cat", "dog")
    assert pairs_of(table) == {("x", "dog"): 1, ("y", "cat"): 0}
    assert table.metadata["duplicates"] == 1


FRAME = pd.DataFrame({"file": ["a", "b", "b"], "tag": ["x", "x", "y"], "truth": [1.0, 0.0, 1.0], "more": [1, 2, 3]})


@pytest.mark.parametrize(
    "states", [[1, 0, 1], [True, False, True], [1.0, 0.0, 1.0], ["1", "0", "True"], ["Positive", "negative", "1.0"]]
)
def test_from_frame_and_from_arrow(states: list) -> None:
    frame = FRAME.assign(truth=states)
    columns = {"image": "file", "cls": "tag", "state": "truth"}
    table = LabelTable.from_frame(frame, **columns)
    assert pairs_of(table) == {("a", "x"): 1, ("b", "x"): 0, ("b", "y"): 1}
    assert LabelTable.from_frame(frame.iloc[::-1].astype({"tag": "category"}), **columns).digest == table.digest
    arrow = pa.table(frame)
    assert LabelTable.from_arrow(arrow, **columns).digest == table.digest
    chunked = pa.concat_tables([arrow.slice(0, 1), arrow.slice(1)])
    assert LabelTable.from_arrow(chunked, **columns).digest == table.digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_ids": ["x", "unknown"], "classes": ["x"]}, "1 labels .*'unknown'.*'x'"),
        ({"class_ids": [0, 2], "classes": ["x", "y"]}, "class index 2 is out of range"),
        ({"class_ids": ["x", None]}, "unknown classes"),
        ({"image_ids": ["a", ""]}, "key is empty"),
        ({"image_ids": ["a"]}, "1 image ids, 2 class ids and 2 states"),
        ({"images": ["a"]}, "'b'"),
        ({"images": ["a", "b", "a"]}, "key 'a' is a duplicate"),
        ({"states": [1, -1]}, "state '-1'"),
        ({"states": [1, None]}, "state None"),
        ({"states": [1, 0.5]}, "state '0.5'"),
        ({"image_ids": ["a", "a"]}, "1 pairs .*image a and class x"),
        ({"conflict": "both"}, "conflict is 'both'"),
        ({"classes": ["x", "x"]}, "class 'x' is a duplicate"),
        ({"names": ["X", "Y"]}, "2 names for 1 classes"),
        ({"image_ids": [], "class_ids": [], "states": []}, "no classes"),
    ],
)
def test_errors(arguments: dict, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        LabelTable.from_arrays(
            **{"image_ids": ["a", "b"], "class_ids": ["x", "x"], "states": [1, 0], **arguments},  # pyright: ignore
        ).states(["a", "a"])


def test_states_of_mixed_types() -> None:
    states = [True, 0, np.bool_(False), 1.0, np.int64(1), "negative"]
    table = LabelTable.from_arrays(list("abcdef"), ["x"] * 6, states)
    assert table.states(list("abcdef"))[:, 0].tolist() == [1, 0, 0, 1, 1, 0]
    for bad in ([True, [1]], np.array([True, 1], object)):
        with pytest.raises(LabelError, match=r"\[1\]|several types"):
            LabelTable.from_arrays(["a", "b"], ["x", "x"], bad)
    with pytest.raises(LabelError, match="one type per column"):
        LabelTable.from_frame(
            pd.DataFrame({"image": ["a", "b"], "class": ["x", "x"], "state": [True, 1]}, dtype=object)
        )


def test_missing_columns_and_images() -> None:
    with pytest.raises(LabelError, match=r"no column 'image'.* file, tag, truth"):
        LabelTable.from_arrow(pa.table(FRAME))
    with pytest.raises(LabelError, match="no column 'label'"):
        LabelTable.from_frame(FRAME, image="file", cls="label", state="truth")
    table = LabelTable.from_frame(FRAME, image="file", cls="tag", state="truth")
    with pytest.raises(LabelError, match=r"1 of 2 keys .*'z'"):
        table.states(["a", "z"])
