"""Random files and records: every parser ends in a result or a documented error, within a time limit."""

import io
import tarfile
import time
from pathlib import Path

import pytest

from paml.shards.index import index_shards
from tests.security import fuzz
from tests.security.targets import DOCUMENTED, TARGETS, folder_for, images

FOUND: dict[str, list[bytes]] = {
    # these broke a parser once
    "COCO JSON": [
        b'{"images": [{"id": 0, "file_name": "0.jpg"}], "annotations": [{"id": 0, "image_id": 0, "category_id": 1}], '
        b'"categories": [{"id": 1, "name": {"": {}}}]}',
    ],
    "class lists": [b"x" * 200_000, b"/m/01\r/m/02\x00"],
    "annotation CSV, files": [b"ImageID\rSource,LabelName,Confidence\n", b"ImageID,Source,LabelName,Confidence"],
    "journal segments": [b"[" * 100_000, b'{"schema_version": 1, "crc32": 0, "events": 5}', b"[]"],
    "run and model JSON": [
        bytes([which]) + text for which in range(4) for text in (b"[]", b"[" * 100_000, b'"x"', b"\xff")
    ],
    "checkpoints": [bytes([which]) + text for which in range(3) for text in (b"[]", b"[" * 100_000, b"\x80\x04K\x01.")],
    "VOC XML": [b'<?xml version="1.0" encoding="no-such"?><annotation/>'],
    "priors, CSV": [b"mid,prior\n\xff,1\n"],
    "pairs, Parquet": [b"PAR1", b"x" * 99 + b"PAR1"],
    "settings": [b"seed=!!python/object/apply:os.system ['true']", b"data.root=s3://a:b@c/d", b"run={class_path: x}"],
}  # fmt: skip


AGAIN = [("tar archives, indexed", 1, n) for n in (22, 45, 53, 201, 263)] + [
    ("weights files", 1, n) for n in (545, 902, 1239, 1289, 1776)
]
"""Former findings by parser, seed and number: names that are not UTF-8, an error without a message."""


@pytest.mark.parametrize(("target", "seed", "number"), AGAIN)
def test_former_findings_are_handled(target: str, seed: int, number: int, tmp_path: Path) -> None:
    assert fuzz.run_chunk(target, seed, number, 1, folder_for(target, str(tmp_path)))["findings"] == []


def test_a_member_whose_name_is_not_utf8_is_rejected_and_the_rest_is_indexed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("\udc80.jpg", "good.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(images()[0])
            tar.addfile(info, io.BytesIO(images()[0]))
    manifest = index_shards(tmp_path / "x.tar", tmp_path / "out")
    assert manifest.keys().to_pylist() == ["good"]
    assert "not valid UTF-8" in (tmp_path / "out" / "rejects.csv").read_text()


@pytest.mark.parametrize("target", FOUND)
def test_former_findings_stay_fixed(target: str, tmp_path: Path) -> None:
    for data in FOUND[target]:
        assert TARGETS[target].feed([data], folder_for(target, str(tmp_path))) == (0, 1), data[:80]


@pytest.mark.parametrize("target", TARGETS)
def test_a_few_inputs_of_each_parser(target: str, tmp_path: Path) -> None:
    count = min(64 * TARGETS[target].batch, 600) if TARGETS[target].batch > 1 else 12 if target != "settings" else 4
    done = fuzz.run_chunk(target, 5, 0, count, folder_for(target, str(tmp_path)))
    assert done["findings"] == []
    assert done["results"] + done["refused"] == count


@pytest.mark.soak
def test_more_inputs_of_each_parser_in_separate_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--count", "20000", "--seed", str(time.time_ns())]) == 0, capsys.readouterr().out


def test_a_parser_that_raises_hangs_or_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(inputs: list[bytes], folder: Path) -> tuple[int, int]:
        raise IndexError("out of range")

    def hangs(inputs: list[bytes], folder: Path) -> tuple[int, int]:
        while True:
            pass

    def dies(inputs: list[bytes], folder: Path) -> tuple[int, int]:
        import ctypes

        return ctypes.string_at(0), 0  # pyright: ignore[reportReturnType]

    def greedy(inputs: list[bytes], folder: Path) -> tuple[int, int]:
        return len(bytearray(8 << 30)), 0

    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    for feed, what in ((breaks, "IndexError"), (hangs, "more than"), (dies, "process died"), (greedy, "MemoryError")):
        monkeypatch.setitem(TARGETS, "broken", TARGETS["class lists"]._replace(feed=feed))
        (finding,) = fuzz.chunk_apart("broken", 0, 7, 1)["findings"]
        assert what in finding.what, finding
        assert (finding.target, finding.number) == ("broken", 7)


def test_an_input_is_reproducible_from_seed_parser_and_number() -> None:
    for target in TARGETS:
        assert fuzz.input_of(target, 3, 5) == fuzz.input_of(target, 3, 5)
    made = {fuzz.input_of("images", 3, number) for number in range(50)}
    assert len(made) > 40
    assert DOCUMENTED
