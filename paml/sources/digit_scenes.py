"""Synthetic demo data: scenes of scikit-learn's handwritten digits, labeled like Open Images V3.

Every scene has one to five digits of distinct classes on a textured background; a class is a digit in a color
("red 7"). No digit image is used in two splits. The files have the layout of an Open Images V3 release, plus full
labels and boxes::

    images/{split}/{ImageID}.jpg
    2017_11/classes-trainable.txt, 2017_11/class-descriptions.csv
    2017_11/{split}/annotations-human.csv       train: sparse; validation and test: every class
    full-labels/{split}/annotations-human.csv   every class of every split
    boxes/{split}.csv                           one row per digit
    scenes.json                                 settings, and whether the folder is complete
"""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from paml import storage
from paml.errors import SettingsError, check_setting
from paml.labels.class_list import write_class_list
from paml.parsing import read_json

VERSION = 3
SPLITS = {"train": 0.6, "validation": 0.15, "test": 0.25}  # fraction of the digit images of each split
DEFAULT_IMAGES = {"train": 2400, "validation": 600, "test": 900}
COLORS = {
    "red": (215, 30, 35),
    "yellow": (250, 220, 40),
    "green": (20, 150, 55),
    "cyan": (60, 220, 230),
    "blue": (35, 65, 230),
    "pink": (245, 100, 205),
    "white": (252, 252, 252),
    "black": (8, 8, 8),
}
DIGITS = (0, 1, 4, 7)  # the others are too similar for a network trained from scratch for minutes
CLASSES = tuple((digit, color) for color in COLORS for digit in DIGITS)
MIDS = tuple(f"/m/0d{digit}{color}" for digit, color in CLASSES)
NAMES = tuple(f"{color} {digit}" for digit, color in CLASSES)

DIGIT_COUNT_PROBS = (0.12, 0.22, 0.28, 0.24, 0.14)  # of scenes with 1, 2, 3, 4 and 5 digits
NEGATIVE_COUNT_PROBS = (0.3, 0.4, 0.3)  # of train scenes with 0, 1 and 2 observed negatives
TAIL_OFFSET = 6.0  # the class of rank r (from 0) has the weight 1 / (r + TAIL_OFFSET)
DIGIT_HEIGHTS = (0.38, 0.46)  # of a digit before it is rotated, as fractions of the image side
SINGLE_HEIGHTS = (0.6, 0.74)  # of the only digit of an image
PLACEMENT_TRIES = 60

SCENES_FILE = "scenes.json"
ANNOTATION_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence")
BOX_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax")

Box = tuple[float, float, float, float]
"""x_min, x_max, y_min and y_max of a digit, as fractions of the side."""


@dataclass(frozen=True, kw_only=True)
class SceneReport:
    """What `write_digit_scenes` wrote, or an earlier call."""

    folder: str
    images: dict[str, int]
    """Scenes of each split."""
    already_done: bool
    """The folder was already complete: nothing was written."""

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {split}" for split, count in self.images.items())
        action = "found" if self.already_done else "written"
        return f"digit scenes {action} in {self.folder}: {counts} images, {len(MIDS)} classes"


