"""Decoding of the images that people have: rotated, with damaged metadata, unusual JPEGs, deep samples.

`seen` decodes as training and prediction do, and checks that preparation stores the same pixels.
"""

import io
import struct
import sys
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from paml.data.decode import UndecodableError, decode_into, decode_rgb
from paml.shards.decode import _has_heif, image_size
from paml.shards.images import prepare_image
from paml.shards.settings import ShardSettings
from tests.shards.images import encoded, gradient

WIDTH, HEIGHT = 60, 40
T = Image.Transpose
STORED_AS = {
    1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270,
}  # fmt: skip
"""How a camera stores an upright image for each orientation."""
SHARDS = ShardSettings(size=8192, resize="shorter_side")  # keeps the size
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")


def seen(data: bytes) -> np.ndarray:
    """The decoded image, int [H, W, 3]."""
    pixels = decode_rgb(data)
    assert image_size(data) == pixels.shape[1::-1]
    if pixels.shape[0] == pixels.shape[1]:
        out = np.zeros_like(pixels)
        decode_into(data, out)
        np.testing.assert_array_equal(out, pixels)
    assert prepare_image(data, SHARDS).data == simplejpeg.encode_jpeg(pixels, 90, "RGB", "420", fastdct=False)
    return pixels.astype(int)


def refused(data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason):
        decode_rgb(data)
    with pytest.raises(UndecodableError, match=reason):
        prepare_image(data, SHARDS)


def corners() -> Image.Image:
    """Three colored corners, in blocks of JPEG's size, so that lossy formats keep the colors."""
    pixels = np.full((HEIGHT, WIDTH, 3), 240, np.uint8)
    pixels[:16, :16], pixels[:16, -12:], pixels[24:, :16] = (220, 20, 20), (20, 200, 20), (20, 20, 220)
    return Image.fromarray(pixels)


def photo(kind: str = "JPEG", size: int = 48, **options: object) -> bytes:
    return encoded(gradient(3, size, size), kind, **({"quality": 95} if kind == "JPEG" else {}), **options)


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return exif.tobytes()


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">HH", marker, len(body) + 2) + body


def chunk(kind: bytes, body: bytes, damage: int = 0) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ damage)


def with_segments(*bodies: bytes) -> bytes:
    """A JPEG with the bytes after its start marker."""
    data = photo()
    return data[:2] + b"".join(bodies) + data[2:]


def with_chunks(*chunks: bytes, at: bytes = b"IDAT") -> bytes:
    """A PNG with the chunks before the first one of a kind."""
    data = photo("PNG")
    start = data.index(at) - 4
    return data[:start] + b"".join(chunks) + data[start:]


# orientation

FORMATS = {
    "JPEG": ("JPEG", {"quality": 95, "subsampling": 0}),
    "progressive JPEG": ("JPEG", {"quality": 95, "progressive": True}),
    "CMYK JPEG": ("JPEG", {"quality": 95}),
    "PNG": ("PNG", {}),
    "WebP": ("WEBP", {"lossless": True}),
    "TIFF": ("TIFF", {}),
    "TIFF by libtiff": ("TIFF", {"compression": "tiff_lzw"}),
    "AVIF": ("AVIF", {"quality": 95, "subsampling": "4:4:4"}),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_avif) if n == "AVIF" else n for n in FORMATS])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_orientation_is_applied_once(name: str, orientation: int) -> None:
    kind, options = FORMATS[name]
    upright, turned = corners(), STORED_AS[orientation]
    stored = upright if turned is None else upright.transpose(turned)
    stored = stored.convert("CMYK") if name == "CMYK JPEG" else stored
    pixels = seen(encoded(stored, kind, exif=exif_of(orientation), **options))
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(pixels - np.asarray(upright)).mean() < (0.01 if name in ("PNG", "WebP") or "TIFF" in name else 4)


