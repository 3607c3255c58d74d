"""`python -m paml.labels`: what it prints, writes and refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paml.labels import LabelTable, build_label_table, table_from_triples
from paml.labels.__main__ import main
from tests.labels.test_table import pairs_of


@pytest.fixture
def table(tmp_path: Path) -> LabelTable:
    keys, mids = ["a", "b", "c"], ["/m/a", "/m/b"]
    return table_from_triples(keys, mids, ["A", "B"], [0, 0, 1], [0, 1, 1], [1, 0, 1], str(tmp_path / "t.arrow"))


def test_each_command(table: LabelTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.txt").write_text("/m/b\n")
    (tmp_path / "images.txt").write_text("c\nb\n")
    part, rest, whole = (str(tmp_path / name) for name in ("part.arrow", "rest.arrow", "whole.arrow"))
    assert main(["info", table.path]) == 0
    assert "3 images, 1 of them without a label\n3 labels: 2 positive, 1 negative\n" in capsys.readouterr().out
    lists = ["--classes", str(tmp_path / "classes.txt"), "--images", str(tmp_path / "images.txt")]
    assert main(["cut", table.path, part, *lists]) == 0
    assert pairs_of(LabelTable.open(part)) == {("b", "/m/b"): 1}
    assert LabelTable.open(part).keys() == ["b", "c"]
    assert main(["split", table.path, f'["{part}", "{rest}"]', "[0.5, 0.5]", "--seed", "1"]) == 0
    assert main(["merge", f'["{part}", "{rest}"]', whole]) == 0
    assert LabelTable.open(whole).digest == table.digest
    assert main(["csv", table.path, str(tmp_path / "t.csv"), "--classes", str(tmp_path / "c.csv")]) == 0
    report = build_label_table(str(tmp_path / "t.csv"), str(tmp_path / "c.csv"), str(tmp_path / "again.arrow"))
    assert report.annotations == 3


def test_what_is_wrong_is_said_with_status_1(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    (tmp_path / "x").write_text("no table")
    for name, said in (("x", "is not a whole Arrow file"), ("absent", "absent")):
        command = [sys.executable, "-m", "paml.labels", "info", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr
