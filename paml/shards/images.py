"""Prepare an image for a shard: decode, rotate upright, convert to RGB, resize, encode as JPEG.

Pillow's antialiased bilinear filter resizes, as in the papers (torchvision's `Resize` of PIL images); libjpeg-turbo
(simplejpeg) encodes. Both release the interpreter lock.
"""

from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from paml.shards.decode import UndecodableError, decode_upright, image_errors, image_format
from paml.shards.decode import image_size as image_size
from paml.shards.settings import ShardSettings

_EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
EXTENSIONS = tuple(_EXTENSION.values())


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
    pixels = decode_upright(data, max_pixels=settings.max_pixels)
    height, width = pixels.shape[:2]
    if settings.resize == "original":
        if (name := image_format(data)) not in _EXTENSION:
            raise UndecodableError(f"{name} cannot be stored as original: only jpg, png and webp can")
        return PreparedImage(data, width, height, _EXTENSION[name])
    target = (settings.size, settings.size)
    if settings.resize == "shorter_side":
        scale = min(1.0, settings.size / min(width, height))
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
    with image_errors(data):  # a side may be too long for JPEG
        if target != (width, height):
            pixels = np.ascontiguousarray(Image.fromarray(pixels).resize(target, Image.Resampling.BILINEAR))
        chroma = settings.chroma.replace(":", "")
        encoded = simplejpeg.encode_jpeg(pixels, settings.quality, "RGB", chroma, fastdct=False)
    return PreparedImage(encoded, *target, "jpg")
