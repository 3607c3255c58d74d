"""The parser of plain lines says what the careful one says, and hands back untouched what it does not read."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.labels import LabelError, build_label_table
from paml.labels import build as build_module
from paml.labels.plain import ClassWords, blocks_of, parse_block
from paml.labels.settle import Labels, by_key

HEADER = b"ImageID,Source,LabelName,Confidence\n"
CLASSES = ["/m/a", "/m/0abcde", "/m/b", "a class of exact", "a class of more than 16 bytes", "é"]
PLAIN = [b"000000000000000a,verification,/m/a,1", b"ffffffffffffffff,,/m/0abcde,0", b"0123456789abcdef,s,/m/b,1"]
ODD = [
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
LINES = st.one_of(st.sampled_from(PLAIN), st.sampled_from(ODD), st.binary(max_size=30).filter(lambda x: b"\n" not in x))


def naive(line: bytes) -> tuple[int, int] | None:
    """(key, code) of a plain line, by the book."""
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
def test_blocks_say_what_their_lines_say(lines: list[bytes], size: int, ended: bool) -> None:
    data = b"\n".join(lines) + (b"\n" if ended else b"")
    found, odd, numbers, line = [], b"", [], 0
    for block in blocks_of(io.BytesIO(data), size):  # type: ignore[arg-type]
        got = parse_block(block, ClassWords(CLASSES))
        found += zip(got.keys.tolist(), got.codes.tolist(), strict=True)
        odd += got.odd
        numbers += (got.odd_lines + line).tolist()
        line += got.lines
    assert found == [label for text in lines if (label := naive(text)) is not None]
    others = [(number, text) for number, text in enumerate(lines) if text and naive(text) is None]
    assert odd == b"".join(text + b"\n" for _, text in others)
    assert numbers == [number for number, _ in others]


def test_every_byte_of_a_line_matters() -> None:
    line = PLAIN[0]
    changed = [
        line[:at] + bytes([byte]) + line[at + 1 :] for at in range(len(line)) for byte in range(256) if byte != 10
    ]
    got = parse_block(np.frombuffer(b"\n".join(changed) + b"\n", np.uint8), ClassWords(CLASSES))
    assert list(zip(got.keys.tolist(), got.codes.tolist(), strict=True)) == [x for c in changed if (x := naive(c))]


def test_classes_are_found_among_many_alike() -> None:
    mids = (
        [f"/m/0{number:x}" for number in range(5000)] + [f"{number}" for number in range(3000)] + ["x" * 16, "x" * 15]
    )
    texts = [*mids, "/m/0", "m/01", "5000", "x" * 14, "y" + "x" * 15, "z" * 17, ""]
    block = np.frombuffer(b"".join(text.encode().rjust(40, b",") for text in texts), np.uint8).reshape(-1, 40)
    words = np.ascontiguousarray(block[:, 24:]).view("<u8")
    found = ClassWords(mids).find(words, np.array([len(text) for text in texts]))
    place = {mid: number for number, mid in enumerate(mids)}
    assert found.tolist() == [place.get(text, -1) for text in texts]


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50), st.sampled_from([0, 40, 60]))
def test_sorting_by_key(keys: list[int], shift: int) -> None:
    values = np.array(keys, np.uint64) >> np.uint64(shift)
    got = by_key(values, np.arange(len(values), dtype=np.uint16))
    assert got.keys.tolist() == sorted(values.tolist())
    assert values[got.codes].tolist() == got.keys.tolist()
    assert isinstance(got, Labels)


def test_keys_that_differ_in_their_last_bits_alone_are_sorted() -> None:
    rng = np.random.default_rng(0)
    keys = (rng.integers(0, 2, 5000).astype(np.uint64) << np.uint64(63)) + rng.integers(0, 5000, 5000).astype(np.uint64)
    np.testing.assert_array_equal(by_key(keys, np.zeros(5000, np.uint16)).keys, np.sort(keys))


def test_a_build_is_the_same_with_care_alone(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("plain")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    monkeypatch.setattr(build_module, "_BLOCK_BYTES", 64)

    def build(out: str):
        try:
            report = build_label_table(str(folder / "a.csv"), str(folder / "classes.txt"), str(folder / out))
        except LabelError as error:
            return str(error)
        rows = pq.read_table(report.rejects_path).to_pylist()
        return report.digest, report.rejected, report.rows, sorted(map(str, rows))

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.one_of(st.sampled_from(PLAIN), st.sampled_from(ODD)), max_size=12))
    def check(lines: list[bytes]) -> None:
        (folder / "a.csv").write_bytes(HEADER + b"\n".join(lines) + b"\n")
        both = build("both.arrow")
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "_parse_plain", lambda *_: None)
            assert build("both.arrow") == both

    check()


def test_rejects_of_a_mixed_file_name_the_lines_of_that_file(tmp_path: Path) -> None:
    lines = [PLAIN[0], b"000000000000000a,s,/m/a", PLAIN[1], b"", PLAIN[2], b"a,b,c,d,e"]
    (tmp_path / "a.csv").write_bytes(HEADER + b"\n".join(lines))
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    report = build_label_table(str(tmp_path / "a.csv"), str(tmp_path / "classes.txt"), str(tmp_path / "t.arrow"))
    assert (report.annotations, report.rejected["malformed_row"]) == (3, 2)
    assert [row["line"] for row in pq.read_table(report.rejects_path).to_pylist()] == [3, 7]
