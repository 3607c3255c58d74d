"""`paml labels`: what each subcommand prints, writes and refuses."""

from pathlib import Path

import pytest

from paml.errors import SettingsError
from paml.labels import LabelError, LabelTable, build_label_table, table_from_triples
from paml.labels.command import main
from tests.labels.test_table import pairs_of


@pytest.fixture
def table(tmp_path: Path) -> LabelTable:
    keys, mids = ["a", "b", "c"], ["/m/a", "/m/b"]
    return table_from_triples(keys, mids, ["A", "B"], [0, 0, 1], [0, 1, 1], [1, 0, 1], str(tmp_path / "t.arrow"))


def test_each_subcommand(table: LabelTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.txt").write_text("/m/b\n")
    (tmp_path / "images.txt").write_text("c\nb\n")
    part, rest, whole = (str(tmp_path / name) for name in ("part.arrow", "rest.arrow", "whole.arrow"))
    main(["info", table.path])
    assert "3 images, 1 without a label\n3 labels: 2 positive, 1 negative\n" in capsys.readouterr().out
    lists = ["--classes", str(tmp_path / "classes.txt"), "--images", str(tmp_path / "images.txt")]
    main(["filter", table.path, part, *lists])
    assert pairs_of(LabelTable.open(part)) == {("b", "/m/b"): 1}
    assert LabelTable.open(part).keys() == ["b", "c"]
    main(["split", table.path, part, rest, "--fractions", "0.5", "0.5", "--seed", "1"])
    main(["merge", part, rest, whole])
    assert LabelTable.open(whole).digest == table.digest
    main(["to-csv", table.path, str(tmp_path / "t.csv"), "--classes", str(tmp_path / "c.csv")])
    report = build_label_table(str(tmp_path / "t.csv"), str(tmp_path / "c.csv"), str(tmp_path / "again.arrow"))
    assert report.table.num_annotations == 3


def test_errors(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no table")
    with pytest.raises(LabelError, match="x' is not"):
        main(["info", str(tmp_path / "x")])
    with pytest.raises(LabelError, match="absent"):
        main(["info", str(tmp_path / "absent")])
    with pytest.raises(SettingsError, match="unknown"):
        main(["unknown"])
    with pytest.raises(SettingsError, match="fractions"):
        main(["split", "a.arrow", "b.arrow"])
