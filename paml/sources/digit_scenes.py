"""Demo data made on the spot: scenes of scikit-learn's handwritten digits, labelled as Open Images V3 is.

Every scene holds one to five digits of distinct classes, each class being a digit in a colour ("red 7"), on
textured ground. No digit image serves two splits. What is written has the layout of an Open Images V3
release, with the full labels and the boxes beside it::

    images/{split}/{ImageID}.jpg
    2017_11/classes-trainable.txt, 2017_11/class-descriptions.csv
    2017_11/{split}/annotations-human.csv       train: sparse; validation and test: every class
    full-labels/{split}/annotations-human.csv   every class of every split
    boxes/{split}.csv                           one row for each digit
    scenes.json                                 written last: the folder is whole
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

from paml.reading import parse_object, reading

VERSION = 2
SPLITS = {"train": 0.6, "validation": 0.15, "test": 0.25}  # each with its share of the digit images
DEFAULT_IMAGES = {"train": 2400, "validation": 600, "test": 900}
COLOURS = {
    "red": (215, 30, 35),
    "yellow": (250, 220, 40),
    "green": (20, 150, 55),
    "cyan": (60, 220, 230),
    "blue": (35, 65, 230),
    "pink": (245, 100, 205),
    "white": (252, 252, 252),
    "black": (8, 8, 8),
}
DIGITS = (0, 1, 4, 7)  # the others look too much alike for a network that has minutes to learn from scratch
CLASSES = tuple((digit, colour) for colour in COLOURS for digit in DIGITS)
MIDS = tuple(f"/m/0d{digit}{colour}" for digit, colour in CLASSES)
NAMES = tuple(f"{colour} {digit}" for digit, colour in CLASSES)

DIGITS_SHARES = (0.12, 0.22, 0.28, 0.24, 0.14)  # of the scenes that hold 1, 2, 3, 4 and 5 digits
NEGATIVES_SHARES = (0.3, 0.4, 0.3)  # of the train scenes with 0, 1 and 2 observed negatives
TAIL_OFFSET = 6.0  # the class of rank r (from 0) is drawn with a weight of 1 / (r + TAIL_OFFSET)
DIGIT_HEIGHTS = (0.38, 0.46)  # of a digit before it is turned, as shares of the picture's side
SINGLE_HEIGHTS = (0.6, 0.74)  # where a picture holds one digit alone
PLACE_TRIES = 60

SCENES_FILE = "scenes.json"
UNFINISHED_FILE = "scenes.unfinished.json"
ANNOTATION_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence")
BOX_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax")


class DigitScenesError(ValueError):
    """Settings that make no scenes, or a folder that holds something else."""


@dataclass(frozen=True, kw_only=True)
class SceneReport:
    """What `write_digit_scenes` wrote, or found written."""

    folder: str
    images: dict[str, int]
    """Scenes of each split."""
    positives: dict[str, int]
    """True (image, class) pairs of each split."""
    observed_positives: int
    """Positives that the train annotations tell."""
    observed_negatives: int
    """Negatives that the train annotations tell."""
    kept: bool
    """True where the folder was whole already, so that nothing was written."""

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {split}" for split, count in self.images.items())
        means = ", ".join(f"{self.positives[split] / count:.2f}" for split, count in self.images.items())
        return (
            f"digit scenes {'kept' if self.kept else 'written'} in {self.folder}: {counts} images, "
            f"{len(MIDS)} classes, {means} positives an image; train shows {self.observed_positives:,} of "
            f"its {self.positives.get('train', 0):,} positives and {self.observed_negatives:,} negatives"
        )


@dataclass(frozen=True)
class _Scene:
    picture: Image.Image
    classes: list[int]
    boxes: list[tuple[float, float, float, float]]  # x_min, x_max, y_min, y_max as shares of the side


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

    images: scenes of each split (train, validation, test); 2,400, 600 and 900 where none is given.
    size: side of the square pictures, pixels.
    single: one large digit in every scene, every class as often, to learn digits from before they come in company.
    progress: called with (scenes done, scenes in all) after each scene.

    The same settings give the same files. A folder that is whole with the same settings is kept as it is, one
    that was cut off is written anew. Raises DigitScenesError where the settings make no scenes or where the
    folder holds anything else, OSError where it cannot be written.
    """
    counts = dict(DEFAULT_IMAGES if images is None else images)
    _check_settings(counts, size)
    settings = {"version": VERSION, "images": counts, "size": size, "seed": seed, "single": single}
    folder = Path(out)
    finished = _claim(folder, settings)
    if finished is not None:
        return SceneReport(folder=str(folder), kept=True, **finished)

    digits = _digits_of_splits()
    weights = np.full(len(CLASSES), 1 / len(CLASSES)) if single else _class_weights(seed)
    _write_classes(folder / "2017_11")
    positives = dict.fromkeys(counts, 0)
    observed = {1: 0, 0: 0}
    done, total = 0, sum(counts.values())
    for split, count in counts.items():
        truth_rows: list[tuple[str, str, str, int]] = []
        sparse_rows: list[tuple[str, str, str, int]] = []
        box_rows: list[tuple[Any, ...]] = []
        pictures = folder / "images" / split
        pictures.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            key = hashlib.sha256(f"{seed}/{split}/{index}".encode()).hexdigest()[:16]
            rng = np.random.default_rng([seed, list(SPLITS).index(split), index])
            scene = _draw_scene(rng, digits[split], weights, size, single)
            scene.picture.save(pictures / f"{key}.jpg", quality=92)
            present = set(scene.classes)
            positives[split] += len(present)
            truth_rows += [(key, "verification", mid, int(c in present)) for c, mid in enumerate(MIDS)]
            for cls, state in _observe(rng, scene.classes, weights):
                observed[state] += split == "train"
                sparse_rows.append((key, "verification", MIDS[cls], state))
            for cls, box in zip(scene.classes, scene.boxes, strict=True):
                box_rows.append((key, "xclick", MIDS[cls], 1, *(f"{edge:.6f}" for edge in box)))
            done += 1
            if progress is not None:
                progress(done, total)
        sparse = sparse_rows if split == "train" else truth_rows
        _write_csv(folder / "2017_11" / split / "annotations-human.csv", ANNOTATION_COLUMNS, sparse)
        _write_csv(folder / "full-labels" / split / "annotations-human.csv", ANNOTATION_COLUMNS, truth_rows)
        _write_csv(folder / "boxes" / f"{split}.csv", BOX_COLUMNS, box_rows)

    figures = {
        "images": counts,
        "positives": positives,
        "observed_positives": observed[1],
        "observed_negatives": observed[0],
    }
    unfinished = folder / UNFINISHED_FILE
    unfinished.write_text(json.dumps({"settings": settings, "figures": figures}, indent=2) + "\n")
    unfinished.replace(folder / SCENES_FILE)
    return SceneReport(folder=str(folder), kept=False, **figures)