XMP = b"http://ns.adobe.com/xap/1.0/\0" + b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(
    "segments",
    [
        [segment(0xFFE1, exif_of(6))],
        [segment(0xFFED, b"\xff\xda\xff\xd9" * 1500), segment(0xFFE1, exif_of(6))],
        [segment(0xFFE2, bytes(65000))] * 5 + [segment(0xFFE1, exif_of(6))],
        [b"\1\2\3", segment(0xFFE0, bytes(14)), b"\xff\0\xff\0", b"\xff\xff\xff", segment(0xFFE1, exif_of(6))],
        [segment(0xFFE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"), segment(0xFFE1, exif_of(6))],
        [segment(0xFFE1, XMP)],
    ],
    ids=["first", "after 6 KB", "after 320 KB", "after extraneous and fill bytes", "after XMP", "in XMP"],
)
def test_orientation_may_be_anywhere_in_the_header(segments: Sequence[bytes]) -> None:
    np.testing.assert_array_equal(seen(with_segments(*segments)), np.rot90(seen(photo()), -1))


def test_orientation_behind_the_tables_of_a_jpeg() -> None:
    data = photo()
    scan = data.index(b"\xff\xda")
    np.testing.assert_array_equal(
        seen(data[:scan] + segment(0xFFE1, exif_of(6)) + data[scan:]), np.rot90(seen(data), -1)
    )


def test_exif_of_a_thumbnail_in_the_pixel_data_says_nothing() -> None:
    data = photo()
    np.testing.assert_array_equal(seen(data + with_segments(segment(0xFFE1, exif_of(6)))), seen(data))


# damaged metadata

BOMB = b"x\0\0" + zlib.compress(bytes(1 << 22))
DAMAGED_METADATA = {
    "PNG: eXIf without entries": with_chunks(chunk(b"eXIf", b"\0\0\x11\0\0\1\4\0")),
    "PNG: eXIf is text": with_chunks(chunk(b"eXIf", b"no tiff here")),
    "PNG: eXIf checksum": with_chunks(chunk(b"eXIf", exif_of(6)[6:], damage=1)),
    "PNG: eXIf after the pixels": with_chunks(chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"), at=b"IEND"),
    "PNG: text checksum": with_chunks(chunk(b"tEXt", b"Title\0x", damage=1)),
    "PNG: text checksum after the pixels": with_chunks(chunk(b"tEXt", b"Title\0x", damage=1), at=b"IEND"),
    "PNG: short pHYs": with_chunks(chunk(b"pHYs", b"\0")),
    "PNG: short gAMA": with_chunks(chunk(b"gAMA", b"")),
    "PNG: color profile is text": with_chunks(chunk(b"iCCP", b"icc\0\0no profile")),
    "PNG: color profile is large": with_chunks(chunk(b"iCCP", BOMB)),
    "PNG: text is large": with_chunks(chunk(b"zTXt", BOMB)),
    "PNG: raw EXIF profile": with_chunks(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz")),
    "PNG: XMP": with_chunks(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation=\xff")),
    "JPEG: EXIF is text": with_segments(segment(0xFFE1, b"Exif\0\0no tiff here")),
    "JPEG: EXIF points outside": with_segments(segment(0xFFE1, b"Exif\0\0II*\0\xff\xff\xff\xff")),
    "JPEG: EXIF with orientation 9": with_segments(segment(0xFFE1, exif_of(9))),
    "JPEG: color profile": with_segments(segment(0xFFE2, b"ICC_PROFILE\0\7\2no profile")),
    "JPEG: multi-picture index": with_segments(segment(0xFFE2, b"MPF\0II*\0\xff\0\0\0")),
    "JPEG: Photoshop": with_segments(segment(0xFFED, b"Photoshop 3.0\08BIM\4\4\xff")),
    "JPEG: XMP": with_segments(segment(0xFFE1, b"http://ns.adobe.com/xap/1.0/\0\xff<x")),
    "JPEG: a segment longer than the file": with_segments(b"\1\xff\xe1\xff\xff")[:2] + photo()[2:],
    "WebP: EXIF is text": photo("WEBP", lossless=True, exif=b"Exif\0\0no tiff here"),
    "WebP: XMP": photo("WEBP", lossless=True, xmp=b"\xff\0<x"),
    "WebP: color profile": photo("WEBP", lossless=True, icc_profile=b"no profile"),
    "TIFF: color profile": photo("TIFF", icc_profile=b"no profile"),
    "TIFF: XMP": photo("TIFF", tiffinfo={700: b"\xff\0<x"}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", DAMAGED_METADATA)
def test_damaged_metadata_change_no_pixel(name: str) -> None:
    kind = name.split(":")[0].upper()
    sound = photo(kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(seen(DAMAGED_METADATA[name]), seen(sound))


@needs_avif
def test_damaged_exif_of_avif_changes_no_pixel() -> None:
    exif = Image.Exif()
    exif[270] = "title"
    data = photo("AVIF", exif=exif.tobytes())
    start = data.index(b"title") - 26  # the header of 8 bytes, one entry
    assert data[start : start + 4] in (b"II*\0", b"MM\0*")
    damaged = data[:start] + b"text" + data[start + 4 :]
    np.testing.assert_array_equal(seen(damaged), seen(data))


def test_an_orientation_is_read_although_other_metadata_are_damaged() -> None:
    data = with_chunks(chunk(b"tEXt", b"Title\0x", damage=1), chunk(b"eXIf", exif_of(6)[6:]))
    np.testing.assert_array_equal(seen(data), np.rot90(seen(photo("PNG")), -1))


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_random_exif_turns_an_image_at_most(data: st.DataObject) -> None:
    exif = bytearray(exif_of(data.draw(st.integers(0, 9))))
    for _ in range(data.draw(st.integers(1, 6))):
        exif[data.draw(st.integers(6, len(exif) - 1))] = data.draw(st.integers(0, 255))
    body = bytes(exif) + data.draw(st.binary(max_size=20))
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    if kind == "JPEG":
        damaged, sound = with_segments(segment(0xFFE1, body)), photo()
    elif kind == "PNG":
        damaged, sound = with_chunks(chunk(b"eXIf", body[6:])), photo("PNG")
    else:
        damaged, sound = photo(kind, lossless=True, exif=body), photo(kind, lossless=True)
    pixels, upright = seen(damaged), seen(sound)
    turns = [np.rot90(each, turn) for each in (upright, upright.swapaxes(0, 1)) for turn in range(4)]
    assert any(np.array_equal(pixels, turn) for turn in turns)


# unusual JPEGs


def jpeg_of_levels(factors: Sequence[tuple[int, int]], levels: np.ndarray) -> bytes:
    """A gray image of one level per MCU, levels[rows, columns], with any sampling factors (horizontal, vertical).

    The Huffman codes are simple: a DC category is its number in 4 bits, and AC has only the end of block.
    """
    h, v = (max(each) for each in zip(*factors, strict=True))
    rows, columns = levels.shape
    frame = struct.pack(">BHHB", 8, 8 * v * rows, 8 * h * columns, 3)
    frame += b"".join(bytes([number, a << 4 | b, 0]) for number, (a, b) in enumerate(factors))
    tables = segment(0xFFDB, bytes([0] + [8] * 64)) + segment(0xFFC0, frame)
    tables += segment(0xFFC4, bytes([0, 0, 0, 0, 12] + [0] * 12) + bytes(range(12)))
    tables += segment(0xFFC4, bytes([16, 1] + [0] * 16))
    scan = segment(0xFFDA, bytes([3, 0, 0, 1, 0, 2, 0, 0, 63, 0]))
    bits, last = "", 0
    for level in (levels.ravel() - 128).tolist():
        for number, (a, b) in enumerate(factors):
            for block in range(a * b):
                step = level - last if (number, block) == (0, 0) else 0
                size = abs(step).bit_length()
                bits += (
                    f"{size:04b}" + (f"{step if step > 0 else step + (1 << size) - 1:0{size}b}" if size else "") + "0"
                )
        last = level
    bits += "1" * (-len(bits) % 8)
    pixels = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    return b"\xff\xd8" + segment(0xFFE0, b"JFIF\0\1\1\0\0\1\0\1\0\0") + tables + scan + pixels + b"\xff\xd9"


@pytest.mark.parametrize(
    "factors",
    [
        [(1, 1), (1, 1), (1, 1)],
        [(2, 2), (1, 1), (1, 1)],
        [(1, 3), (1, 1), (1, 1)],
        [(3, 1), (1, 1), (1, 1)],
        [(2, 2), (1, 2), (2, 1)],
        [(1, 1), (2, 2), (1, 1)],
    ],
    ids=str,
)
def test_any_chroma_sampling_is_decoded(factors: list[tuple[int, int]]) -> None:
    levels = np.array([[30, 90, 200], [250, 128, 10]])
    h, v = (max(each) for each in zip(*factors, strict=True))
    pixels = seen(jpeg_of_levels(factors, levels))
    assert pixels.shape == (8 * v * 2, 8 * h * 3, 3)
    centers = pixels[4 * v :: 8 * v, 4 * h :: 8 * h]  # away from the borders, where samples are interpolated
    assert np.abs(centers - levels[..., None]).max() <= 1


def samsung(data: bytes) -> bytes:
    """With the parameters of the scan that phones of Samsung write."""
    end = data.index(b"\xff\xda") + 14
    return data[: end - 3] + bytes(3) + data[end:]


def extraneous_in_header(data: bytes) -> bytes:
    start = data.index(b"\xff\xc0")
    return data[:start] + b"\1\2\3" + data[start:]


def extraneous_before_the_end(data: bytes) -> bytes:
    return data[:-2] + b"\0\1\2\3" * 60 + data[-2:]


def damaged_pixels(data: bytes, position: float = 0.5) -> bytes:
    """With 99 random bytes for those at a position in the pixel data, 0 to 1."""
    start = int(data.index(b"\xff\xda") * (1 - position) + (len(data) - 200) * position)
    return data[:start] + np.random.default_rng(0).bytes(99) + data[start + 99 :]


SOUND = [
    samsung,
    extraneous_in_header,
    extraneous_before_the_end,
    lambda data: samsung(extraneous_in_header(extraneous_before_the_end(data))),
    lambda data: data[:-2] + b"\x5a\x17" * 4 + data[-2:],
    lambda data: data + b"a video\xff\xda" * 600,
]


@pytest.mark.parametrize("change", SOUND, ids=["Samsung", "header", "end", "all", "few at the end", "trailing"])
def test_warnings_that_harm_no_pixel_are_passed_over(change) -> None:
    np.testing.assert_array_equal(seen(change(photo())), seen(photo()))


@pytest.mark.parametrize("change", SOUND[:2], ids=["Samsung", "header"])
@pytest.mark.parametrize("options", [{}, {"exif": exif_of(6)}], ids=["", "rotated"])
def test_they_hide_no_damage_of_pixels(change, options: dict) -> None:
    data = photo(size=96, **options)
    refused(damaged_pixels(data), "orrupt")
    refused(damaged_pixels(change(data)), "orrupt")
    refused(change(data)[: len(data) // 2], "truncated")


def test_the_rest_of_a_damaged_scan_is_no_padding() -> None:
    data = photo(size=96)
    for position in np.linspace(0.1, 1, 200):
        damaged = damaged_pixels(data, position)
        try:
            simplejpeg.decode_jpeg(damaged)
        except ValueError as error:
            if "extraneous bytes before marker 0xd9" in str(error):
                return refused(damaged, "extraneous bytes")
    pytest.fail("no damage leaves bytes over")


@pytest.mark.parametrize("between", [b"", segment(0xFFFE, b"\xff\xd9")], ids=["", "after a false end"])
def test_many_scans_are_refused(between: bytes) -> None:
    data = photo(progressive=True)
    last = data.rindex(b"\xff\xda")
    refused(data[:last] + between + data[last:-2] * 600 + b"\xff\xd9", "scans")


def test_truncated_pixels_of_an_odd_sampling_are_refused() -> None:
    data = jpeg_of_levels([(1, 3), (1, 1), (1, 1)], np.arange(0, 250, 5).reshape(5, 10))
    refused(data[: len(data) - 30], "truncated")


# deep samples


def deep(kind: str, gray: np.ndarray, **options: object) -> bytes:
    return encoded(Image.fromarray(gray), kind, **options)


RAMP = np.linspace(0, 65535, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(np.uint16)


def png16(pixels: np.ndarray, color: int) -> bytes:
    """pixels: uint16 [H, W, channels]; color: PNG's color type."""
    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def tiff(
    pixels: np.ndarray, *, photometric: int, bits: int = 16, order: str = "<", packed: bytes | None = None
) -> bytes:
    """An uncompressed TIFF of unsigned samples: pixels [H, W, channels]."""
    height, width, channels = pixels.shape
    body = pixels.astype(f"{order}u2").tobytes() if packed is None else packed
    depth = struct.pack(f"{order}{channels}H", *[bits] * channels)
    entries = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, bits if channels == 1 else 8 + len(body)),
        (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, channels), (278, 3, 1, height),
        (279, 4, 1, len(body)),
    ]  # fmt: skip
    ifd = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        ifd += struct.pack(f"{order}HHI", tag, kind, count)
        ifd += struct.pack(f"{order}HH", value, 0) if kind == 3 and count == 1 else struct.pack(f"{order}I", value)
    mark = b"II" if order == "<" else b"MM"
    return mark + struct.pack(f"{order}HI", 42, 8 + len(body) + len(depth)) + body + depth + ifd + bytes(4)


COLOR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (deep("PNG", RAMP), RAMP),
        (deep("TIFF", RAMP), RAMP),
        (deep("TIFF", RAMP, compression="tiff_lzw"), RAMP),
        (tiff(RAMP[..., None], photometric=1, order=">"), RAMP),
        (tiff(RAMP[..., None], photometric=0), 65535 - RAMP),
        (b"P5 60 40 65535\n" + RAMP.astype(">u2").tobytes(), RAMP),
        (png16(COLOR, 2), COLOR),
        (png16(np.dstack([RAMP, RAMP[::-1]]), 4), RAMP),
        (png16(np.dstack([COLOR, RAMP]), 6), COLOR),
        (tiff(COLOR, photometric=2), COLOR),
        (tiff(COLOR, photometric=2, order=">"), COLOR),
    ],
    ids=["PNG", "TIFF", "TIFF LZW", "TIFF big-endian", "TIFF white is zero", "PGM", "PNG RGB", "PNG gray and alpha",
         "PNG RGBA", "TIFF RGB", "TIFF RGB big-endian"],
)  # fmt: skip
def test_of_16_bits_the_upper_8_are_used(data: bytes, wanted: np.ndarray) -> None:
    wanted = wanted >> 8
    np.testing.assert_array_equal(seen(data), wanted if wanted.ndim == 3 else np.repeat(wanted[..., None], 3, axis=2))


def test_of_12_bits_the_upper_8_are_used() -> None:
    high, low = RAMP.ravel()[::2] >> 4, RAMP.ravel()[1::2] >> 4
    packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], axis=-1).astype(np.uint8).tobytes()
    pixels = seen(tiff(RAMP[..., None], photometric=1, bits=12, packed=packed))
    np.testing.assert_array_equal(pixels, np.repeat((RAMP >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (deep("TIFF", RAMP.astype(np.int32)), "32-bit integer"),
        (deep("TIFF", RAMP.astype(np.float32) / 65535), "floating-point"),
        (deep("PNG", RAMP >> 4), "16-bit pixels that use less"),
        (deep("TIFF", RAMP >> 8), "16-bit pixels that use less"),
        (png16(COLOR >> 4, 2), "16-bit pixels that use less"),
        (tiff(COLOR >> 8, photometric=2), "16-bit pixels that use less"),
    ],
    ids=["int32", "float", "12 of 16 bits", "8 of 16 bits", "12 of 16 bits in color", "8 of 16 bits in color"],
)
def test_samples_of_unknown_range_are_refused_rather_than_black(data: bytes, reason: str) -> None:
    refused(data, reason)


def test_a_transparent_pixel_has_its_stored_color() -> None:
    pixels = np.dstack([np.asarray(corners()), np.zeros((HEIGHT, WIDTH), np.uint8)])
    np.testing.assert_array_equal(seen(encoded(Image.fromarray(pixels), "PNG")), np.asarray(corners()))


# HEIC and AVIF

HEIC_START = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_heic_without_its_decoder_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    _has_heif.cache_clear()
    try:
        refused(HEIC_START, r"HEIC: install paml\[heif\], or convert to JPEG")
        refused(HEIC_START[:12], r"HEIC: install paml\[heif\]")
    finally:
        _has_heif.cache_clear()


def test_avif_without_its_decoder_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda name: False)
    refused(b"\0\0\0\x18ftypavif\0\0\0\0mif1", "AVIF.*convert to JPEG")


def test_heic_is_decoded() -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif (paml[heif]) is not installed")
    out = io.BytesIO()
    pillow_heif.from_pillow(corners()).save(out, quality=95, chroma=444)
    assert np.abs(seen(out.getvalue()) - np.asarray(corners())).mean() < 4
    with pytest.raises(UndecodableError):
        decode_rgb(out.getvalue()[:-200])


@needs_avif
def test_truncated_avif_is_refused() -> None:
    refused(photo("AVIF")[:-200], "runcated")


def test_other_files_of_the_same_container_are_no_image() -> None:
    refused(b"\0\0\0\x18ftypisom\0\0\0\0mp42" + bytes(30), "known format")