def write_digit_scenes(
    out: str | os.PathLike[str],
    *,
    images: Mapping[str, int] | None = None,
    size: int = 96,
    seed: int = 0,
    single: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SceneReport:
    """Write scenes of handwritten digits as JPEG files and Open Images V3 CSV under the folder `out`.

    images: scenes of each split (train, validation, test), by default 2,400, 600 and 900.
    size: side of the square images in pixels.
    single: one large digit per scene, with classes of equal frequency, to pretrain a backbone.
    progress: called with (scenes done, all scenes) after each scene.

    The same settings give the same files. A complete folder of the same settings is not changed, an incomplete one
    is written again. Raises SettingsError for invalid settings or a folder with other content, OSError if it
    cannot be written.
    """
    counts = dict(DEFAULT_IMAGES if images is None else images)
    _check_settings(counts, size)
    settings = {"version": VERSION, "images": counts, "size": size, "seed": seed, "single": single}
    folder = Path(out)
    if _is_complete(folder, settings):
        return SceneReport(folder=str(folder), images=counts, already_done=True)

    digits = _digits_of_splits()
    weights = np.full(len(CLASSES), 1 / len(CLASSES)) if single else _class_weights(seed)
    _write_classes(folder / "2017_11")
    done, total = 0, sum(counts.values())
    for split, count in counts.items():
        truth_rows: list[tuple[str, str, str, int]] = []
        sparse_rows: list[tuple[str, str, str, int]] = []
        box_rows: list[tuple[Any, ...]] = []
        image_folder = folder / "images" / split
        image_folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            key = hashlib.sha256(f"{seed}/{split}/{index}".encode()).hexdigest()[:16]
            rng = np.random.default_rng([seed, list(SPLITS).index(split), index])
            image, classes, boxes = _draw_scene(rng, digits[split], weights, size, single)
            image.save(image_folder / f"{key}.jpg", quality=92)
            present = set(classes)
            truth_rows += [(key, "verification", mid, int(c in present)) for c, mid in enumerate(MIDS)]
            for cls, state in _observe(rng, classes, weights):
                sparse_rows.append((key, "verification", MIDS[cls], state))
            for cls, box in zip(classes, boxes, strict=True):
                box_rows.append((key, "xclick", MIDS[cls], 1, *(f"{edge:.6f}" for edge in box)))
            done += 1
            if progress is not None:
                progress(done, total)
        sparse = sparse_rows if split == "train" else truth_rows
        _write_csv(folder / "2017_11" / split / "annotations-human.csv", ANNOTATION_COLUMNS, sparse)
        _write_csv(folder / "full-labels" / split / "annotations-human.csv", ANNOTATION_COLUMNS, truth_rows)
        _write_csv(folder / "boxes" / f"{split}.csv", BOX_COLUMNS, box_rows)

    _write_marker(folder, settings, complete=True)
    return SceneReport(folder=str(folder), images=counts, already_done=False)


def _check_settings(counts: Mapping[str, int], size: int) -> None:
    check_setting(bool(counts) and set(counts) <= set(SPLITS), "images", counts, f"counts of {', '.join(SPLITS)}")
    for split, count in counts.items():
        check_setting(count >= 1, f"images[{split!r}]", count, "1 or more; or leave the split out")
    check_setting(size >= 32, "size", size, "32 or more pixels: smaller digits are not legible")


def _is_complete(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder is complete; if it is new, it is marked as incomplete."""
    marker = folder / SCENES_FILE
    if not marker.exists():
        if folder.exists() and any(folder.iterdir()):
            raise SettingsError(f"{folder} has other files: name a new or empty folder for the digit scenes")
        _write_marker(folder, settings, complete=False)
        return False
    written = read_json(str(marker), "delete that folder")
    if written.get("settings") != settings:
        raise SettingsError(
            f"{folder} has digit scenes with the settings {written.get('settings')}, requested are {settings}: delete "
            "that folder or name another one"
        )
    return written.get("complete") is True


def _write_marker(folder: Path, settings: dict[str, Any], *, complete: bool) -> None:
    text = json.dumps({"settings": settings, "complete": complete}, indent=2) + "\n"
    storage.write_bytes(str(folder / SCENES_FILE), text.encode())


def _digits_of_splits() -> dict[str, list[list[np.ndarray]]]:
    """The images of each of DIGITS, uint8 [8, 8], by split; no image is in two splits.

    The splits are the same for every seed: a network trained on the training split of one set has not seen the
    handwriting of another set's test split.
    """
    from sklearn.datasets import load_digits

    images, digit_of = load_digits(return_X_y=True)
    pixels = np.minimum(images.reshape(-1, 8, 8) * 16, 255).astype(np.uint8)
    rng = np.random.default_rng([0, 100])
    pools: dict[str, list[list[np.ndarray]]] = {split: [] for split in SPLITS}
    ends = np.cumsum(list(SPLITS.values()))[:-1]
    for digit in DIGITS:
        rows = rng.permutation(np.flatnonzero(digit_of == digit))
        parts = np.split(rows, np.round(ends * len(rows)).astype(int))
        for split, part in zip(SPLITS, parts, strict=True):
            pools[split].append([pixels[row] for row in part])
    return pools


def _class_weights(seed: int) -> np.ndarray:
    """Probability of each class: float64[K], sum 1, long-tailed; the seed decides which are rare."""
    ranks = np.random.default_rng([seed, 101]).permutation(len(CLASSES))
    weights = 1.0 / (ranks + TAIL_OFFSET)
    return weights / weights.sum()


def _observe(rng: np.random.Generator, present: Sequence[int], weights: np.ndarray) -> list[tuple[int, int]]:
    """(class, state) of one positive of the scene and zero to two negatives, frequent classes more often."""
    absent = weights.copy()
    absent[list(present)] = 0
    count = rng.choice(len(NEGATIVE_COUNT_PROBS), p=NEGATIVE_COUNT_PROBS)
    negatives = rng.choice(len(weights), size=count, replace=False, p=absent / absent.sum())
    return sorted([(int(rng.choice(present)), 1), *((int(cls), 0) for cls in negatives)])


def _draw_scene(
    rng: np.random.Generator, digits: list[list[np.ndarray]], weights: np.ndarray, size: int, single: bool
) -> tuple[Image.Image, list[int], list[Box]]:
    """(image, class of each digit, their boxes)."""
    image = _draw_background(rng, size)
    count = 1 if single else 1 + rng.choice(len(DIGIT_COUNT_PROBS), p=DIGIT_COUNT_PROBS)
    heights = SINGLE_HEIGHTS if single else DIGIT_HEIGHTS
    classes: list[int] = []
    boxes: list[Box] = []
    for cls in rng.choice(len(weights), size=count, replace=False, p=weights):
        digit, color = CLASSES[cls]
        pool = digits[DIGITS.index(digit)]
        mask = _digit_mask(rng, pool[rng.integers(len(pool))], size, heights)
        corner = _find_free_corner(rng, mask.size, size, boxes)
        if corner is None:
            continue
        x, y = corner
        tint = np.clip(np.asarray(COLORS[color]) + rng.normal(0, 14, 3), 0, 255).astype(int)
        image.paste(tuple(tint.tolist()), (x, y), mask)
        classes.append(int(cls))
        boxes.append((x / size, (x + mask.width) / size, y / size, (y + mask.height) / size))
    return image, classes, boxes


def _draw_background(rng: np.random.Generator, size: int) -> Image.Image:
    """A color gradient with coarse and fine noise, and random strokes."""
    tone = rng.uniform(70, 150) + rng.normal(0, 18, (2, 2, 1)) + rng.normal(0, 8, (2, 2, 3))
    coarse = rng.normal(0, 12, (7, 7, 1)) + rng.normal(0, 6, (7, 7, 3))
    background = _enlarge(tone, size) + _enlarge(coarse, size)
    background += rng.normal(0, rng.uniform(2, 9), (size, size, 1)).astype(np.float32)
    image = Image.fromarray(np.clip(background, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(0, size, 2)
        dx, dy = rng.normal(0, 0.16 * size, 2)
        ink = tuple(rng.integers(0, 256, 3).tolist())
        width = int(rng.integers(1, max(2, size // 28) + 1))
        if rng.random() < 0.6:
            pen.line((x, y, x + dx, y + dy), fill=ink, width=width)
        else:
            reach = abs(dx) + 3
            pen.arc((x - reach, y - reach, x + reach, y + reach), *rng.uniform(0, 360, 2), fill=ink, width=width)
    return image


def _enlarge(grid: np.ndarray, size: int) -> np.ndarray:
    """Smoothly enlarge [h, w, 3] to float32 [size, size, 3]."""
    channels = np.moveaxis(np.broadcast_to(grid, (*grid.shape[:2], 3)).astype(np.float32), 2, 0)
    wide = [Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC) for channel in channels]
    return np.stack([np.asarray(channel) for channel in wide], axis=2)


def _digit_mask(rng: np.random.Generator, pixels: np.ndarray, size: int, heights: tuple[float, float]) -> Image.Image:
    """8-bit opacity: the digit smoothly enlarged, slightly rotated, cropped to its ink."""
    height = size * rng.uniform(*heights)
    ink = np.flatnonzero(pixels.any(axis=1))
    side = round(height * 12 / (ink[-1] - ink[0] + 1))  # padded by 2 on each side, so rotation cuts no ink off
    glyph = Image.fromarray(np.pad(pixels, 2)).resize((side, side), Image.Resampling.BICUBIC)
    glyph = glyph.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)
    mask = glyph.point([min(255, max(0, (level - 60) * 3 // 2)) for level in range(256)])
    return mask.crop(mask.getbbox())


def _find_free_corner(
    rng: np.random.Generator,
    extent: tuple[int, int],
    size: int,
    boxes: Sequence[Box],
) -> tuple[int, int] | None:
    """Top left corner at which a digit of this width and height touches no other, or None."""
    width, height = extent
    for _ in range(PLACEMENT_TRIES):
        x, y = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        left, right, top, bottom = x / size, (x + width) / size, y / size, (y + height) / size
        if all(right <= a or left >= b or bottom <= c or top >= d for a, b, c, d in boxes):
            return x, y
    return None


def _write_classes(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes-trainable.txt").write_text("".join(f"{mid}\n" for mid in MIDS))
    write_class_list(str(folder / "class-descriptions.csv"), MIDS, NAMES)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
