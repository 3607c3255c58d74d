"""The fast parser equals the general one on usual lines, and returns all other lines unchanged."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.labels import LabelError, build_label_table
from paml.labels import annotations as annotations_module
from paml.labels.fast_csv import ClassHashTable, ParsedBlock, parse_block, read_blocks
from paml.labels.resolve import Labels, sort_by_key

HEADER = b"ImageID,Source,LabelName,Confidence\n"
CLASSES = ["/m/a", "/m/0abcde", "/m/b", "a class of exact", "a class of more than 16 bytes", "é"]
USUAL = [b"000000000000000a,verification,/m/a,1", b"ffffffffffffffff,,/m/0abcde,0", b"0123456789abcdef,s,/m/b,1"]
OTHER = [
    b"",
    b" ",
    b"0123456789ABCDEF,s,/m/b,1",
    b"0123456789abcdeg,s,/m/b,1",
    b"000000000000000a,s,/m/a,1.0",
    b"000000000000000a,s,/m/a,2",
    b"000000000000000a,s,/m/a,",
    b"000000000000000a,s,/m/unknown,1",
    b"000000000000000a,s,,1",
    b"000000000000000a,two words,/m/a,0",
    b'000000000000000a,"s",/m/a,0',
    b"000000000000000a,s,a class of more than 16 bytes,1",
    b"000000000000000a,s,a class of exact,1",
    b"000000000000000a,\xc3\xa9,\xc3\xa9,0",
    b"000000000000000a,\xff,/m/a,0",
    b"000000000000000a,s,/m/a",
    b"000000000000000a,s,/m/a,1,1",
    b",,,",
    b"a,b,c,1",
    b",000000000000000a,/m/a,1",
    b"000000000000000a,s/m/a,1,0",
]
LINES = st.one_of(
    st.sampled_from(USUAL), st.sampled_from(OTHER), st.binary(max_size=30).filter(lambda x: b"\n" not in x)
)


def parse_line(line: bytes) -> tuple[int, int] | None:
    """(key, code) of a usual line, None for any other."""
    fields = line.split(b",")
    if len(fields) != 4 or any(byte <= 44 or byte > 127 for field in fields for byte in field):
        return None
    key, _, mid, confidence = fields
    if len(key) != 16 or not set(key) <= set(b"0123456789abcdef") or confidence not in (b"0", b"1"):
        return None
    if mid.decode() not in CLASSES or len(mid) > 16:
        return None
    return int(key, 16), 2 * CLASSES.index(mid.decode()) + int(confidence)


@given(st.lists(LINES, max_size=20), st.integers(1, 200), st.booleans())
@settings(max_examples=200, deadline=None)
def test_blocks_equal_their_lines(lines: list[bytes], size: int, ended: bool) -> None:
    data = b"\n".join(lines) + (b"\n" if ended else b"")
    labels, other, numbers, line = [], b"", [], 0
    for block in read_blocks(io.BytesIO(data), size):  # type: ignore[arg-type]
        got = parse_block(block, ClassHashTable(CLASSES))
        labels += zip(got.keys.tolist(), got.codes.tolist(), strict=True)
        other += got.other
        numbers += (got.other_lines + line).tolist()
        line += got.lines
    assert labels == [label for text in lines if (label := parse_line(text)) is not None]
    others = [(number, text) for number, text in enumerate(lines) if text and parse_line(text) is None]
    assert other == b"".join(text + b"\n" for _, text in others)
    assert numbers == [number for number, _ in others]


def test_changing_any_byte_of_a_line() -> None:
    line = USUAL[0]
    changed = [
        line[:at] + bytes([byte]) + line[at + 1 :] for at in range(len(line)) for byte in range(256) if byte != 10
    ]
    got = parse_block(np.frombuffer(b"\n".join(changed) + b"\n", np.uint8), ClassHashTable(CLASSES))
    assert list(zip(got.keys.tolist(), got.codes.tolist(), strict=True)) == [x for c in changed if (x := parse_line(c))]


def test_find_among_many_similar_classes() -> None:
    mids = (
        [f"/m/0{number:x}" for number in range(5000)] + [f"{number}" for number in range(3000)] + ["x" * 16, "x" * 15]
    )
    texts = [*mids, "/m/0", "m/01", "5000", "x" * 14, "y" + "x" * 15, "z" * 17, ""]
    block = np.frombuffer(b"".join(text.encode().rjust(40, b",") for text in texts), np.uint8).reshape(-1, 40)
    words = np.ascontiguousarray(block[:, 24:]).view("<u8")
    found = ClassHashTable(mids).find(words, np.array([len(text) for text in texts]))
    index = {mid: number for number, mid in enumerate(mids)}
    assert found.tolist() == [index.get(text, -1) for text in texts]


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50), st.sampled_from([0, 40, 60]))
def test_sort_by_key(keys: list[int], shift: int) -> None:
    values = np.array(keys, np.uint64) >> np.uint64(shift)
    got = sort_by_key(values, np.arange(len(values), dtype=np.uint16))
    assert got.keys.tolist() == sorted(values.tolist())
    assert values[got.codes].tolist() == got.keys.tolist()
    assert isinstance(got, Labels)


def test_sort_by_key_with_differences_in_the_last_bits() -> None:
    rng = np.random.default_rng(0)
    keys = (rng.integers(0, 2, 5000).astype(np.uint64) << np.uint64(63)) + rng.integers(0, 5000, 5000).astype(np.uint64)
    np.testing.assert_array_equal(sort_by_key(keys, np.zeros(5000, np.uint16)).keys, np.sort(keys))


def without_usual_lines(block: np.ndarray, _: ClassHashTable) -> ParsedBlock:
    """A parser that leaves every line to the general one."""
    lines = block.tobytes().split(b"\n")[:-1]
    other = b"".join(line + b"\n" for line in lines if line)
    numbers = np.flatnonzero([len(line) for line in lines])
    return ParsedBlock(np.empty(0, np.uint64), np.empty(0, np.int64), other, numbers, len(lines))


def test_build_equals_build_with_the_general_parser_only(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("fast_csv")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    monkeypatch.setattr(annotations_module, "_BLOCK_BYTES", 64)

    def build(out: str):
        try:
            report = build_label_table(str(folder / "a.csv"), str(folder / "classes.txt"), str(folder / out))
        except LabelError as error:
            return str(error)
        rows = pq.read_table(report.rejects_path).to_pylist()
        return report.table.digest, report.rejected, report.rows, sorted(map(str, rows))

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.one_of(st.sampled_from(USUAL), st.sampled_from(OTHER)), max_size=12))
    def check(lines: list[bytes]) -> None:
        (folder / "a.csv").write_bytes(HEADER + b"\n".join(lines) + b"\n")
        expected = build("table.arrow")
        with monkeypatch.context() as patch:
            patch.setattr(annotations_module, "parse_block", without_usual_lines)
            assert build("table.arrow") == expected

    check()


def test_rejects_have_line_numbers_of_the_original_file(tmp_path: Path) -> None:
    lines = [USUAL[0], b"000000000000000a,s,/m/a", USUAL[1], b"", USUAL[2], b"a,b,c,d,e"]
    (tmp_path / "a.csv").write_bytes(HEADER + b"\n".join(lines))
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    report = build_label_table(str(tmp_path / "a.csv"), str(tmp_path / "classes.txt"), str(tmp_path / "t.arrow"))
    assert (report.table.num_annotations, report.rejected["malformed_row"]) == (3, 2)
    assert [row["line"] for row in pq.read_table(report.rejects_path).to_pylist()] == [3, 7]
