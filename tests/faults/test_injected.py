"""Invariant 2 under injected faults: each is found and named, nothing wrong is delivered, only the damaged is lost.

The long run over thousands of each kind is tests/soak/test_faults.py.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from paml.shards import CorruptSample, Manifest, ShardReader
from tests.helpers.faults import KINDS, Prepared, draw_faults, in_bucket, judge, judge_all, prepare, report
from tests.shards.images import flip_byte


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("faults") / "sound")


def test_every_injected_fault_is_found_and_named_and_hurts_nothing_else(prepared: Prepared) -> None:
    faults = draw_faults(prepared, per_kind=11, seed=3)
    assert len(faults) == 11 * len(KINDS) > 300
    table, through = judge_all(prepared, faults)
    assert not through, report(table)
    assert all(row.found == row.named == row.injected == 11 for row in table.values())
    assert {kind for kind, row in table.items() if row.refused} == {
        *("bit flip in the manifest", "manifest cut", "wrong counts of shards in a sealed manifest"),
        *("rows doubled or left out in a sealed manifest", "bit flip in the label table", "label table cut"),
        "wrong counts in a sealed label table",
    }


def test_the_judge_sees_a_sound_folder_as_such_and_blind_reading_as_wrong(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [fault for fault in draw_faults(prepared, per_kind=2) if fault.kind == "bit flip in tar bodies"]
    for module in ("reader", "verify"):
        monkeypatch.setattr(f"paml.shards.{module}.crc32_of", lambda data: Blind())
    table, through = judge_all(prepared, faults)
    assert table["bit flip in tar bodies"].wrong == len(through) == len(faults)


class Blind(int):
    """A checksum that equals every other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def test_a_shard_that_is_cut_while_it_is_open_loses_what_was_cut_and_nobody_dies(prepared: Prepared) -> None:
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
                with pytest.raises(CorruptSample, match=f"{key}.*was cut"):
                    reader.read(row)
    finally:
        path.write_bytes(before)


@pytest.mark.slow
def test_faults_in_a_bucket_are_found_and_hurt_nothing_else(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAML_CACHE", str(tmp_path / "cache"))
    prepared = in_bucket(prepare(tmp_path / "sound", images=24), f"{bucket}/data")
    faults = draw_faults(prepared, per_kind=3, seed=9)
    for number, fault in enumerate(faults):
        outcome = judge(prepared, fault, str(tmp_path / f"cache-{number}"))
        assert outcome.found, fault.what
        assert outcome.named, fault.what
        assert outcome.wrong == outcome.unnamed == outcome.lost_beyond == 0, (fault.what, outcome)


def test_a_bit_that_changes_after_the_shard_was_opened_is_found(prepared: Prepared) -> None:
    manifest = Manifest.open(prepared.folder)
    reader = ShardReader(manifest)
    row = 5
    assert bytes(reader.read(row)) == prepared.images[manifest.key(row)]
    path = Path(manifest.shard_path(int(manifest.shard[row])))
    before = path.read_bytes()
    place = int(manifest.offset[row]) + 40
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes([before[place] ^ 4]))
    try:
        with pytest.raises(CorruptSample, match=manifest.key(row)):
            reader.read(row)
        assert bytes(reader.read(row - 1)) == prepared.images[manifest.key(row - 1)]
    finally:
        flip_byte(path, place, 4)
