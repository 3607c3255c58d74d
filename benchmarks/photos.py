"""Large photos for benchmarks, made of COCO-18 photos, and the transforms that research code uses."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

WIDTH, HEIGHT = 1024, 768
SIDE = 2
"""Photos per side of a mosaic."""
NOISE = 6.0
"""Standard deviation of the noise in gray levels. Files have about 275 KB; those of Open Images have 294 KB."""


def photo_files() -> list[Path]:
    """The COCO-18 photos in $PAML_SHARED, or in `shared` next to the checkout."""
    root = Path(os.environ.get("PAML_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
    files = sorted((root / "data" / "coco18" / "images" / "train").glob("*.jpg"))
    if not files:
        raise SystemExit(
            f"there are no COCO-18 photos in {root}: set PAML_SHARED to the folder that contains data/coco18"
        )
    return files


def mosaics(count: int, seed: int = 0) -> list[bytes]:
    """`count` JPEG files of 1024 x 768 pixels (quality 90, 4:2:0) with four photos each and camera noise."""
    files, cell = photo_files(), (WIDTH // SIDE, HEIGHT // SIDE)
    rng = np.random.default_rng(seed)
    encoded = []
    for _ in range(count):
        canvas = Image.new("RGB", (WIDTH, HEIGHT))
        for cell_number, number in enumerate(rng.choice(len(files), SIDE * SIDE, replace=False)):
            with Image.open(files[number]) as photo:
                fitted = ImageOps.fit(photo.convert("RGB"), cell)
            canvas.paste(fitted, (cell[0] * (cell_number % SIDE), cell[1] * (cell_number // SIDE)))
        pixels = np.asarray(canvas, np.float32) + rng.normal(0, NOISE, (HEIGHT, WIDTH, 1)).astype(np.float32)
        out = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        encoded.append(out.getvalue())
    return encoded


def research_transform(size: int) -> Callable[[Image.Image], Any]:
    """The usual transform of research code: resize and mirror with PIL, convert to a float tensor, normalize."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize((size, size)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
