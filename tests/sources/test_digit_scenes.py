import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paml.sources import digit_scenes
from paml.sources.digit_scenes import DigitScenesError, write_digit_scenes

IMAGES = {"train": 60, "validation": 20, "test": 25}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "scenes"
    write_digit_scenes(folder, images=IMAGES, seed=3)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def states(path: Path) -> dict[tuple[str, str], int]:
    pairs = [((row["ImageID"], row["LabelName"]), int(row["Confidence"])) for row in rows(path)]
    assert len(dict(pairs)) == len(pairs), "a pair is annotated twice"
    return dict(pairs)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_classes_are_many_named_and_distinct(scenes: Path):
    mids = (scenes / "2017_11/classes-trainable.txt").read_text().split()
    with (scenes / "2017_11/class-descriptions.csv").open(newline="") as file:
        described = dict(csv.reader(file))
    assert len(mids) == len(set(mids)) >= 30
    assert list(described) == mids
    assert described["/m/0d7red"] == "red 7"
    assert (scenes / "2017_11/class-descriptions.csv").read_text().startswith('"/m/0d0red","red 0"\n')


@pytest.mark.parametrize("split", IMAGES)
def test_full_labels_boxes_and_pictures_agree(scenes: Path, split: str):
    truth = states(scenes / "full-labels" / split / "annotations-human.csv")
    files = sorted((scenes / "images" / split).iterdir())
    keys = {file.stem for file in files}
    assert len(files) == IMAGES[split]
    assert all(len(key) == 16 and set(key) <= set("0123456789abcdef") for key in keys)
    assert {key for key, _ in truth} == keys
    assert len(truth) == IMAGES[split] * len(digit_scenes.MIDS)

    boxes = rows(scenes / "boxes" / f"{split}.csv")
    positives = {pair for pair, state in truth.items() if state == 1}
    assert {(row["ImageID"], row["LabelName"]) for row in boxes} == positives
    assert len(boxes) == len(positives)
    for row in boxes:
        assert 0 <= float(row["XMin"]) < float(row["XMax"]) <= 1
        assert 0 <= float(row["YMin"]) < float(row["YMax"]) <= 1
    digits = Counter(key for key, _ in positives)
    assert set(digits.values()) <= {1, 2, 3, 4, 5}
    assert set(digits) == keys
    assert 1.8 < sum(digits.values()) / len(keys) < 3.4
    with Image.open(files[0]) as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (96, 96))


def test_train_annotations_are_sparse_and_true(scenes: Path):
    truth = states(scenes / "full-labels/train/annotations-human.csv")
    observed = states(scenes / "2017_11/train/annotations-human.csv")
    assert all(truth[pair] == state for pair, state in observed.items())
    positives = Counter(key for (key, _), state in observed.items() if state == 1)
    negatives = Counter(key for (key, _), state in observed.items() if state == 0)
    assert set(positives.values()) == {1}
    assert len(positives) == IMAGES["train"]
    assert set(negatives.values()) == {1, 2}
    for split in ("validation", "test"):
        name = f"{split}/annotations-human.csv"
        assert (scenes / "2017_11" / name).read_bytes() == (scenes / "full-labels" / name).read_bytes()


def test_the_ink_in_a_box_has_the_colour_of_its_class(scenes: Path):
    colour_of = dict(zip(digit_scenes.MIDS, [colour for _, colour in digit_scenes.CLASSES], strict=True))
    palette = np.array(list(digit_scenes.COLOURS.values()))
    right = []
    for row in rows(scenes / "boxes/test.csv"):
        with Image.open(scenes / "images/test" / f"{row['ImageID']}.jpg") as picture:
            edges = [round(float(row[edge]) * picture.width) for edge in ("XMin", "YMin", "XMax", "YMax")]
            pixels = np.asarray(picture.crop(edges), dtype=float).reshape(-1, 3)
        distance = np.abs(pixels[:, None] - palette).sum(axis=2)  # [pixels, colours]
        nearest = Counter(distance.argmin(axis=1)[distance.min(axis=1) < 90].tolist())
        right.append(list(digit_scenes.COLOURS)[nearest.most_common(1)[0][0]] == colour_of[row["LabelName"]])
    assert np.mean(right) > 0.9


