"""Compressed bytes to uint8 RGB pixels, as fast as the libraries allow, straight into the batch.

libjpeg-turbo (simplejpeg) decodes what it can: baseline and progressive, colour and grey JPEG. PIL takes the
rest: CMYK, PNG and other formats, and JPEGs whose EXIF data turn the picture. Sizes are matched by
torchvision's uint8 antialiased bilinear resize, within one grey level of PIL's.
"""

import io

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf

from paml.errors import DataError

_EXIF_ORIENTATION = 0x0112

try:
    from simplejpeg import decode_jpeg as _turbo
except ImportError:  # the GPU machine of a notebook may hold torch alone; PIL then decodes everything
    _turbo = None


class UndecodableError(DataError):
    """The bytes are no picture that any of the decoders reads."""


def _turned(data: bytes | memoryview) -> bool:
    """Whether EXIF data ask for another orientation than the stored one."""
    if b"Exif\x00" not in bytes(data[:4096]):
        return False
    from PIL import Image

    try:
        return Image.open(io.BytesIO(data)).getexif().get(_EXIF_ORIENTATION, 1) != 1
    except Exception:  # damaged EXIF data say nothing; the pixels decide
        return False


def _decode_pil(data: bytes | memoryview) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I"):  # PIL's own conversion cuts 16-bit greys off at 255
                grey = (np.clip(np.asarray(upright), 0, 65535) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.array(upright.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many kinds, down to SyntaxError and struct.error
        raise UndecodableError(f"{type(error).__name__}: {error}") from error


def decode_rgb(data: bytes | memoryview) -> np.ndarray:
    """Compressed bytes to uint8 [H, W, 3]. Raises UndecodableError, with PIL's reason, where all decoders refuse."""
    if not len(data):
        raise UndecodableError("empty file")
    if _turbo is not None and bytes(data[:2]) == b"\xff\xd8" and not _turned(data):
        try:
            return _turbo(data, colorspace="RGB")
        except ValueError:  # CMYK, 12 bit, arithmetic coding, or cut off: PIL decides which
            pass
    return _decode_pil(data)


def decode_into(data: bytes | memoryview, out: torch.Tensor) -> None:
    """Decode one picture into `out`, uint8 [S, S, 3], resizing both sides to S where the stored size differs."""
    pixels = decode_rgb(data)
    size = out.shape[0]
    if pixels.shape[:2] == (size, size):
        out.numpy()[...] = pixels
        return
    picture = torch.from_numpy(pixels).permute(2, 0, 1)  # channels_last in memory: the AVX path of the resize
    out.copy_(tvf.resize(picture, [size, size], antialias=True).permute(1, 2, 0))
