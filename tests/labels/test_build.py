"""From CSV to table: every row becomes a label or a counted reject, and errors say how to fix bad input."""

import csv
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml import storage
from paml.labels import LabelError, LabelSettings, build_label_table
from paml.labels import annotations as annotations_module
from paml.labels import resolve as resolve_module
from tests.helpers.shared import shared
from tests.labels.test_table import pairs_of

HEADER = "ImageID,Source,LabelName,Confidence\n"
CLASSES = ["/m/a", "/m/b", "/m/c"]


def write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def image(number: int) -> str:
    return f"{number:016x}"


def build(folder: Path, *files: str | bytes, **options):
    annotations = [write(folder, f"annotations-{n}.csv", text) for n, text in enumerate(files)]
    classes = write(folder, "classes-trainable.txt", "".join(f"{mid}\n" for mid in CLASSES))
    return build_label_table(annotations, classes, str(folder / "labels.arrow"), **options)


def rejects(folder: Path) -> list[dict]:
    return pq.read_table(folder / "labels.rejects.parquet").to_pylist()


def test_each_kind_of_reject_is_counted_and_written(tmp_path: Path) -> None:
    rows = [
        f"{image(1)},verification,/m/a,1",
        f"{image(1)},verification,/m/b,0",
        f"{image(2)},verification,/m/unknown,1",
        f"{image(2)},verification,/m/a,0.7",
        f"{image(2)},verification,/m/a,",
        f"{image(2)},verification,/m/a,2",
        f"{image(2)},verification,/m/c",
        f"{image(2)},verification,/m/c,1,extra",
        ",verification,/m/c,1",
        f"{image(3)},verification,,1",
        f"{image(1)},crowdsource-verification,/m/a,1",
        f"{image(4)},verification,/m/c,1",
        f"{image(4)},crowdsource-verification,/m/c,0",
        f'{image(5)},verification,"/m/c,1',
    ]
    report = build(tmp_path, HEADER + "\n".join(rows) + "\n\n")
    assert report.rows == len(rows)
    assert report.rejected == {
        "malformed_row": 4,
        "unknown_class": 2,
        "malformed_confidence": 3,
        "duplicate": 1,
        "contradiction": 1,
    }
    assert report.conflicting_pairs == 1
    assert report.table.num_annotations == 3
    assert report.unknown_classes == (("/m/unknown", 1), ('"/m/c', 1))
    table = report.table
    assert pairs_of(table) == {(image(1), "/m/a"): 1, (image(1), "/m/b"): 0, (image(4), "/m/c"): 0}
    written = rejects(tmp_path)
    assert Counter(row["kind"] for row in written) == report.rejected
    lines = [row for row in written if row["line"] is not None]
    assert [row["line"] for row in lines] == [8, 9]
    assert rows[6] in lines[0]["text"]
    fractional = next(row for row in written if row["Confidence"] == "0.7")
    assert fractional["ImageID"] == image(2)
    assert fractional["file"] == "annotations-0.csv"
    overruled = next(row for row in written if row["kind"] == "contradiction")
    assert (overruled["ImageID"], overruled["LabelName"], overruled["Confidence"]) == (image(4), "/m/c", "1")
    text = str(report)
    for part in ("14 rows read, 11 rejected", "malformed row 4", "1 contradicting pairs", "labels.rejects.parquet"):
        assert part in text


FIELDS = st.tuples(
    st.sampled_from([image(1), image(2), image(2**63), "photo 7", ""]),
    st.sampled_from(["verification", "crowdsource-verification"]),
    st.sampled_from([*CLASSES, "/m/unknown", ""]),
    st.sampled_from(["0", "1", "1", "0", "0.5", "", "yes"]),
)


def expected(rows: list[tuple[str, ...]], rule: str) -> tuple[dict, Counter]:
    """(pairs, reject counts) computed row by row in plain Python."""
    counts: Counter[str] = Counter()
    states: dict[tuple[str, str], list[int]] = {}
    for key, _, mid, confidence in rows:
        if not key or not mid:
            counts["malformed_row"] += 1
        elif mid not in CLASSES:
            counts["unknown_class"] += 1
        elif confidence not in ("0", "1"):
            counts["malformed_confidence"] += 1
        else:
            states.setdefault((key, mid), []).append(int(confidence))
    pairs = {}
    for pair, votes in states.items():
        if len(set(votes)) == 1:
            pairs[pair] = votes[0]
            counts["duplicate"] += len(votes) - 1
        elif rule == "drop":
            counts["contradiction"] += len(votes)
        else:
            pairs[pair] = winner = {"negative": 0, "positive": 1}[rule]
            counts["contradiction"] += votes.count(1 - winner)
            counts["duplicate"] += votes.count(winner) - 1
    return pairs, counts


