"""Prepare an image for a shard: decode, rotate upright, convert to RGB, resize, encode as JPEG.

libjpeg-turbo (simplejpeg) decodes JPEG and encodes; Pillow decodes other formats and CMYK. Pillow's antialiased
bilinear filter resizes, as in the papers (torchvision's `Resize` of PIL images). All of them release the interpreter
lock.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from paml.errors import DataError
from paml.parsing import IMAGE_FORMATS, jpeg_scan_error
from paml.shards.settings import ShardSettings
from paml.tasks import format_error

EXIF_ORIENTATION = 0x0112
_EXTENSION = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
EXTENSIONS = ("jpg", "png", "webp")


class UndecodableError(DataError):
    """An unusable image; the message is the reason."""


@contextlib.contextmanager
def image_errors(data: bytes | memoryview) -> Iterator[None]:
    """Convert the errors of decoders to UndecodableError."""
    try:
        yield
    except (UndecodableError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UndecodableError(f"not an image in a known format (starts with {bytes(data[:8])!r})") from None
    except Exception as error:  # decoders raise many types, even SyntaxError and struct.error
        raise UndecodableError(format_error(error)) from error


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise UndecodableError for an image with more than `max_pixels` pixels."""
    if width * height > max_pixels:
        raise UndecodableError(f"{width}x{height} pixels: at most {max_pixels:,} are allowed")


class PreparedImage(NamedTuple):
    data: bytes
    """The encoded image."""
    width: int
    height: int
    """In pixels, after EXIF orientation."""
    extension: str
    """One of EXTENSIONS."""


def prepare_image(data: bytes, settings: ShardSettings) -> PreparedImage:
    """Encode an image for a shard. Raises UndecodableError with the reason."""
    if not data:
        raise UndecodableError("empty file")
    with image_errors(data):
        if problem := jpeg_scan_error(data):
            raise UndecodableError(problem)
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        width, height = image.size
        check_pixels(width, height, settings.max_pixels)
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            pixels = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", strict=settings.strict))
        else:
            pixels = to_rgb(image)
        if orientation in range(2, 9):
            pixels = Image.fromarray(np.asarray(pixels))  # without other EXIF tags, which may be invalid
            pixels.getexif()[EXIF_ORIENTATION] = orientation
            pixels = ImageOps.exif_transpose(pixels)
    width, height = pixels.size
    if settings.resize == "original":
        extension = _EXTENSION.get(image.format or "")
        if extension is None:
            raise UndecodableError(f"{image.format} cannot be stored as original: only jpg, png and webp can")
        return PreparedImage(data, width, height, extension)
    target = (settings.size, settings.size)
    if settings.resize == "shorter_side":
        scale = min(1.0, settings.size / min(width, height))
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
    if target != (width, height):
        pixels = pixels.resize(target, Image.Resampling.BILINEAR)
    array, chroma = np.ascontiguousarray(np.asarray(pixels)), settings.chroma.replace(":", "")
    encoded = simplejpeg.encode_jpeg(array, settings.quality, "RGB", chroma, fastdct=False)
    return PreparedImage(encoded, *target, "jpg")


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode with Pillow and convert to RGB."""
    image.load()
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow's conversion clips 16-bit grays at 255
        gray = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(gray, 0, 65535) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """(width, height) from the image's header, after EXIF orientation. Raises UndecodableError."""
    with image_errors(data), Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        rotated = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
        return (image.height, image.width) if rotated else image.size
