"""Large photos for benchmarks: mosaics of the coco18 photos, and the transforms that research code puts on them."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

WIDTH, HEIGHT = 1024, 768
SIDE = 2
"""Photos a side of a mosaic."""
GRAIN = 6.0
"""Standard deviation in grey levels; makes files of about 275 KB, near those of Open Images (294 KB)."""


def photo_files() -> list[Path]:
    """The coco18 photos below $PAML_SHARED, or below `shared` beside the checkout."""
    root = Path(os.environ.get("PAML_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
    files = sorted((root / "data" / "coco18" / "images" / "train").glob("*.jpg"))
    if not files:
        raise SystemExit(f"no photos of coco18 below {root}: set PAML_SHARED to the folder that holds data/coco18")
    return files


def mosaics(count: int, seed: int = 0) -> list[bytes]:
    """`count` JPEG files of 1024 x 768 pixels, quality 90, 4:2:0: four photos each, with the grain of a camera."""
    files, cell = photo_files(), (WIDTH // SIDE, HEIGHT // SIDE)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        canvas = Image.new("RGB", (WIDTH, HEIGHT))
        for place, number in enumerate(rng.choice(len(files), SIDE * SIDE, replace=False)):
            with Image.open(files[number]) as photo:
                fitted = ImageOps.fit(photo.convert("RGB"), cell)
            canvas.paste(fitted, (cell[0] * (place % SIDE), cell[1] * (place // SIDE)))
        pixels = np.asarray(canvas, np.float32) + rng.normal(0, GRAIN, (HEIGHT, WIDTH, 1)).astype(np.float32)
        out = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        found.append(out.getvalue())
    return found


def research_transform(size: int) -> Callable[[Image.Image], Any]:
    """As research code writes it: resized and mirrored by PIL, a float tensor, normalised."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize((size, size)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
