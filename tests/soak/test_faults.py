"""10,000 faults or more, 500 of each kind, injected into a prepared folder; about five minutes on two cores.

    PAML_FAULT_REPORT=faults.md python -m pytest -m soak tests/soak/test_faults.py

PAML_FAULTS_PER_KIND sets the number per kind, PAML_FAULT_REPORT a file for the table.
"""

import os
import time
from pathlib import Path

import pytest

from tests.helpers.faults import KINDS, draw_faults, judge_all, prepare, report


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_ten_thousand_injected_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    per_kind = int(os.environ.get("PAML_FAULTS_PER_KIND", "500"))
    start = time.monotonic()
    prepared = prepare(tmp_path / "sound")
    faults = draw_faults(prepared, per_kind, seed=2)
    table, missed = judge_all(prepared, faults)
    size = sum(len(data) for data in prepared.files.values())
    head = (
        f"{len(faults):,} faults of {len(KINDS)} kinds in {len(prepared.images)} images, {len(prepared.tars)} shards, "
        f"{size:,} bytes, {time.monotonic() - start:.0f} s\n\n"
    )
    with capsys.disabled():
        print("\n" + head + report(table))
    if path := os.environ.get("PAML_FAULT_REPORT"):
        Path(path).write_text(head + report(table) + "\n")
    assert not missed, "\n".join(missed[:50])