@pytest.mark.parametrize("rule", ["negative", "positive", "drop"])
def test_table_equals_row_by_row_reference(rule, tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("build")
    monkeypatch.setattr(resolve_module, "_PIECE_ROWS", 3)
    monkeypatch.setattr(annotations_module, "_BATCH_ROWS", 2)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(FIELDS, min_size=1, max_size=25), st.integers(0, 25))
    def check(rows: list[tuple[str, ...]], cut: int) -> None:
        pairs, counts = expected(rows, rule)
        files = [HEADER + "".join(",".join(row) + "\n" for row in part) for part in (rows[:cut], rows[cut:])]
        options = {"settings": LabelSettings(conflict=rule, threads=2)}
        if not any(mid in CLASSES and key and confidence in ("0", "1") for key, _, mid, confidence in rows):
            with pytest.raises(LabelError, match="no usable row"):
                build(folder, *files, **options)
            return
        report = build(folder, *files, **options)
        table = report.table
        assert pairs_of(table) == pairs
        assert table.keys() == sorted({key for key, _ in pairs})
        assert Counter(report.rejected) - Counter() == counts - Counter()
        assert report.rows == len(rows) == report.table.num_annotations + sum(report.rejected.values())
        assert Counter(row["kind"] for row in rejects(folder)) == counts - Counter()
        assert table.metadata["conflict"] == rule

    check()


def test_labels_are_resolved_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    rows = [
        (image(int(key) << 50), "verification", CLASSES[c], str(state))
        for key, c, state in zip(
            rng.zipf(1.3, 3000) % 997, rng.integers(0, 3, 3000), rng.integers(0, 2, 3000), strict=True
        )
    ]
    text = HEADER + "".join(",".join(row) + "\n" for row in rows)
    whole = build(tmp_path, text)
    pairs, counts = expected(rows, "negative")
    assert pairs_of(whole.table) == pairs
    assert Counter(whole.rejected) - Counter() == counts
    monkeypatch.setattr(resolve_module, "_PIECE_ROWS", 100)
    assert build(tmp_path, text).table.digest == whole.table.digest


def test_file_formats_of_later_releases(tmp_path: Path) -> None:
    annotations = write(tmp_path, "oidv6-train-annotations-human-imagelabels.csv", HEADER + f"{image(9)},v,/m/b,1\n")
    more = write(
        tmp_path,
        "oidv7-val-annotations-human-imagelabels.csv",
        ("\ufeff" + HEADER + f'"{image(8)}","v","/m/c","0"\n"{image(8)}","v","/m/a","1.0"\n').replace("\n", "\r\n"),
    )
    classes = write(tmp_path, "oidv7-classes-trainable.txt", "LabelName\r\n/m/a\r\n/m/b\r\n/m/c\r\n\r\n")
    names = write(tmp_path, "oidv7-class-descriptions.csv", 'LabelName,DisplayName\n/m/a,"Tea, green"\n/m/b,Bus\n')
    report = build_label_table([annotations, more], classes, str(tmp_path / "t.arrow"), descriptions=names)
    table = report.table
    assert table.classes == ("/m/a", "/m/b", "/m/c")
    assert table.names == ("Tea, green", "Bus", "/m/c")
    assert report.unnamed_classes == 1
    assert pairs_of(table) == {(image(9), "/m/b"): 1, (image(8), "/m/c"): 0, (image(8), "/m/a"): 1}
    sources = table.metadata["sources"]
    assert [source["file"] for source in sources] == [
        "oidv6-train-annotations-human-imagelabels.csv",
        "oidv7-val-annotations-human-imagelabels.csv",
        "oidv7-classes-trainable.txt",
    ]
    assert sources[0]["sha256"] == hashlib.sha256(Path(annotations).read_bytes()).hexdigest()
    assert sources[0]["bytes"] == Path(annotations).stat().st_size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"annotations-0.csv.* \(0 bytes\).*ImageID,Source"),
        (HEADER, "no usable row .* no row after the header"),
        (
            "ImageID,LabelName,Confidence\n",
            "'ImageID,LabelName,Confidence', expected 'ImageID,Source,",
        ),
        ("ImageID,Source,LabelName,Confidence,XMin,XMax\n", "boxes"),
        (f"{image(1)},verification,/m/a,1\n", "looks like a row"),
        ("imageid,source,labelname,confidence\n", "upper and lower case"),
        ("Source,ImageID,LabelName,Confidence\n", "another order"),
        (b"\x1f\x8b\x08\x00", "is compressed"),
        (HEADER + f"{image(1)},v,/m/q,1\n", r"'/m/q', the class list .* such as '/m/a'"),
        (HEADER + f"{image(1)},machine,/m/a,0.8\n", "machine-generated"),
        (HEADER + f"{image(1)},v\n", r"all rejected \(malformed row 1\)"),
    ],
)
def test_errors_for_bad_files(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=message):
        build(tmp_path, text)
    assert not any("labels" in name for name in storage.list_files(str(tmp_path)))


