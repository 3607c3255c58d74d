"""Decode compressed images to upright uint8 RGB pixels: the one decoder of preparation, training and prediction.

libjpeg-turbo (simplejpeg) decodes JPEG. Pillow decodes other formats, and JPEGs of kinds that libjpeg-turbo's simple
interface lacks (odd chroma sampling, 12 bits). Both release the interpreter lock. Metadata that are damaged are
ignored; pixel data that are truncated or corrupt are an error. The alpha channel is dropped: a transparent pixel has
the color that is stored for it. Of 16-bit samples, the upper 8 bits are used.
"""

import contextlib
import functools
import io
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError, features
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from paml.errors import DataError
from paml.tasks import format_error

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that Pillow may open, besides AVIF and HEIF. It supports forty more; some start programs (EPS) or read other
files."""
MAX_PIXELS = 1 << 27
"""Largest image that training and prediction decode, in pixels."""
MAX_SCANS = 500
"""Largest number of scans in a JPEG; progressive files have about ten."""

_MAX_SEGMENTS = 10_000
_SCRATCH_BYTES = 64 << 20
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG, _END = b"\xff\xd8", b"\xff\xd9"
_SEQUENTIAL, _SOS, _EOI, _APP1 = (0xFFC0, 0xFFC1), 0xFFDA, 0xFFD9, 0xFFE1
_JPEG_METADATA = frozenset((*range(0xFFE1, 0xFFEE), 0xFFEF, 0xFFFE))
"""Application segments and comments, except JFIF (FFE0) and Adobe (FFEE), which determine the color conversion."""
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_MARKER_AND_LENGTH = struct.Struct(">HH").unpack_from
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")

_scratch = threading.local()
_T = TypeVar("_T")
_Data = bytes | memoryview


class UndecodableError(DataError):
    """An unusable image; the message is the reason."""


@contextlib.contextmanager
def image_errors(data: _Data) -> Iterator[None]:
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


def decode_upright(data: _Data, out: np.ndarray | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [H, W, 3]: in `out` if libjpeg-turbo decodes to its size, in this thread's scratch memory (until its next
    call), or new. Raises UndecodableError."""
    if not len(data):
        raise UndecodableError("empty file")
    if _is_jpeg(data):
        markers = _bytes_after_ff(data)
        if markers.count(_SOS & 0xFF) > MAX_SCANS:
            _check_scans(data)
        orientation = _jpeg_orientation(data) if _APP1 & 0xFF in markers else 1
        pixels = _decode_jpeg(data, out if orientation == 1 else None, max_pixels)
    else:
        pixels, orientation = _read_with_pillow(data, lambda image: _read_pixels(image, max_pixels))
    return pixels if orientation == 1 else np.ascontiguousarray(_turn(pixels, orientation))


def image_size(data: _Data) -> tuple[int, int]:
    """(width, height) as decode_upright returns it, from the header alone if possible. Raises UndecodableError."""
    if not _is_jpeg(data):
        return _read_with_pillow(data, _upright_size)
    try:
        height, width = (int(side) for side in simplejpeg.decode_jpeg_header(data)[:2])
    except ValueError:
        height, width = decode_upright(data).shape[:2]
        return width, height
    return (height, width) if _jpeg_orientation(data) >= 5 else (width, height)


def image_format(data: _Data) -> str:
    """Pillow's name of the format: JPEG, PNG, and so on. Raises UndecodableError."""
    return "JPEG" if _is_jpeg(data) else _read_with_pillow(data, lambda image: str(image.format))


def _is_jpeg(data: _Data) -> bool:
    return bytes(data[:2]) == _JPEG


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of stored pixels [H, W, 3] as TIFF's tag 274 says that they are to be seen."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    step_y = -1 if orientation in (3, 4, 7, 8) else 1
    step_x = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::step_y, ::step_x]


# JPEG


def _decode_jpeg(data: _Data, out: np.ndarray | None, max_pixels: int) -> np.ndarray:
    """libjpeg-turbo reports only the first warning, so that one about the header may hide one about the pixels: decode
    again with a sound header. Padding before the end marker is accepted, other damage of pixel data is an error."""
    try:
        return _decode_turbo(data, out, max_pixels)
    except ValueError:
        data = _bare_jpeg(data)
    try:
        return _decode_turbo(data, out, max_pixels)
    except ValueError as error:
        reason = str(error)
    if _is_padding(data, reason):
        return _decode_turbo(data, out, max_pixels, strict=False)
    if reason.startswith(("Corrupt JPEG data", "Inconsistent progression")):
        raise UndecodableError(f"{reason}: if it looks sound, save it as a new JPEG")
    return _read_with_pillow(data, lambda image: _read_pixels(image, max_pixels))[0]