def _check_settings(counts: Mapping[str, int], size: int) -> None:
    unknown = sorted(set(counts) - set(SPLITS))
    if unknown:
        raise DigitScenesError(f"images names the split {unknown[0]!r}; allowed are {', '.join(SPLITS)}")
    for split, count in counts.items():
        if count < 1:
            raise DigitScenesError(f"images[{split!r}] is {count}; give at least 1, or leave the split out")
    if not counts:
        raise DigitScenesError(f"images names no split; give at least one of {', '.join(SPLITS)}")
    if size < 32:
        raise DigitScenesError(f"size is {size} pixels; below 32 the digits cannot be read, give 32 or more")


def _claim(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of a folder that is whole; else None, the folder being marked as ours and unfinished."""
    for name in (SCENES_FILE, UNFINISHED_FILE):
        marker = folder / name
        if not marker.exists():
            continue
        with reading(str(marker), "delete that folder"):
            written = parse_object(marker.read_text())
            written = {"settings": written["settings"], "figures": written.get("figures")}
        if written["settings"] != settings:
            raise DigitScenesError(
                f"{folder} holds digit scenes made with {written['settings']}, but {settings} are asked for: "
                "delete that folder or name another one"
            )
        if name == SCENES_FILE:
            return written["figures"]
    if folder.exists() and not (folder / UNFINISHED_FILE).exists() and any(folder.iterdir()):
        raise DigitScenesError(f"{folder} holds other files: name a new or an empty folder for the digit scenes")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED_FILE).write_text(json.dumps({"settings": settings}) + "\n")
    return None


def _digits_of_splits() -> dict[str, list[list[np.ndarray]]]:
    """The images of each of DIGITS, uint8 [8, 8], by split; no image is in two splits.

    The splits are the same for every seed, so that a network which has learned the digits of one set's training
    split has seen no handwriting of another set's test split.
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
    """How likely each class is drawn: float64[K], sum 1, long-tailed; the seed says which are rare."""
    ranks = np.random.default_rng([seed, 101]).permutation(len(CLASSES))
    weights = 1.0 / (ranks + TAIL_OFFSET)
    return weights / weights.sum()


def _observe(rng: np.random.Generator, present: Sequence[int], weights: np.ndarray) -> list[tuple[int, int]]:
    """One positive of the scene and none to two negatives, frequent classes being asked for more often."""
    absent = weights.copy()
    absent[list(present)] = 0
    count = rng.choice(len(NEGATIVES_SHARES), p=NEGATIVES_SHARES)
    negatives = rng.choice(len(weights), size=count, replace=False, p=absent / absent.sum())
    return sorted([(int(rng.choice(present)), 1), *((int(cls), 0) for cls in negatives)])


def _draw_scene(
    rng: np.random.Generator, digits: list[list[np.ndarray]], weights: np.ndarray, size: int, single: bool
) -> _Scene:
    picture = _draw_ground(rng, size)
    count = 1 if single else 1 + rng.choice(len(DIGITS_SHARES), p=DIGITS_SHARES)
    heights = SINGLE_HEIGHTS if single else DIGIT_HEIGHTS
    classes: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []
    for cls in rng.choice(len(weights), size=count, replace=False, p=weights):
        digit, colour = CLASSES[cls]
        pool = digits[DIGITS.index(digit)]
        mask = _digit_mask(rng, pool[rng.integers(len(pool))], size, heights)
        corner = _free_corner(rng, mask.size, size, boxes)
        if corner is None:
            continue
        x, y = corner
        tint = np.clip(np.asarray(COLOURS[colour]) + rng.normal(0, 14, 3), 0, 255).astype(int)
        picture.paste(tuple(tint.tolist()), (x, y), mask)
        classes.append(int(cls))
        boxes.append((x / size, (x + mask.width) / size, y / size, (y + mask.height) / size))
    return _Scene(picture, classes, boxes)


def _draw_ground(rng: np.random.Generator, size: int) -> Image.Image:
    """A colour gradient with coarse and fine noise, and strokes of any colour that are no digits."""
    tone = rng.uniform(70, 150) + rng.normal(0, 18, (2, 2, 1)) + rng.normal(0, 8, (2, 2, 3))
    coarse = rng.normal(0, 12, (7, 7, 1)) + rng.normal(0, 6, (7, 7, 3))
    ground = _enlarge(tone, size) + _enlarge(coarse, size)
    ground += rng.normal(0, rng.uniform(2, 9), (size, size, 1)).astype(np.float32)
    picture = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
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
    return picture


def _enlarge(grid: np.ndarray, size: int) -> np.ndarray:
    """Smoothly enlarge [h, w, 3] to float32 [size, size, 3]."""
    channels = np.moveaxis(np.broadcast_to(grid, (*grid.shape[:2], 3)).astype(np.float32), 2, 0)
    wide = [Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC) for channel in channels]
    return np.stack([np.asarray(channel) for channel in wide], axis=2)


