"""The label table: look-ups equal a dictionary of pairs, and damaged files are refused."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml import storage
from paml.checksum import CHECKSUM_PLACEHOLDER, write_checksum
from paml.labels import NEGATIVE, POSITIVE, UNOBSERVED, LabelError, LabelTable, table_from_triples
from paml.labels.keys import hex_to_uint64, uint64_to_hex

HEX_KEYS = st.integers(0, 2**64 - 1).map(lambda value: f"{value:016x}")
ANY_KEYS = st.one_of(HEX_KEYS, st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12))


def pairs_of(table: LabelTable) -> dict[tuple[str, str], int]:
    triples = table.lookup(np.arange(table.num_images))
    keys = table.keys()
    return {
        (keys[image], table.classes[cls]): int(state)
        for image, cls, state in zip(triples.image, triples.cls, triples.state, strict=True)
    }


@st.composite
def labeled(draw: st.DrawFn, keys: st.SearchStrategy[str]) -> tuple[list[str], int, dict[tuple[int, int], int]]:
    names = draw(st.lists(keys, unique=True, max_size=12))
    num_classes = draw(st.integers(1, 5))
    if not names:
        return names, num_classes, {}
    pair = st.tuples(st.integers(0, len(names) - 1), st.integers(0, num_classes - 1))
    return names, num_classes, draw(st.dictionaries(pair, st.sampled_from([POSITIVE, NEGATIVE]), max_size=30))


@pytest.mark.parametrize("keys", [HEX_KEYS, ANY_KEYS], ids=["hex", "any"])
def test_table_equals_a_dictionary(keys: st.SearchStrategy[str], tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("table")

    @settings(max_examples=60, deadline=None)
    @given(labeled(keys))
    def check(case: tuple[list[str], int, dict[tuple[int, int], int]]) -> None:
        names, num_classes, pairs = case
        classes = [f"/m/{number}" for number in range(num_classes)]
        image, cls = (np.array([pair[axis] for pair in pairs], np.int64) for axis in (0, 1))
        table = table_from_triples(names, classes, None, image, cls, list(pairs.values()), str(folder / "t.arrow"))
        assert pairs_of(table) == {(names[i], classes[c]): state for (i, c), state in pairs.items()}
        assert table.num_images == len(names)
        assert table.num_annotations == len(pairs)
        rows = table.rows_of([*names, "absent"])
        assert sorted(rows[:-1]) == list(range(len(names)))
        assert rows[-1] == -1
        assert table.keys(rows[:-1]) == names
        positives, negatives = table.class_counts()
        for number in range(num_classes):
            of_class = [state for (_, c), state in pairs.items() if c == number]
            assert positives[number] == of_class.count(POSITIVE)
            assert negatives[number] == of_class.count(NEGATIVE)
        assert table.label_counts(rows[:-1]).tolist() == [sum(i == n for i, _ in pairs) for n in range(len(names))]

    check()


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_hex_round_trip(values: list[int]) -> None:
    texts = uint64_to_hex(np.array(values, np.uint64))
    assert texts.to_pylist() == [f"{value:016x}" for value in values]
    back, valid = hex_to_uint64(texts)
    assert valid.all()
    assert back.tolist() == values


@given(st.lists(st.text(st.sampled_from("0aAfFg_x 9é"), max_size=18), max_size=8))
def test_valid_hex_keys(texts: list[str]) -> None:
    _, valid = hex_to_uint64(pa.array(texts, pa.string()))
    assert valid.tolist() == [len(t) == 16 and set(t) <= set("0123456789abcdef") for t in texts]


def test_hex_keys_of_a_slice_and_with_nulls() -> None:
    keys = pa.array(["x", "00000000000000ff", None, "0123456789abcdef"])
    values, valid = hex_to_uint64(keys[1:])
    assert valid.tolist() == [True, False, True]
    assert values[[0, 2]].tolist() == [0xFF, 0x0123456789ABCDEF]


@pytest.fixture
def table(tmp_path: Path) -> LabelTable:
    keys = ["00000000000000ff", "000000000000000a", "ffffffffffffffff"]
    return table_from_triples(
        keys, ["/m/a", "/m/b", "/m/c"], ["A", "B", "A"], [0, 0, 2], [2, 0, 1], [1, 0, 1], str(tmp_path / "t.arrow")
    )


def test_lookup_in_the_order_of_the_rows(table: LabelTable) -> None:
    rows = table.rows_of(["00000000000000ff", "000000000000000a", "00000000000000ff", "ffffffffffffffff"])
    triples = table.lookup(rows)
    assert [t.dtype for t in triples] == [np.int32, np.int32, np.int8]
    assert triples.image.tolist() == [0, 0, 2, 2, 3]
    assert triples.cls.tolist() == [0, 2, 0, 2, 1]
    assert triples.state.tolist() == [0, 1, 0, 1, 1]
    assert len(table.lookup([]).image) == 0


@pytest.mark.parametrize("rows", [[-1], [3], [0, 1, 99]])
def test_rows_out_of_range(table: LabelTable, rows: list[int]) -> None:
    with pytest.raises(LabelError, match=rf"row {rows[-1]} is not in label table .* rows 0 to 2"):
        table.lookup(rows)


def test_file_table_pickles_as_its_path(table: LabelTable) -> None:
    data = pickle.dumps(table)
    assert len(data) < 400
    again = pickle.loads(data)
    assert pairs_of(again) == pairs_of(table)
    assert again.digest == table.digest
    table_from_triples(["x"], ["/m/a"], None, [0], [0], [1], table.path)
    with pytest.raises(LabelError, match="has changed"):
        pickle.loads(data)


def test_digest_depends_only_on_the_labels(table: LabelTable, tmp_path: Path) -> None:
    keys = table.keys()
    triples = table.lookup(np.arange(3))
    shuffled = np.array([2, 0, 1])
    same = table_from_triples(
        keys, table.classes, table.names, *(t[shuffled] for t in triples), str(tmp_path / "same"), metadata={"by": "x"}
    )
    assert same.digest == table.digest
    other = table_from_triples(keys, table.classes, table.names, [0], [0], [1], str(tmp_path / "other"))
    assert other.digest != table.digest


def test_many_classes_use_uint32_codes(tmp_path: Path) -> None:
    classes = [f"/m/{number}" for number in range(40_000)]
    table = table_from_triples(["a"], classes, None, [0, 0], [39_999, 32_768], [1, 0], str(tmp_path / "t.arrow"))
    assert table.lookup([0]).cls.tolist() == [32_768, 39_999]
    assert table.lookup([0]).state.tolist() == [0, 1]
    assert table.class_counts()[0][39_999] == 1


def test_file_size_per_key_and_label(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keys = np.unique(rng.integers(0, 2**63, 10_000, dtype=np.uint64))
    image = np.repeat(np.arange(len(keys)), 2)
    cls = np.tile([3, 4999], len(keys))
    classes = [f"/m/{number:05}" for number in range(5000)]
    table = table_from_triples(uint64_to_hex(keys), classes, None, image, cls, cls % 2, str(tmp_path / "t.arrow"))
    metadata = len(json.dumps(dict(table.metadata)))
    assert os.path.getsize(table.path) <= 12 * len(keys) + 2 * len(image) + 2 * metadata + 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": [0, 5, 1]}, "image index 5 is out of range: there are 2"),
        ({"cls": [0, -1, 1]}, "class index -1 is out of range: there are 2"),
        ({"state": [1, UNOBSERVED, 0]}, "state '-1' is unknown"),
        ({"state": [1, 2, 0]}, "state '2' is unknown"),
        ({"image": [0, 0, 0], "cls": [1, 0, 1], "state": [1, 0, 0]}, "image b and class /m/b"),
        ({"keys": ["b", "b"]}, "key 'b' is a duplicate"),
        ({"keys": ["b", ""]}, "a key is empty"),
        ({"classes": ["/m/a", "/m/a"]}, "class '/m/a' is a duplicate"),
        ({"names": ["only one"]}, "1 names for 2 classes"),
        ({"state": [1]}, r"\(1,\): give one of each"),
    ],
)
def test_invalid_arrays(change: dict, message: str, tmp_path: Path) -> None:
    given = {"keys": ["b", "a"], "classes": ["/m/a", "/m/b"], "names": None, "image": [0, 0, 1], "cls": [0, 1, 1]}
    given |= {"state": [1, 0, 1]} | change
    with pytest.raises(LabelError, match=message):
        table_from_triples(**given, out=str(tmp_path / "t.arrow"))
    assert storage.list_files(str(tmp_path)) == []


def test_truncated_file(table: LabelTable, tmp_path: Path) -> None:
    data = Path(table.path).read_bytes()
    truncated = tmp_path / "truncated.arrow"
    for size in [0, 1, 7, 8, *range(16, len(data), 61), len(data) - 1]:
        truncated.write_bytes(data[:size])
        with pytest.raises(LabelError, match=r"truncated.arrow' is not a complete Arrow file"):
            LabelTable.open(str(truncated))


def test_changed_byte(table: LabelTable) -> None:
    data = bytearray(Path(table.path).read_bytes())
    data[data.rindex(bytes.fromhex("ff" * 8))] ^= 1
    Path(table.path).write_bytes(data)
    with pytest.raises(LabelError, match=r"is damaged"):
        LabelTable.open(table.path)


def test_any_changed_bit_is_detected_on_open(table: LabelTable) -> None:
    data = Path(table.path).read_bytes()
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        Path(table.path).write_bytes(changed)
        with pytest.raises(LabelError, match=r"label table|Arrow file"):
            LabelTable.open(table.path)
    Path(table.path).write_bytes(data)
    LabelTable.open(table.path)


def rewrite(table: LabelTable, metadata: dict[bytes, bytes], batches: int = 1) -> None:
    with pa.OSFile(table.path, "rb") as file:
        batch = pa.ipc.open_file(file).get_batch(0).replace_schema_metadata({**CHECKSUM_PLACEHOLDER, **metadata})
    with pa.OSFile(table.path, "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        for _ in range(batches):
            writer.write_batch(batch)
    write_checksum(table.path)


def test_other_files_and_versions(table: LabelTable, tmp_path: Path) -> None:
    metadata = dict(table.metadata)
    rewrite(table, {b"paml": json.dumps(metadata | {"schema_version": 99}).encode()})
    with pytest.raises(LabelError, match="schema version 99, this paml reads version 1"):
        LabelTable.open(table.path)
    rewrite(table, {b"paml": json.dumps(metadata | {"num_annotations": 7}).encode()})
    with pytest.raises(LabelError, match="is damaged"):
        LabelTable.open(table.path)
    rewrite(table, {b"paml": json.dumps(metadata).encode()}, batches=2)
    with pytest.raises(LabelError, match="2 record batches"):
        LabelTable.open(table.path)
    rewrite(table, {b"other": b"x"})
    with pytest.raises(LabelError, match="not a label table"):
        LabelTable.open(table.path)
    with pytest.raises(LabelError, match=r"missing.arrow"):
        LabelTable.open(str(tmp_path / "missing.arrow"))
