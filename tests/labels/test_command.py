"""`paml labels`: what each subcommand prints, writes and refuses."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paml.errors import PamlError, SettingsError
from paml.labels import LabelError, LabelTable, build_label_table, table_from_triples
from paml.labels.command import main
from paml.labels.edit import check_outputs
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


COMMANDS = {
    "info": ["info", "t.arrow"],
    "filter": ["filter", "t.arrow", "OUT", "--classes", "classes.txt", "--images", "images.txt"],
    "merge": ["merge", "t.arrow", "other.arrow", "OUT"],
    "split": ["split", "t.arrow", "OUT", "OUT2", "--fractions", "0.5", "0.5"],
    "to-csv": ["to-csv", "t.arrow", "OUT", "--classes", "OUT2"],
    "apply-verdicts": ["apply-verdicts", "t.arrow", "v.csv", "w.csv", "OUT"],
}
INPUTS = ("t.arrow", "other.arrow", "classes.txt", "images.txt", "v.csv", "w.csv")
CASES = [(name, file) for name, command in COMMANDS.items() for file in INPUTS if file in command]


@pytest.fixture
def folder(table: LabelTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with every input of COMMANDS."""
    monkeypatch.chdir(tmp_path)
    Path("other.arrow").write_bytes(Path("t.arrow").read_bytes())
    Path("classes.txt").write_text("/m/b\n")
    Path("images.txt").write_text("c\nb\n")
    for name, key in (("v.csv", "a"), ("w.csv", "b")):
        Path(name).write_text(f"ImageID,Source,LabelName,Confidence\n{key},verification,/m/a,1\n")
    return tmp_path


def files_of(folder: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def run(command: str, **replaced: str) -> None:
    names = {"OUT": "out.arrow", "OUT2": "out2.arrow", **replaced}
    main([names.get(argument, argument) for argument in COMMANDS[command]])


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def blank(path: Path) -> None:
    path.write_text("\n \n")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def other_text(path: Path) -> None:
    path.write_text("neither a table nor a list of it\n")


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(128, 256)))


def truncated_table(path: Path) -> None:
    path.write_bytes(Path("other.arrow" if path.name == "t.arrow" else "t.arrow").read_bytes()[:-100])


@pytest.mark.parametrize("damage", [missing, empty, blank, a_folder, other_text, binary, truncated_table])
@pytest.mark.parametrize(("command", "file"), CASES)
def test_unusable_inputs_are_named_in_one_line(
    folder: Path, command: str, file: str, damage: Callable[[Path], None]
) -> None:
    damage(Path(file))
    before = files_of(folder)
    with pytest.raises(PamlError, match=f"'{file}'") as caught:
        run(command)
    assert "\n" not in str(caught.value)
    assert files_of(folder) == before


SPELLINGS: dict[str, Callable[[str], str]] = {
    "equal": lambda name: name,
    "absolute": os.path.abspath,
    "dots": lambda name: f"sub/.././/{name}",
    "symlink": lambda name: os.symlink(name, "link") or "link",
    "symlinked folder": lambda name: os.symlink(".", "here") or f"here/{name}",
    "hard link": lambda name: os.link(name, "hard") or "hard",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("command", "file", "out"),
    [(command, file, out) for command, file in CASES for out in ("OUT", "OUT2") if out in COMMANDS[command]],
)
def test_an_input_is_never_overwritten(folder: Path, command: str, file: str, out: str, spelling: str) -> None:
    Path("sub").mkdir()
    name = SPELLINGS[spelling](file)
    before = files_of(folder)
    with pytest.raises(LabelError, match=f"overwrite the input '{file}'"):
        run(command, **{out: name})
    assert files_of(folder) == before


@pytest.mark.parametrize("command", ["split", "to-csv"])
@pytest.mark.parametrize("second", ["out.arrow", "./out.arrow", "here/out.arrow"])
@pytest.mark.parametrize("exists", [False, True])
def test_two_outputs_of_one_name_are_refused(folder: Path, command: str, second: str, exists: bool) -> None:
    Path("here").symlink_to(".")
    if exists:
        Path("out.arrow").write_text("old")
    before = files_of(folder)
    with pytest.raises(LabelError, match=r"'out.arrow' and .* same file"):
        run(command, OUT2=second)
    assert files_of(folder) == before


@pytest.mark.parametrize("out", ["", ".", "sub", "sub/", "new/", "s3://bucket", "s3://bucket/", "s3://bucket/sub/"])
@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "info"])
def test_an_output_that_is_a_folder_is_refused(folder: Path, command: str, out: str) -> None:
    Path("sub").mkdir()
    before = files_of(folder)
    with pytest.raises(LabelError, match=f"'{out}' is a folder"):
        run(command, **{"OUT2" if "OUT2" in COMMANDS[command] else "OUT": out})
    assert files_of(folder) == before


def test_verdict_files_are_not_overwritten_by_the_rejects(folder: Path) -> None:
    Path("v.csv").rename("new.rejects.parquet")
    before = files_of(folder)
    with pytest.raises(LabelError, match=r"overwrite the input 'new.rejects.parquet'"):
        main(["apply-verdicts", "t.arrow", "new.rejects.parquet", "new.arrow"])
    assert files_of(folder) == before


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3), st.data())
def test_urls_of_one_object_are_one_file(parts: list[str], data: st.DataObject) -> None:
    url = "s3://bucket/" + "/".join(parts)
    slashes = [data.draw(st.sampled_from(["/", "//", "/./", "/x/../"])) for _ in parts]
    other = "s3://bucket" + "".join(slash + part for slash, part in zip(slashes, parts, strict=True))
    with pytest.raises(LabelError, match="overwrite the input"):
        check_outputs([other], [url])
    with pytest.raises(LabelError, match="same file"):
        check_outputs([url, other], [])
    check_outputs([url, f"{url}2"], [f"s3://other{url.removeprefix('s3://bucket')}"])


def test_lists_are_read_as_text_editors_write_them(folder: Path) -> None:
    Path("images.txt").write_bytes("\ufeffc\r\n\r\nb".encode())
    run("filter")
    assert LabelTable.open("out.arrow").keys() == ["b", "c"]
