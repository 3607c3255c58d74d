"""Invariant 2 under injected faults: each is detected and named, and only damaged images are lost.

tests/soak/test_faults.py injects thousands of each kind.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from paml.shards import CorruptSampleError, Manifest, ShardReader
from tests.helpers.faults import KINDS, Prepared, draw_faults, in_bucket, judge, judge_all, prepare, report
from tests.shards.images import flip_byte


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("faults") / "intact")


def test_every_fault_is_detected_and_only_damaged_images_are_lost(prepared: Prepared) -> None:
    faults = draw_faults(prepared, per_kind=11, seed=3)
    assert len(faults) == 11 * len(KINDS) > 300
    table, missed = judge_all(prepared, faults)
    assert not missed, report(table)
    assert all(row.detected == row.named == row.injected == 11 for row in table.values())
    assert {kind for kind, row in table.items() if row.refused} == {
        *("bit flip in the manifest", "manifest cut", "wrong shard counts in a manifest with a valid checksum"),
        *(
            "duplicate or missing rows in a manifest with a valid checksum",
            "bit flip in the label table",
            "label table cut",
        ),
        "wrong counts in a label table with a valid checksum",
    }


def test_judge_detects_missing_verification(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [fault for fault in draw_faults(prepared, per_kind=2) if fault.kind == "bit flip in tar bodies"]
    for module in ("reader", "verify"):
        monkeypatch.setattr(f"paml.shards.{module}.crc32_of", lambda data: AlwaysEqual())
    table, missed = judge_all(prepared, faults)
    assert table["bit flip in tar bodies"].wrong == len(missed) == len(faults)


class AlwaysEqual(int):
    """A checksum that equals every other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def test_truncation_of_an_open_shard_loses_only_the_truncated_images(prepared: Prepared) -> None:
    manifest = Manifest.open(prepared.folder)
    shard = int(np.argmax(np.bincount(manifest.shard)))
    rows = manifest.rows_of_shard(shard)
    path = Path(manifest.shard_path(shard))
    middle = (rows.start + rows.stop) // 2
    before, cut = path.read_bytes(), int(manifest.offset[middle])
    reader = ShardReader(manifest)
    reader.read(rows.start)
    os.truncate(path, cut)
    try:
        for row in range(rows.start, rows.stop):
            key = manifest.key(row)
            if row < middle:
                assert bytes(reader.read(row)) == prepared.images[key]
            else:
                with pytest.raises(CorruptSampleError, match=f"{key}.*truncated"):
                    reader.read(row)
    finally:
        path.write_bytes(before)


@pytest.mark.slow
def test_faults_in_a_bucket_are_detected_and_only_damaged_images_are_lost(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAML_CACHE", str(tmp_path / "cache"))
    prepared = in_bucket(prepare(tmp_path / "intact", images=24), f"{bucket}/data")
    faults = draw_faults(prepared, per_kind=3, seed=9)
    for number, fault in enumerate(faults):
        outcome = judge(prepared, fault, str(tmp_path / f"cache-{number}"))
        assert outcome.detected, fault.what
        assert outcome.named, fault.what
        assert outcome.wrong == outcome.unnamed == outcome.lost_intact == 0, (fault.what, outcome)


def test_bit_flip_after_the_shard_was_opened_is_detected(prepared: Prepared) -> None:
    manifest = Manifest.open(prepared.folder)
    reader = ShardReader(manifest)
    row = 5
    assert bytes(reader.read(row)) == prepared.images[manifest.key(row)]
    path = Path(manifest.shard_path(int(manifest.shard[row])))
    before = path.read_bytes()
    offset = int(manifest.offset[row]) + 40
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes([before[offset] ^ 4]))
    try:
        with pytest.raises(CorruptSampleError, match=manifest.key(row)):
            reader.read(row)
        assert bytes(reader.read(row - 1)) == prepared.images[manifest.key(row - 1)]
    finally:
        flip_byte(path, offset, 4)