def _is_padding(data: bytes, warning: str) -> bool:
    """Whether libjpeg-turbo warns of bytes before the end marker that are few or compressible, as padding is. The bytes
    that damage leaves over are neither (1,500 flipped bytes and 1,500 bursts of 200: 6 of 233 with this warning)."""
    if not (match := re.fullmatch(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9", warning)):
        return False
    count = int(match[1])
    end = data.find(_END, max((end for _, _, end in _segments(data)), default=0))
    return count <= 8 or len(zlib.compress(data[max(0, end - count) : end], wbits=-15)) < count / 2


def _decode_turbo(data: _Data, out: np.ndarray | None, max_pixels: int, *, strict: bool = True) -> np.ndarray:
    """Raises ValueError for damage, also if harmless (unless not strict), and for unsupported kinds of JPEG."""
    height, width = (int(side) for side in simplejpeg.decode_jpeg_header(data)[:2])
    check_pixels(width, height, max_pixels)
    if out is None or out.shape != (height, width, 3):
        out = _scratch_memory(height * width * 3)
    return simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out, strict=strict)


def _scratch_memory(size: int) -> np.ndarray:
    """Memory of this thread that is reused for each image: fresh memory costs a tenth of the decoding time."""
    if size > _SCRATCH_BYTES:
        return np.empty(size, np.uint8)
    if not hasattr(_scratch, "memory") or len(_scratch.memory) < size:
        _scratch.memory = np.empty(size, np.uint8)
    return _scratch.memory[:size]


def _bytes_after_ff(data: _Data) -> bytes:
    """The second bytes of all markers of a JPEG, and of what else looks like a marker."""
    values = np.frombuffer(data, np.uint8)  # bytes.count and find take six times as long
    return values[1:][values[:-1] == 0xFF].tobytes()


def _check_scans(data: _Data) -> None:
    """Raise UndecodableError for a JPEG with so many scans that decoding it would take minutes. Metadata do not count,
    nor does what follows the image, such as a video."""
    data, at, scans = bytes(data), len(_JPEG), 0
    for _ in range(_MAX_SEGMENTS):
        match = _MARKER.search(data, at)
        if match is None or match[0] == _END:
            return
        scans += match[0][1] == _SOS & 0xFF
        if scans > MAX_SCANS:
            break
        at = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
    raise UndecodableError(f"a JPEG of more than {MAX_SCANS} scans")


def _segments(data: _Data) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment up to the first scan; ends early if the header is damaged."""
    at, last = 2, len(data) - 4
    for _ in range(_MAX_SEGMENTS):
        if at > last:
            return
        marker, length = _MARKER_AND_LENGTH(data, at)
        if marker <= 0xFF00:  # extraneous bytes, which decoders pass over
            data = bytes(data)
            at = data.find(b"\xff", at + 1)
            if at < 0:
                return
        elif marker == 0xFFFF:  # a fill byte
            at += 1
        else:
            end = at + 2 + length
            if marker == _EOI or end > len(data):
                return
            yield marker, at, end
            if marker == _SOS:
                return
            at = end


def _jpeg_orientation(data: _Data) -> int:
    """1 to 8, from the EXIF or XMP segments (APP1) of a JPEG; 1 without one or if it is damaged."""
    segments = list(_segments(data))
    if any(marker == _APP1 for marker, _, _ in segments):
        header = b"".join((_JPEG, *(data[start:end] for _, start, end in segments)))
        with contextlib.suppress(Exception):
            return _orientation(Image.open(io.BytesIO(header), formats=("JPEG",)))
    return 1


def _bare_jpeg(data: _Data) -> bytes:
    """The JPEG with its header alone repaired: no metadata, no bytes between segments, and the parameters of the scan
    that decoders of sequential JPEG ignore (Samsung's phones write 0, 0, 0). Unchanged if no scan is found."""
    data = bytes(data)
    segments = list(_segments(data))
    if not segments or segments[-1][0] != _SOS:
        return data
    parts = [data[start:end] for marker, start, end in segments if marker not in _JPEG_METADATA]
    if any(marker in _SEQUENTIAL for marker, _, _ in segments):
        parts[-1] = parts[-1][:-3] + b"\x00\x3f\x00"
    return b"".join((_JPEG, *parts, data[segments[-1][2] :]))


# Other formats


def _read_with_pillow(data: _Data, read: Callable[[Image.Image], _T]) -> _T:
    """`read` of the opened image; if it fails, of the image without metadata. Raises UndecodableError."""
    with image_errors(data):
        formats = _formats(data)
        try:
            return read(Image.open(io.BytesIO(data), formats=formats))
        except (UndecodableError, MemoryError):
            raise
        except Exception:
            bare = _without_metadata(data)
            if bare is None:
                raise
            return read(Image.open(io.BytesIO(bare), formats=formats))


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened image as decode_upright returns it."""
    if isinstance(image, TiffImageFile):
        image.load()  # Pillow turns it
    return (image.height, image.width) if _orientation(image) >= 5 else image.size


def _orientation(image: Image.Image) -> int:
    """1 to 8: how to turn a loaded image; 1 if the metadata are damaged."""
    if isinstance(image, TiffImageFile):
        return 1  # Pillow turns it when it loads it
    with contextlib.suppress(Exception):
        value = image.getexif().get(_ORIENTATION, 1)
        return int(value) if value in range(1, 9) else 1
    return 1


def _formats(data: _Data) -> tuple[str, ...]:
    """The formats that the bytes may have. Raises UndecodableError for HEIC or AVIF if their decoder is missing."""
    if bytes(data[4:8]) != b"ftyp":
        return IMAGE_FORMATS
    brands = bytes(data[8:40])
    if b"avif" in brands or b"avis" in brands:
        if features.check("avif"):
            return ("AVIF",)
        raise UndecodableError(
            "AVIF, which this Pillow cannot decode: install pillow 11.3 or newer, or convert to JPEG"
        )
    if not any(brand in brands for brand in _HEIF_BRANDS):
        return IMAGE_FORMATS
    if not _has_heif():
        raise UndecodableError("HEIC: install paml[heif], or convert to JPEG")
    return ("HEIF",)


@functools.cache
def _has_heif() -> bool:
    """Whether Pillow can decode HEIC, by the optional package pillow-heif."""
    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    register_heif_opener()
    return True


def _without_metadata(data: _Data) -> bytes | None:
    """A PNG, AVIF or HEIC without metadata, which Pillow may refuse if they are damaged; None for other formats."""
    data = bytes(data)
    if data[4:8] == b"ftyp":
        return data.replace(b"Exif", b"none")  # decoders pass over items of unknown types
    if data[:8] != _PNG:
        return None
    parts, at = [_PNG], len(_PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk = data[at : at + 12 + length]
        is_sound = chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or (kind == b"eXIf" and is_sound):
            parts.append(chunk)
        at += 12 + length
    return b"".join(parts)


def _read_pixels(image: Image.Image, max_pixels: int) -> tuple[np.ndarray, int]:
    """Pixels, uint8 [H, W, 3], and how to turn them."""
    check_pixels(*image.size, max_pixels)
    bits = _sample_bits(image)
    image.load()
    if image.mode == "F" or (image.mode == "I" and isinstance(image, TiffImageFile)):
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit integer"
        raise UndecodableError(f"{kind} pixels, whose range is unknown: convert them to 8 bits (0 to 255)")
    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.int64)  # Pillow's own conversion clips them at 255
        if isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            gray = (1 << bits) - 1 - gray
        pixels = np.repeat((gray >> (bits - 8)).astype(np.uint8)[..., None], 3, axis=-1)
    else:
        rgb = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
        pixels = np.array(rgb if rgb.mode == "RGB" else rgb.convert("RGB"))
    if bits > 8 and pixels.max() < 16:
        raise UndecodableError(
            f"{bits}-bit pixels that use less than a 16th of their range, which is nearly black: scale them to 8 bits"
        )
    return pixels, _orientation(image)


def _sample_bits(image: Image.Image) -> int:
    """Bits of a sample in the file of an opened image, if Pillow does not scale them to the range of the mode."""
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    return (
        16 if image.mode.startswith("I") or (image.format == "PNG" and ";16" in str(cast(ImageFile, image).tile)) else 8
    )
