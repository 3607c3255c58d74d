"""Compressed bytes to uint8 RGB pixels, as fast as the libraries allow, straight into the batch.

libjpeg-turbo (simplejpeg) decodes what it can: baseline and progressive, colour and grey JPEG. PIL takes the
rest: CMYK, PNG and other formats, and JPEGs whose EXIF data turn the picture. Sizes are matched by torch's uint8
antialiased bilinear resize, within one grey level of PIL's. Pictures stored at the training size need no torch,
so that a loader process starts in a fraction of a second.
"""

import io
import threading

import numpy as np

from paml.errors import DataError
from paml.reading import MAX_PIXELS, PICTURE_FORMATS, scan_fault

_EXIF_ORIENTATION = 0x0112
_SCRATCH_BYTES = 64 << 20

try:
    from simplejpeg import decode_jpeg as _turbo
    from simplejpeg import decode_jpeg_header as _turbo_header
except ImportError:  # the GPU machine of a notebook may hold torch alone; PIL then decodes everything
    _turbo = _turbo_header = None

_scratch = threading.local()


class UndecodableError(DataError):
    """The bytes are no picture that any of the decoders reads."""


def _turned(data: bytes | memoryview) -> bool:
    """Whether EXIF data ask for another orientation than the stored one."""
    if b"Exif\x00" not in bytes(data[:4096]):
        return False
    from PIL import Image

    try:
        return Image.open(io.BytesIO(data), formats=PICTURE_FORMATS).getexif().get(_EXIF_ORIENTATION, 1) != 1
    except Exception:  # damaged EXIF data say nothing; the pixels decide
        return False


def _decode_pil(data: bytes | memoryview) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as picture:
            _check_size(picture.width, picture.height)
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I"):  # PIL's own conversion cuts 16-bit greys off at 255
                grey = (np.clip(np.asarray(upright), 0, 65535) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.array(upright.convert("RGB"))
    except (MemoryError, UndecodableError):
        raise
    except Exception as error:  # decoders raise many kinds, down to SyntaxError and struct.error
        raise UndecodableError(f"{type(error).__name__}: {error}") from error


def _decode(data: bytes | memoryview, out: np.ndarray | None) -> np.ndarray:
    """uint8 [H, W, 3]: in `out` where libjpeg-turbo decodes to its size, in the thread's scratch memory or in new."""
    if not len(data):
        raise UndecodableError("empty file")
    if fault := scan_fault(data):
        raise UndecodableError(fault)
    if _turbo is not None and _turbo_header is not None and bytes(data[:2]) == b"\xff\xd8" and not _turned(data):
        try:
            height, width = (int(side) for side in _turbo_header(data)[:2])
            _check_size(width, height)
            if out is None or out.shape != (height, width, 3):
                out = _scratch_memory(height * width * 3)
            return _turbo(data, colorspace="RGB", buffer=out)
        except ValueError:  # CMYK, 12 bit, arithmetic coding, or cut off: PIL decides which
            pass
    return _decode_pil(data)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:  # as shards.max_pixels has it; so that a small file cannot use up the memory
        raise UndecodableError(f"{width}x{height} pixels: more than {MAX_PIXELS:,}")


def _scratch_memory(size: int) -> np.ndarray:
    """Memory of this thread, used for one picture after the other: fresh memory costs a tenth of a decode."""
    if size > _SCRATCH_BYTES:
        return np.empty(size, np.uint8)
    if not hasattr(_scratch, "memory") or len(_scratch.memory) < size:
        _scratch.memory = np.empty(size, np.uint8)
    return _scratch.memory[:size]


def decode_rgb(data: bytes | memoryview) -> np.ndarray:
    """Compressed bytes to uint8 [H, W, 3]. Raises UndecodableError, with PIL's reason, where all decoders refuse."""
    return _decode(data, None).copy()


def decode_into(data: bytes | memoryview, out: np.ndarray, part: np.ndarray | None = None) -> None:
    """Decode one picture into `out`, uint8 [S, S, 3] in C order, resized where its own size is another.

    part: float64[4], left, top, right and bottom of what is kept of it, as shares of its width and height; None for
    all. Raises UndecodableError; `out` may then hold anything.
    """
    pixels = _decode(data, out if part is None else None)
    if part is not None:
        pixels = _cut_out(pixels, part)
    if pixels.shape != out.shape:
        _resize(pixels, out)
    elif not np.may_share_memory(pixels, out):
        out[...] = pixels


def _cut_out(pixels: np.ndarray, part: np.ndarray) -> np.ndarray:
    """The part, to whole pixels and at least one, as a view."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = np.rint(part * (width, height, width, height)).astype(int).tolist()
    left, top = min(left, width - 1), min(top, height - 1)
    return pixels[top : max(bottom, top + 1), left : max(right, left + 1)]


def _resize(pixels: np.ndarray, out: np.ndarray) -> None:
    import torch

    def channels_last(picture: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(picture).permute(2, 0, 1)[None]  # the memory order of torch's AVX resize

    torch.ops.aten._upsample_bilinear2d_aa.out(
        channels_last(pixels), list(out.shape[:2]), False, None, None, out=channels_last(out)
    )
