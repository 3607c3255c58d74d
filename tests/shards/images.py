"""Small synthetic images and a way to damage files."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def gradient(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """A smooth color gradient with noise, different for each seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    slopes = rng.uniform(-1, 1, (3, 2))
    pixels = np.stack([128 + 100 * (a * x / width + b * y / height) for a, b in slopes], axis=-1)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def decoded(data: bytes | memoryview) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def source(count: int, **size: int) -> list[tuple[str, bytes]]:
    """`count` pairs of a key and a JPEG file."""
    return [(f"{i:016x}", encoded(gradient(i, **size), quality=90)) for i in range(count)]


def flip_byte(path: str | Path, offset: int, mask: int = 0xFF) -> None:
    data = bytearray(Path(path).read_bytes())
    data[offset] ^= mask
    Path(path).write_bytes(data)