@pytest.mark.parametrize("first", [f"{image(1)},v,/m/a,1", f'"{image(1)}","v","/m/a","1"'])
@pytest.mark.parametrize("ends", ["\r\n", "\n"])
def test_mixed_line_ends(first: str, ends: str, tmp_path: Path) -> None:
    rows = [first, f"{image(2)},v,/m/a,1\n", f"{image(3)},v,/m/b,0\r\n", f"{image(4)},v,/m/b", ""]
    report = build(tmp_path, HEADER + ends.join(rows))
    assert pairs_of(report.table) == {(image(1), "/m/a"): 1, (image(2), "/m/a"): 1, (image(3), "/m/b"): 0}
    assert [(row["kind"], row["line"]) for row in rejects(tmp_path)] == [("malformed_row", 7)]


def test_rejects_of_a_quoted_file(tmp_path: Path) -> None:
    rows = [
        f'"{image(1)}","v","/m/a","1"',
        f'"{image(2)}","v"',
        "",
        f'"{image(3)}","two\nlines","/m/a","1"',
        f'"{image(4)}"x,"v","/m/a","1"',
        f'"{image(5)}","v","/m/\udcff","1"',
        '"no end',
    ]
    text = (HEADER + "\n".join(rows) + "\n").encode(errors="surrogateescape")
    assert pairs_of(build(tmp_path, text).table) == {(image(1), "/m/a"): 1, (image(3), "/m/a"): 1}
    assert [(row["line"], row["text"].split(":")[0]) for row in rejects(tmp_path)] == [
        (3, "2 fields, expected 4"), (7, "not CSV"), (8, "not UTF-8"), (9, "not CSV"),
    ]  # fmt: skip


def test_error_names_the_bad_file(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"annotations-1.csv' is empty"):
        build(tmp_path, HEADER + f"{image(1)},v,/m/a,1\n", "")


def test_conflict_rule_error_stops_the_build(tmp_path: Path) -> None:
    text = HEADER + f"{image(1)},v,/m/a,1\n{image(1)},v,/m/a,0\n{image(1)},v,/m/b,0\n"
    with pytest.raises(LabelError, match=rf"1 pairs .* image {image(1)} and class /m/a"):
        build(tmp_path, text, settings=LabelSettings(conflict="error"))
    kept = build(tmp_path, text, settings=LabelSettings(conflict="positive"))
    assert pairs_of(kept.table) == {(image(1), "/m/a"): 1, (image(1), "/m/b"): 0}


def test_image_without_remaining_labels_is_not_in_the_table(tmp_path: Path) -> None:
    text = HEADER + f"{image(1)},v,/m/a,1\n{image(1)},v,/m/a,0\n{image(2)},v,/m/b,0\n"
    report = build(tmp_path, text, settings=LabelSettings(conflict="drop"))
    assert report.table.keys() == [image(2)]
    assert report.table.num_images == 1


def test_text_image_ids(tmp_path: Path) -> None:
    text = HEADER + f"{image(10)},v,/m/a,1\nphoto.1,v,/m/a,1\n{image(11)},v,/m/a,0\n"
    report = build(tmp_path, text)
    table = report.table
    assert table.keys() == [image(10), image(11), "photo.1"]
    assert table.rows_of(["photo.1", image(10), "absent"]).tolist() == [2, 0, -1]
    assert report.first_text_key == "photo.1"
    assert "'photo.1' is not 16 lower-case hex digits" in str(report)
    strict = build(tmp_path, text, settings=LabelSettings(image_ids="hex"))
    assert strict.rejected["malformed_row"] == 1
    assert "16 lower-case hex digits" in rejects(tmp_path)[0]["text"]
    assert strict.table.has_hex_keys
    assert rejects(tmp_path)[0]["ImageID"] == "photo.1"