def _digit_mask(rng: np.random.Generator, pixels: np.ndarray, size: int, heights: tuple[float, float]) -> Image.Image:
    """How opaque the ink is, 8 bits: the digit smoothly enlarged, slightly turned, cut to its ink."""
    height = size * rng.uniform(*heights)
    ink = np.flatnonzero(pixels.any(axis=1))
    side = round(height * 12 / (ink[-1] - ink[0] + 1))  # padded by 2 on each side, so that no ink is turned away
    glyph = Image.fromarray(np.pad(pixels, 2)).resize((side, side), Image.Resampling.BICUBIC)
    glyph = glyph.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)
    mask = glyph.point([min(255, max(0, (level - 60) * 3 // 2)) for level in range(256)])
    return mask.crop(mask.getbbox())


def _free_corner(
    rng: np.random.Generator,
    extent: tuple[int, int],
    size: int,
    boxes: Sequence[tuple[float, float, float, float]],
) -> tuple[int, int] | None:
    """Where a digit of this width and height touches no other, or None where no place was found."""
    width, height = extent
    for _ in range(PLACE_TRIES):
        x, y = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        left, right, top, bottom = x / size, (x + width) / size, y / size, (y + height) / size
        if all(right <= a or left >= b or bottom <= c or top >= d for a, b, c, d in boxes):
            return x, y
    return None


def _write_classes(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes-trainable.txt").write_text("".join(f"{mid}\n" for mid in MIDS))
    lines = "".join(f'"{mid}","{name}"\n' for mid, name in zip(MIDS, NAMES, strict=True))
    (folder / "class-descriptions.csv").write_text(lines)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
