"""Decode compressed images to uint8 RGB pixels, directly into the batch.

libjpeg-turbo (simplejpeg) decodes baseline and progressive JPEG, color and gray. Pillow decodes the rest: CMYK, PNG and
other formats, and JPEGs with an EXIF rotation. torch's antialiased bilinear resize of uint8 is within one gray level of
Pillow's. Images stored at the training size need no torch.
"""

import io
import threading

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from paml.parsing import IMAGE_FORMATS, MAX_PIXELS, jpeg_scan_error
from paml.shards.images import EXIF_ORIENTATION, UndecodableError, check_pixels, image_errors, to_rgb

_SCRATCH_BYTES = 64 << 20

_scratch = threading.local()


def _is_rotated(data: bytes | memoryview) -> bool:
    """Whether EXIF metadata require a rotation."""
    if b"Exif\x00" not in bytes(data[:4096]):
        return False
    try:
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS).getexif().get(EXIF_ORIENTATION, 1) != 1
    except Exception:  # ignore damaged EXIF metadata
        return False


def _decode(data: bytes | memoryview, out: np.ndarray | None) -> np.ndarray:
    """uint8 [H, W, 3]: in `out` if libjpeg-turbo decodes to its size, in this thread's scratch memory, or new."""
    if not len(data):
        raise UndecodableError("empty file")
    if problem := jpeg_scan_error(data):
        raise UndecodableError(problem)
    if bytes(data[:2]) == b"\xff\xd8" and not _is_rotated(data):
        try:
            height, width = (int(side) for side in simplejpeg.decode_jpeg_header(data)[:2])
            check_pixels(width, height, MAX_PIXELS)
            if out is None or out.shape != (height, width, 3):
                out = _scratch_memory(height * width * 3)
            return simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out)
        except ValueError:  # CMYK, 12 bit, arithmetic coding, or truncated: let Pillow decide
            pass
    with image_errors(data), Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        check_pixels(*image.size, MAX_PIXELS)
        return np.array(to_rgb(ImageOps.exif_transpose(image)))


def _scratch_memory(size: int) -> np.ndarray:
    """Memory of this thread that is reused for each image: fresh memory costs a tenth of the decoding time."""
    if size > _SCRATCH_BYTES:
        return np.empty(size, np.uint8)
    if not hasattr(_scratch, "memory") or len(_scratch.memory) < size:
        _scratch.memory = np.empty(size, np.uint8)
    return _scratch.memory[:size]


def decode_rgb(data: bytes | memoryview) -> np.ndarray:
    """Decode to uint8 [H, W, 3]. Raises UndecodableError with Pillow's reason."""
    return _decode(data, None).copy()


def decode_into(data: bytes | memoryview, out: np.ndarray, crop: np.ndarray | None = None) -> None:
    """Decode one image into `out`, uint8 [S, S, 3] in C order, and resize it if its size differs.

    crop: float64[4], left, top, right and bottom as fractions of width and height; None for the whole image. Raises
    UndecodableError; the content of `out` is then undefined.
    """
    pixels = _decode(data, out if crop is None else None)
    if crop is not None:
        pixels = _crop(pixels, crop)
    if pixels.shape != out.shape:
        resize_into(pixels, out)
    elif not np.may_share_memory(pixels, out):
        out[...] = pixels


def _crop(pixels: np.ndarray, crop: np.ndarray) -> np.ndarray:
    """A view of the crop box, rounded to whole pixels, at least one."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = np.rint(crop * (width, height, width, height)).astype(int).tolist()
    left, top = min(left, width - 1), min(top, height - 1)
    return pixels[top : max(bottom, top + 1), left : max(right, left + 1)]


def resize_into(pixels: np.ndarray, out: np.ndarray) -> None:
    """Resize an image, uint8 [H, W, 3] in writable memory, to the size of `out`, uint8 [S, S, 3]."""
    import torch

    def channels_last(image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(image).permute(2, 0, 1)[None]  # the memory format of torch's AVX kernel

    torch.ops.aten._upsample_bilinear2d_aa.out(
        channels_last(pixels), list(out.shape[:2]), False, None, None, out=channels_last(out)
    )