def test_bad_class_lists(tmp_path: Path) -> None:
    annotations = write(tmp_path, "a.csv", HEADER + f"{image(1)},v,/m/a,1\n")
    out = str(tmp_path / "t.arrow")
    with pytest.raises(LabelError, match=r"none.txt' is empty"):
        build_label_table(annotations, write(tmp_path, "none.txt", "\n"), out)
    with pytest.raises(LabelError, match="class '/m/a' is a duplicate"):
        build_label_table(annotations, write(tmp_path, "twice.txt", "/m/a\n/m/a\n"), out)
    with pytest.raises(LabelError, match="is not UTF-8 text"):
        build_label_table(annotations, write(tmp_path, "binary.txt", b"\xff\xfe/\0m\0"), out)
    classes = write(tmp_path, "c.txt", "/m/a\n")
    unnamed = write(tmp_path, "d.csv", "/m/a\n")
    with pytest.raises(LabelError, match="'/m/a' has no name"):
        build_label_table(annotations, classes, out, descriptions=unnamed)
    with pytest.raises(LabelError, match=r"missing.txt"):
        build_label_table(annotations, str(tmp_path / "missing.txt"), out)
    with pytest.raises(LabelError, match="no annotation files"):
        build_label_table([], classes, out)
    with pytest.raises(LabelError, match=r"a.csv' is listed twice"):
        build_label_table([annotations, annotations], classes, out)


def test_special_characters_in_a_file_name(tmp_path: Path) -> None:
    folder = tmp_path / "it's [1]*"
    folder.mkdir()
    report = build(folder, HEADER + f"{image(1)},v,/m/a,1\n")
    assert report.table.num_annotations == 1


@pytest.mark.parametrize("options", [{"conflict": "both"}, {"image_ids": "any"}, {"threads": -1}])
def test_settings_are_checked(options: dict) -> None:
    with pytest.raises(LabelError, match=rf"{next(iter(options))} is .* allowed"):
        LabelSettings(**options)


def test_unwritable_output_fails_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    annotations = write(tmp_path, "a.csv", HEADER + f"{image(1)},v,/m/a,1\n")
    classes = write(tmp_path, "c.txt", "/m/a\n")
    calls: list[int] = []
    with pytest.raises(storage.StorageError, match=r"t.rejects.parquet"):
        build_label_table(
            annotations, classes, str(tmp_path / "file" / "t.arrow"), progress=lambda _, rows: calls.append(rows)
        )
    assert calls == []


def test_progress_counts_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    build(tmp_path, HEADER + f"{image(1)},v,/m/a,1\n" * 5, progress=lambda path, rows: calls.append((path, rows)))
    assert calls[-1] == (str(tmp_path / "annotations-0.csv"), 5)


def test_coco18() -> None:
    folder = shared("coco18", "2017_11")
    import tempfile

    with tempfile.TemporaryDirectory() as out:
        report = build_label_table(
            str(folder / "train" / "annotations-human.csv"),
            str(folder / "classes-trainable.txt"),
            out + "/t.arrow",
            descriptions=str(folder / "class-descriptions.csv"),
        )
        assert (report.table.num_annotations, report.rows, report.table.num_classes) == (13_528, 13_528, 18)
        with open(folder / "train" / "annotations-human.csv", newline="") as file:
            truth = {(row["ImageID"], row["LabelName"]): int(row["Confidence"]) for row in csv.DictReader(file)}
        assert pairs_of(report.table) == truth


def test_classes_of_v3(tmp_path: Path) -> None:
    folder = shared("openimages_v3", "2017_11")
    mids = (folder / "classes-trainable.txt").read_text().split()
    text = HEADER + "".join(f"{image(n)},v,{mid},{n % 2}\n" for n, mid in enumerate(mids))
    report = build_label_table(
        write(tmp_path, "a.csv", text),
        str(folder / "classes-trainable.txt"),
        str(tmp_path / "t.arrow"),
        descriptions=str(folder / "class-descriptions.csv"),
    )
    table = report.table
    assert (table.num_classes, len(set(table.names)), report.unnamed_classes) == (5000, 4947, 0)
    assert table.lookup(np.arange(5000)).cls.tolist() == list(range(5000))
