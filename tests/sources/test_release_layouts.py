"""Open Images as people have it: in FiftyOne's folders, without trainable classes, with suffixes at the ImageIDs."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml import storage
from paml.errors import DataError
from paml.labels import LabelSettings, build_label_table
from paml.labels.build import LabelReport
from paml.sources.release import (
    BASE,
    SPLITS,
    ReleaseFiles,
    detect_openimages,
    find_release_files,
    images_folder_of,
)
from tests.labels.test_table import pairs_of
from tests.sources.test_release import PUBLISHED

HEADER = "ImageID,Source,LabelName,Confidence\n"
IDS = ["000a1b2c3d4e5f60", "000a1b2c3d4e5f61"]
ROWS = f"{IDS[0]},verification,/m/b,1\n{IDS[0]},verification,/m/a,0\n{IDS[1]},crowdsource-verification,/m/a,1\n"
BOXABLE = '/m/a,Apple\n/m/b,"Bell, small"\n'


def write(root: str | Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        storage.write_bytes(storage.join(str(root), name), text.encode())
    return str(root)


def fiftyone(split: str, metadata: str = "{split}/metadata") -> dict[str, str]:
    """The files that `foz.load_zoo_dataset("open-images-v7", split=..., label_types=["classifications"])` leaves."""
    return {
        f"{split}/labels/classifications.csv": HEADER + ROWS,
        f"{split}/data/{IDS[0]}.jpg": "",
        f"{split}/metadata/image_ids.csv": f"ImageID,Subset,OriginalURL\n{IDS[0]},{split},http://x\n",
        f"{metadata.replace('{split}', split)}/classes.csv": BOXABLE,
        f"{metadata.replace('{split}', split)}/hierarchy.json": "{}",
        "info.json": "{}",
    }


def build(found: ReleaseFiles, out: Path, settings: LabelSettings | None = None) -> LabelReport:
    return build_label_table(
        found.annotations, found.classes, str(out), descriptions=found.descriptions, settings=settings
    )


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("place", ["{split}/metadata", "metadata", "test/metadata"])
@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_fiftyone_folders(split: str, place: str, where: str, tmp_path: Path, request) -> None:
    root = str(tmp_path / "open-images-v7") if where == "folder" else request.getfixturevalue("s3") + "/oi"
    write(root, fiftyone(split, place))
    found = find_release_files(root, split)
    classes = f"{root}/{place.replace('{split}', split)}/classes.csv"
    labels, images = (f"{root}/{split}/{name}" for name in ("labels/classifications.csv", "metadata/image_ids.csv"))
    assert found == ReleaseFiles(labels, classes, classes, images)
    assert images_folder_of(root, split) == f"{root}/{split}/data"
    assert f"{split}/labels/classifications.csv" in (detect_openimages(root) or "")
    table = build(found, tmp_path / "table.arrow").table
    assert table.classes == ("/m/a", "/m/b")
    assert table.names == ("Apple", "Bell, small")
    assert pairs_of(table) == {(IDS[0], "/m/b"): 1, (IDS[0], "/m/a"): 0, (IDS[1], "/m/a"): 1}


def test_incomplete_fiftyone_folders(tmp_path: Path) -> None:
    root = write(tmp_path, fiftyone("validation"))
    assert images_folder_of(root, "train") is None
    with pytest.raises(DataError, match=r"no annotations of 'train'.*train/labels/classifications.csv.*\[validation\]"):
        find_release_files(root, "train")
    with pytest.raises(DataError, match=r"validation is a single split.*validation/"):
        find_release_files(f"{root}/validation", "validation")
    (tmp_path / "validation/metadata/classes.csv").unlink()
    with pytest.raises(DataError, match=f"no metadata/classes.csv.*{BASE}/v5/class-descriptions-boxable.csv"):
        find_release_files(root, "validation")


def test_fiftyone_folders_next_to_a_release(tmp_path: Path) -> None:
    annotations, classes = PUBLISHED["v7", "validation"]
    root = write(tmp_path, {**fiftyone("validation"), annotations: HEADER, classes: "/m/a\n"})
    with pytest.raises(DataError, match=r"several releases \(v7, FiftyOne's\)"):
        find_release_files(root, "validation")


@pytest.mark.parametrize(("release", "files"), PUBLISHED.items())
def test_without_trainable_classes_all_described_ones_are_used(release, files, tmp_path: Path) -> None:
    annotations, trainable = files
    descriptions = trainable.replace("classes-trainable.txt", "class-descriptions.csv")
    header = "LabelName,DisplayName\n" if release[0] in ("v6", "v7") else ""
    root = write(tmp_path, {annotations: HEADER + ROWS, descriptions: header + "/m/b,Bell\n/m/a,Apple\n/m/c,Cup\n"})
    found = find_release_files(root, release[1])
    assert found.classes == found.descriptions == f"{root}/{descriptions}"
    assert build(found, tmp_path / "table.arrow").table.names == ("Bell", "Apple", "Cup")
    write(tmp_path, {trainable: "/m/a\n/m/b\n"})
    found = find_release_files(root, release[1])
    assert (found.classes, found.descriptions) == (f"{root}/{trainable}", f"{root}/{descriptions}")
    assert build(found, tmp_path / "table.arrow").table.names == ("Apple", "Bell")


def test_trainable_classes_win_over_descriptions_of_another_release(tmp_path: Path) -> None:
    # V4, V5 and V6 share the names of the validation files.
    names = ("validation-annotations-human-imagelabels.csv", "oidv6-classes-trainable.txt", "class-descriptions.csv")
    root = write(tmp_path, dict.fromkeys(names, ""))
    found = find_release_files(root, "validation")
    assert found == ReleaseFiles(f"{root}/{names[0]}", f"{root}/{names[1]}", None, None)


def test_without_descriptions_classes_are_named_by_their_ids(tmp_path: Path) -> None:
    root = write(tmp_path, {"classes-trainable.txt": "/m/a\n/m/b\n", "train/annotations-human.csv": HEADER + ROWS})
    found = find_release_files(root, "train")
    assert found.descriptions is None
    report = build(found, tmp_path / "table.arrow")
    assert report.table.names == report.table.classes == ("/m/a", "/m/b")
    assert report.unnamed_classes == 2


@pytest.mark.parametrize(("release", "files"), PUBLISHED.items())
@pytest.mark.parametrize("layout", ["server", "flat", "split"])
def test_releases_are_detected(release, files, layout: str, tmp_path: Path) -> None:
    path = files[0]
    if layout == "flat" and release[0] != "v3":
        path = Path(path).name
    if layout == "split":
        path = f"{release[1]}/{Path(path).name}"
    root = write(tmp_path / "release", {path: HEADER + ROWS})
    assert path in (detect_openimages(root) or "")
    assert detect_openimages(f"{root}/{path}") is None
    assert detect_openimages(str(tmp_path)) is None


def test_other_folders_are_not_detected(tmp_path: Path, s3: str) -> None:
    other = {"labels.csv": "image,class\n", "train/annotations.csv": HEADER, "labels/classifications.csv": HEADER}
    for root in (write(tmp_path / "other", other), write(s3 + "/other", other)):
        assert detect_openimages(root) is None
    for path in (str(tmp_path / "absent"), s3 + "/absent", "", "a\0b"):
        assert detect_openimages(path) is None


@given(
    suffixes=st.lists(st.sampled_from(["", ".jpg", ".JPG", ".jpeg", ".Jpeg"]), min_size=3, max_size=3),
    quote=st.booleans(),
    name=st.sampled_from(["000a1b2c3d4e5f6{}", "img.{}", "jpg{}"]),
)
@settings(max_examples=40, deadline=None)
def test_image_ids_may_have_the_suffix_of_their_file(suffixes, quote: bool, name: str, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("ids")
    labels = [(name.format(number), cls, state) for number, cls, state in ((0, "a", 1), (0, "b", 0), (1, "a", 1))]
    mark = '"' if quote else ""
    rows = [
        ",".join(f"{mark}{cell}{mark}" for cell in (key + suffix, "verification", cls, str(state)))
        for (key, cls, state), suffix in zip(labels, suffixes, strict=True)
    ]
    root = write(folder, {"train/annotations-human.csv": HEADER + "\n".join(rows), "classes-trainable.txt": "a\nb\n"})
    report = build(find_release_files(root, "train"), folder / "table.arrow")
    assert pairs_of(report.table) == {(key, cls): state for key, cls, state in labels}
    assert report.suffixes_cut == sum(map(bool, suffixes))
    assert ("with .jpg" in str(report)) == any(suffixes)


def test_other_ids_are_not_changed(tmp_path: Path) -> None:
    ids = ["a.png", "a.jpg.b", "jpg", "000A1B2C3D4E5F60"]
    text = "".join(f"{key},verification,a,1\n" for key in ids)
    root = write(tmp_path, {"train/annotations-human.csv": HEADER + text, "classes-trainable.txt": "a\n"})
    found = find_release_files(root, "train")
    report = build(found, tmp_path / "table.arrow")
    assert sorted(report.table.keys()) == sorted(ids)
    assert report.suffixes_cut == 0
    write(tmp_path, {"train/annotations-human.csv": HEADER + f"{IDS[0]}.jpg,verification,a,1\n.jpg,verification,a,1\n"})
    report = build(found, tmp_path / "table.arrow", LabelSettings(image_ids="hex"))
    assert report.table.keys() == IDS[:1]
    assert report.rejected["malformed_row"] == 1
