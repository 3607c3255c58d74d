"""One image of any kind in, the bytes that a shard stores out: decoded, turned upright, RGB, resized, JPEG.

Pixels are decoded and encoded by libjpeg-turbo (simplejpeg) where it is at hand, else by Pillow; resized by
Pillow's antialiased bilinear filter, the one of the papers' recipe (`Resize` of torchvision on PIL images).
All of the work lets go of the interpreter lock, so threads are enough.
"""

import io
import re
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from paml.reading import PICTURE_FORMATS, scan_fault

try:
    import simplejpeg
except ImportError:  # the bytes then differ slightly; design.md promises them for one lock file
    simplejpeg = None

Resize = Literal["squash", "shorter_side", "original"]
Chroma = Literal["4:2:0", "4:4:4"]

_ORIENTATION = 274
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXTENSION = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
EXTENSIONS = ("jpg", "png", "webp")


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason."""


class Prepared(NamedTuple):
    data: bytes
    """The encoded image."""
    width: int
    height: int
    """Pixels, as a viewer shows the image (after EXIF orientation)."""
    extension: str
    """One of EXTENSIONS."""


def prepare_image(
    data: bytes,
    *,
    size: int,
    resize: Resize,
    quality: int,
    max_pixels: int,
    chroma: Chroma = "4:2:0",
    strict: bool = True,
) -> Prepared:
    """Encode an image for a shard.

    `squash` makes both sides `size`. `shorter_side` brings the shorter side down to `size` and keeps the
    aspect; it never enlarges. `original` keeps the bytes as they are, once they have been found to decode.
    With `strict` an image that the decoder can only patch up (a damaged JPEG) is refused.

    Raises BadImage with the reason.
    """
    if not data:
        raise BadImage("zero bytes")
    try:
        if fault := scan_fault(data):
            raise BadImage(fault)
        image = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage(f"{width}x{height} pixels: more than max_pixels = {max_pixels:,}")
        orientation = image.getexif().get(_ORIENTATION, 1)
        pixels = _decode(image, data, strict)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not an image that Pillow knows (begins with {data[:8]!r})") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many kinds, down to SyntaxError and struct.error
        raise BadImage(_one_line(error)) from error
    if orientation in _TRANSPOSE:
        pixels = pixels.transpose(_TRANSPOSE[orientation])
    width, height = pixels.size
    if resize == "original":
        extension = _EXTENSION.get(image.format or "")
        if extension is None:
            raise BadImage(f"{image.format} cannot be kept as it is: jpg, png and webp can")
        return Prepared(data, width, height, extension)
    if resize == "squash":
        target = (size, size)
    else:
        short = min(width, height)
        scale = min(1.0, size / short)
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
    if target != (width, height):
        pixels = pixels.resize(target, Image.Resampling.BILINEAR)
    return Prepared(_encode(pixels, quality, chroma), *target, "jpg")


def _decode(image: Image.Image, data: bytes, strict: bool) -> Image.Image:
    if simplejpeg is not None and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", strict=strict))
    image.load()
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow's own conversion cuts 16-bit greys off at 255
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(grey, 0, 65535) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _encode(pixels: Image.Image, quality: int, chroma: Chroma) -> bytes:
    if simplejpeg is not None:
        array = np.ascontiguousarray(np.asarray(pixels))
        return simplejpeg.encode_jpeg(array, quality, "RGB", chroma.replace(":", ""), fastdct=False)
    out = io.BytesIO()
    pixels.save(out, "JPEG", quality=quality, subsampling=chroma)
    return out.getvalue()


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """(width, height) as a viewer shows the image, from its header. Raises BadImage."""
    try:
        with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as image:
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
            return (image.height, image.width) if turned else image.size
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not an image that Pillow knows (begins with {bytes(data[:8])!r})") from None
    except Exception as error:
        raise BadImage(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
