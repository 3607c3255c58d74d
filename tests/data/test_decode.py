"""Decoding of all image formats."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paml.data.decode import UndecodableError, decode_into, decode_rgb

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT = 56, 40


def scene(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Smooth colors with noise, which different decoders reconstruct differently."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 9)], axis=-1)
    grain = np.random.default_rng(0).normal(0, 6, pixels.shape)
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


GREY16 = (np.arange(WIDTH * HEIGHT, dtype=np.uint32).reshape(HEIGHT, WIDTH) * 65535 // (WIDTH * HEIGHT)).astype(
    "uint16"
)
IMAGES = {
    "baseline": encoded(scene(), quality=92),
    "progressive": encoded(scene(), quality=92, progressive=True),
    "4:4:4": encoded(scene(), quality=92, subsampling=0),
    "gray": encoded(scene().convert("L"), quality=92),
    "CMYK": encoded(scene().convert("CMYK"), quality=92),
    "PNG": encoded(scene(), "PNG"),
    "palette": encoded(scene().convert("P"), "PNG"),
    "transparent": encoded(scene().convert("RGBA"), "PNG"),
    "16 bit": encoded(Image.fromarray(GREY16), "PNG"),
    "WebP": encoded(scene(), "WEBP", quality=92),
    "EXIF-rotated": encoded(scene(), quality=92, exif=rotated()),
    "EXIF-rotated PNG": encoded(scene(), "PNG", exif=rotated()),
}
LOSSY = 3
"""Largest difference in gray levels between two JPEG decoders, whose color conversions round differently."""


def expected(name: str) -> np.ndarray:
    if name == "16 bit":
        return np.repeat((GREY16 >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if name.startswith("EXIF"):
        kind = "PNG" if name.endswith("PNG") else "JPEG"
        stored = Image.open(io.BytesIO(encoded(scene(), kind, **({} if kind == "PNG" else {"quality": 92}))))
        return np.asarray(stored.convert("RGB").transpose(Image.Transpose.ROTATE_270))
    return np.asarray(Image.open(io.BytesIO(IMAGES[name])).convert("RGB"))


@pytest.mark.parametrize("name", IMAGES)
def test_every_format_is_decoded_upright_in_rgb(name: str) -> None:
    pixels = decode_rgb(memoryview(IMAGES[name]))
    wanted = expected(name)
    assert pixels.dtype == np.uint8
    assert pixels.shape == wanted.shape
    assert np.abs(pixels.astype(int) - wanted.astype(int)).max() <= LOSSY


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (IMAGES["baseline"][:-400], "truncated"),
        (IMAGES["progressive"][: len(IMAGES["progressive"]) // 3], "truncated"),
        (IMAGES["PNG"][:-400], "truncated|Truncated|broken"),
        (IMAGES["baseline"][:20], "known format|Truncated"),
        (b"not an image", "known format"),
    ],
    ids=["empty", "truncated JPEG", "truncated progressive", "truncated PNG", "header only", "text"],
)
def test_damaged_image_raises_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason):
        decode_rgb(data)


@pytest.mark.parametrize(("width", "height"), [(56, 40), (200, 150), (33, 90), (24, 24)])
def test_resize_equals_pils_antialiased_bilinear_within_one_gray_level(width: int, height: int) -> None:
    stored = scene(width, height)
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 92})):
        data = encoded(stored, kind, **options)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        wanted = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        out = np.zeros((32, 32, 3), dtype=np.uint8)
        decode_into(data, out)
        assert np.abs(out.astype(int) - wanted).max() <= (1 if kind == "PNG" else LOSSY)


@pytest.mark.parametrize("crop", [(0.0, 0.0, 1.0, 1.0), (0.25, 0.1, 0.75, 0.6), (0.5, 0.5, 0.9, 1.0)])
def test_crop_and_resize_equal_pil(crop: tuple[float, ...]) -> None:
    stored = scene(120, 80)
    data, out = encoded(stored, "PNG"), np.zeros((32, 32, 3), dtype=np.uint8)
    decode_into(data, out, np.array(crop))
    box = tuple(round(fraction * side) for fraction, side in zip(crop, (120, 80, 120, 80), strict=True))
    wanted = np.asarray(stored.crop(box).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)  # type: ignore[arg-type]
    assert np.abs(out.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("crop", [(0.0, 0.0, 1e-6, 1e-6), (1.0, 1.0, 1.0, 1.0), (0.999, 0.0, 1.0, 0.001)])
def test_smallest_crop_is_one_pixel(crop: tuple[float, ...]) -> None:
    stored, out = scene(120, 80), np.zeros((8, 8, 3), dtype=np.uint8)
    decode_into(encoded(stored, "PNG"), out, np.array(crop))
    corner = np.asarray(stored)[79 if crop[1] == 1 else 0, 119 if crop[0] > 0.5 else 0]
    np.testing.assert_array_equal(out, np.broadcast_to(corner, out.shape))


def test_crop_of_the_training_size_is_not_resized() -> None:
    stored, out = scene(64, 64), np.zeros((32, 32, 3), dtype=np.uint8)
    decode_into(encoded(stored, "PNG"), out, np.array([0.25, 0.5, 0.75, 1.0]))
    np.testing.assert_array_equal(out, np.asarray(stored)[32:64, 16:48])


def test_image_of_the_training_size_is_not_resized() -> None:
    for data in (encoded(scene(32, 32), "PNG"), encoded(scene(32, 32), quality=92)):
        out = np.zeros((32, 32, 3), dtype=np.uint8)
        decode_into(data, out)
        np.testing.assert_array_equal(out, decode_rgb(data))
    np.testing.assert_array_equal(decode_rgb(encoded(scene(32, 32), "PNG")), np.asarray(scene(32, 32)))


@pytest.mark.parametrize("data", [IMAGES["baseline"], encoded(scene(32, 32), quality=92)], ids=["other size", "same"])
def test_decoding_fills_only_its_row_of_the_batch(data: bytes) -> None:
    batch = np.full((3, 32, 32, 3), 7, dtype=np.uint8)
    decode_into(data, batch[1])
    assert (batch[0] == 7).all()
    assert (batch[2] == 7).all()
    assert not (batch[1] == 7).all()


def test_decoded_images_do_not_share_memory() -> None:
    first = decode_rgb(IMAGES["baseline"])
    copy = first.copy()
    decode_rgb(IMAGES["4:4:4"])
    np.testing.assert_array_equal(first, copy)


def test_threads_decode_the_same() -> None:
    names = [name for name in IMAGES for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda name: decode_rgb(IMAGES[name]), names))
    for name, pixels in zip(names, images, strict=True):
        np.testing.assert_array_equal(pixels, decode_rgb(IMAGES[name]))


def test_readers_need_no_torch() -> None:
    code = "import sys, paml.data.readers; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
