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

from paml.errors import SettingsError
from paml.sources import digit_scenes
from paml.sources.digit_scenes import write_digit_scenes

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


def test_classes(scenes: Path):
    mids = (scenes / "2017_11/classes-trainable.txt").read_text().split()
    with (scenes / "2017_11/class-descriptions.csv").open(newline="") as file:
        described = dict(csv.reader(file))
    assert len(mids) == len(set(mids)) >= 30
    assert list(described) == mids
    assert described["/m/0d7red"] == "red 7"
    assert (scenes / "2017_11/class-descriptions.csv").read_text().startswith('"/m/0d0red","red 0"\n')


@pytest.mark.parametrize("split", IMAGES)
def test_full_labels_boxes_and_images_agree(scenes: Path, split: str):
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
    with Image.open(files[0]) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (96, 96))


def test_train_annotations(scenes: Path):
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


def test_color_of_the_ink_in_a_box(scenes: Path):
    color_of = dict(zip(digit_scenes.MIDS, [color for _, color in digit_scenes.CLASSES], strict=True))
    palette = np.array(list(digit_scenes.COLORS.values()))
    right = []
    for row in rows(scenes / "boxes/test.csv"):
        with Image.open(scenes / "images/test" / f"{row['ImageID']}.jpg") as image:
            edges = [round(float(row[edge]) * image.width) for edge in ("XMin", "YMin", "XMax", "YMax")]
            pixels = np.asarray(image.crop(edges), dtype=float).reshape(-1, 3)
        distance = np.abs(pixels[:, None] - palette).sum(axis=2)  # [pixels, colors]
        nearest = Counter(distance.argmin(axis=1)[distance.min(axis=1) < 90].tolist())
        right.append(list(digit_scenes.COLORS)[nearest.most_common(1)[0][0]] == color_of[row["LabelName"]])
    assert np.mean(right) > 0.9


def test_class_frequencies_are_long_tailed():
    weights = np.sort(digit_scenes._class_weights(0))[::-1]
    assert weights.sum() == pytest.approx(1)
    assert weights[0] > 5 * weights[-1]


def test_no_digit_image_is_in_two_splits():
    from sklearn.datasets import load_digits

    pools = digit_scenes._digits_of_splits()
    by_split = {split: [pixels.tobytes() for pool in parts for pixels in pool] for split, parts in pools.items()}
    assert sum(map(len, by_split.values())) == np.isin(load_digits(return_X_y=True)[1], digit_scenes.DIGITS).sum()
    assert all(len(pool) >= 20 for parts in pools.values() for pool in parts)
    assert not set(by_split["train"]) & set(by_split["test"])
    assert not set(by_split["train"]) & set(by_split["validation"])
    assert not set(by_split["validation"]) & set(by_split["test"])


def test_files_depend_on_the_seed_only(scenes: Path, tmp_path: Path):
    write_digit_scenes(tmp_path / "again", images=IMAGES, seed=3)
    write_digit_scenes(tmp_path / "other", images=IMAGES, seed=4)
    assert contents(tmp_path / "again") == contents(scenes)
    keys = [{file.stem for file in folder.rglob("*.jpg")} for folder in (scenes, tmp_path / "other")]
    assert not keys[0] & keys[1]


def test_complete_folder_is_unchanged_and_incomplete_one_is_finished(scenes: Path, tmp_path: Path):
    folder = tmp_path / "scenes"
    shutil.copytree(scenes, folder)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    again = write_digit_scenes(folder, images=IMAGES, seed=3)
    assert again.already_done
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before

    def interrupt(done: int, total: int) -> None:
        if done == 40:
            raise KeyboardInterrupt

    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        write_digit_scenes(part, images=IMAGES, seed=3, progress=interrupt)
    assert not json.loads((part / "scenes.json").read_text())["complete"]
    report = write_digit_scenes(part, images=IMAGES, seed=3)
    assert not report.already_done
    assert contents(part) == contents(scenes)
    assert str(report).startswith(f"digit scenes written in {part}: 60 train, 20 validation, 25 test images, 32 ")


def test_progress(tmp_path: Path):
    calls = []
    write_digit_scenes(tmp_path / "s", images={"test": 7}, progress=lambda *call: calls.append(call))
    assert calls == [(done, 7) for done in range(1, 8)]


def test_folder_with_other_content(scenes: Path, tmp_path: Path):
    with pytest.raises(SettingsError, match="'seed': 3"):
        write_digit_scenes(scenes, images=IMAGES, seed=5)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SettingsError, match="other files"):
        write_digit_scenes(tmp_path, images=IMAGES)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    assert json.loads((scenes / "scenes.json").read_text())["settings"]["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": {"dev": 3}}, r"'dev': 3}; it must be counts of train, validation, test"),
        ({"images": {"train": 0}}, r"images\['train'\] is 0"),
        ({"images": {}}, "images is {}"),
        ({"size": 20}, "size is 20; it must be 32 or more"),
    ],
)
def test_invalid_settings(tmp_path: Path, arguments: dict, message: str):
    with pytest.raises(SettingsError, match=message):
        write_digit_scenes(tmp_path / "s", **arguments)
    assert not (tmp_path / "s").exists()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(32, 200))
def test_digits_are_inside_and_do_not_touch(seed: int, size: int):
    pools = digit_scenes._digits_of_splits()["train"]
    weights = digit_scenes._class_weights(0)
    image, classes, boxes = digit_scenes._draw_scene(np.random.default_rng(seed), pools, weights, size, False)
    assert len(set(classes)) == len(classes) == len(boxes) >= 1
    ink = np.zeros((size, size), int)
    for left, right, top, bottom in boxes:
        ink[round(top * size) : round(bottom * size), round(left * size) : round(right * size)] += 1
    assert ink.max() == 1
    assert image.size == (size, size)