def test_class_frequencies_have_a_long_tail():
    weights = np.sort(digit_scenes._class_weights(0))[::-1]
    assert weights.sum() == pytest.approx(1)
    assert weights[0] > 5 * weights[-1]


def test_no_digit_image_serves_two_splits():
    from sklearn.datasets import load_digits

    pools = digit_scenes._digits_of_splits()
    by_split = {split: [pixels.tobytes() for pool in parts for pixels in pool] for split, parts in pools.items()}
    assert sum(map(len, by_split.values())) == np.isin(load_digits().target, digit_scenes.DIGITS).sum()
    assert all(len(pool) >= 20 for parts in pools.values() for pool in parts)
    assert not set(by_split["train"]) & set(by_split["test"])
    assert not set(by_split["train"]) & set(by_split["validation"])
    assert not set(by_split["validation"]) & set(by_split["test"])


def test_same_settings_give_the_same_files_and_another_seed_others(scenes: Path, tmp_path: Path):
    write_digit_scenes(tmp_path / "again", images=IMAGES, seed=3)
    write_digit_scenes(tmp_path / "other", images=IMAGES, seed=4)
    assert contents(tmp_path / "again") == contents(scenes)
    keys = [{file.stem for file in folder.rglob("*.jpg")} for folder in (scenes, tmp_path / "other")]
    assert not keys[0] & keys[1]


def test_a_whole_folder_is_kept_and_a_cut_off_one_is_finished(scenes: Path, tmp_path: Path):
    folder = tmp_path / "scenes"
    shutil.copytree(scenes, folder)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    kept = write_digit_scenes(folder, images=IMAGES, seed=3)
    assert kept.kept
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before

    def cut(done: int, total: int) -> None:
        if done == 40:
            raise KeyboardInterrupt

    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        write_digit_scenes(part, images=IMAGES, seed=3, progress=cut)
    assert not (part / "scenes.json").exists()
    report = write_digit_scenes(part, images=IMAGES, seed=3)
    assert not report.kept
    assert contents(part) == contents(scenes)
    assert str(report).startswith(f"digit scenes written in {part}: 60 train, 20 validation, 25 test images, 32 ")


def test_progress_counts_every_scene(tmp_path: Path):
    calls = []
    write_digit_scenes(tmp_path / "s", images={"test": 7}, progress=lambda *call: calls.append(call))
    assert calls == [(done, 7) for done in range(1, 8)]


def test_a_folder_with_anything_else_is_refused_and_untouched(scenes: Path, tmp_path: Path):
    with pytest.raises(DigitScenesError, match="delete that folder or name another one"):
        write_digit_scenes(scenes, images=IMAGES, seed=5)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DigitScenesError, match="holds other files"):
        write_digit_scenes(tmp_path, images=IMAGES)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    assert json.loads((scenes / "scenes.json").read_text())["settings"]["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": {"dev": 3}}, r"'dev'; allowed are train, validation, test"),
        ({"images": {"train": 0}}, r"images\['train'\] is 0; give at least 1"),
        ({"images": {}}, "names no split"),
        ({"size": 20}, "size is 20 pixels"),
    ],
)
def test_settings_that_make_no_scenes_are_refused(tmp_path: Path, arguments: dict, message: str):
    with pytest.raises(DigitScenesError, match=message):
        write_digit_scenes(tmp_path / "s", **arguments)
    assert not (tmp_path / "s").exists()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(32, 200))
def test_digits_never_touch_each_other_and_lie_inside(seed: int, size: int):
    pools = digit_scenes._digits_of_splits()["train"]
    scene = digit_scenes._draw_scene(np.random.default_rng(seed), pools, digit_scenes._class_weights(0), size, False)
    assert len(set(scene.classes)) == len(scene.classes) == len(scene.boxes) >= 1
    ink = np.zeros((size, size), int)
    for left, right, top, bottom in scene.boxes:
        ink[round(top * size) : round(bottom * size), round(left * size) : round(right * size)] += 1
    assert ink.max() == 1
    assert scene.picture.size == (size, size)
