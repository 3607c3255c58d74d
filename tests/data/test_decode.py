"""Which pictures are read, and to which pixels; with and without libjpeg-turbo."""

import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paml.data import decode
from paml.data.decode import UndecodableError, decode_into, decode_rgb

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT = 56, 40


def scene(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Smooth colours with grain, so that decoders have something to disagree about."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 9)], axis=-1)
    grain = np.random.default_rng(0).normal(0, 6, pixels.shape)
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


GREY16 = (np.arange(WIDTH * HEIGHT, dtype=np.uint32).reshape(HEIGHT, WIDTH) * 65535 // (WIDTH * HEIGHT)).astype(
    "uint16"
)
PICTURES = {
    "baseline": encoded(scene(), quality=92),
    "progressive": encoded(scene(), quality=92, progressive=True),
    "4:4:4": encoded(scene(), quality=92, subsampling=0),
    "grey": encoded(scene().convert("L"), quality=92),
    "CMYK": encoded(scene().convert("CMYK"), quality=92),
    "PNG": encoded(scene(), "PNG"),
    "palette": encoded(scene().convert("P"), "PNG"),
    "transparent": encoded(scene().convert("RGBA"), "PNG"),
    "16 bit": encoded(Image.fromarray(GREY16), "PNG"),
    "WebP": encoded(scene(), "WEBP", quality=92),
    "EXIF-turned": encoded(scene(), quality=92, exif=turned()),
    "EXIF-turned PNG": encoded(scene(), "PNG", exif=turned()),
}
LOSSY = 3
"""Grey levels between two JPEG decoders of the same file, whose colour conversions round differently."""


def expected(name: str) -> np.ndarray:
    if name == "16 bit":
        return np.repeat((GREY16 >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if name.startswith("EXIF"):
        kind = "PNG" if name.endswith("PNG") else "JPEG"
        stored = Image.open(io.BytesIO(encoded(scene(), kind, **({} if kind == "PNG" else {"quality": 92}))))
        return np.asarray(stored.convert("RGB").transpose(Image.Transpose.ROTATE_270))
    return np.asarray(Image.open(io.BytesIO(PICTURES[name])).convert("RGB"))


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_is_read_upright_in_rgb(name: str) -> None:
    pixels = decode_rgb(memoryview(PICTURES[name]))
    wanted = expected(name)
    assert pixels.dtype == np.uint8
    assert pixels.shape == wanted.shape
    assert np.abs(pixels.astype(int) - wanted.astype(int)).max() <= LOSSY


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (PICTURES["baseline"][:-400], "truncated"),
        (PICTURES["progressive"][: len(PICTURES["progressive"]) // 3], "truncated"),
        (PICTURES["PNG"][:-400], "truncated|Truncated|broken"),
        (PICTURES["baseline"][:20], "cannot identify|Truncated"),
        (b"no picture at all", "cannot identify"),
    ],
    ids=["empty", "cut JPEG", "cut progressive", "cut PNG", "header alone", "text"],
)
def test_what_is_damaged_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason):
        decode_rgb(data)


@pytest.mark.parametrize(("width", "height"), [(56, 40), (200, 150), (33, 90), (24, 24)])
def test_resizing_is_pils_antialiased_bilinear_within_one_grey_level(width: int, height: int) -> None:
    stored = scene(width, height)
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 92})):
        data = encoded(stored, kind, **options)
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        wanted = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        out = np.zeros((32, 32, 3), dtype=np.uint8)
        decode_into(data, out)
        assert np.abs(out.astype(int) - wanted).max() <= (1 if kind == "PNG" else LOSSY)


@pytest.mark.parametrize("part", [(0.0, 0.0, 1.0, 1.0), (0.25, 0.1, 0.75, 0.6), (0.5, 0.5, 0.9, 1.0)])
def test_a_part_is_cut_out_and_resized_as_pil_does(part: tuple[float, ...]) -> None:
    stored = scene(120, 80)
    data, out = encoded(stored, "PNG"), np.zeros((32, 32, 3), dtype=np.uint8)
    decode_into(data, out, np.array(part))
    box = tuple(round(share * side) for share, side in zip(part, (120, 80, 120, 80), strict=True))
    wanted = np.asarray(stored.crop(box).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)  # type: ignore[arg-type]
    assert np.abs(out.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("part", [(0.0, 0.0, 1e-6, 1e-6), (1.0, 1.0, 1.0, 1.0), (0.999, 0.0, 1.0, 0.001)])
def test_the_smallest_part_is_a_pixel(part: tuple[float, ...]) -> None:
    stored, out = scene(120, 80), np.zeros((8, 8, 3), dtype=np.uint8)
    decode_into(encoded(stored, "PNG"), out, np.array(part))
    corner = np.asarray(stored)[79 if part[1] == 1 else 0, 119 if part[0] > 0.5 else 0]
    np.testing.assert_array_equal(out, np.broadcast_to(corner, out.shape))


def test_a_part_of_the_training_size_is_taken_as_it_is() -> None:
    stored, out = scene(64, 64), np.zeros((32, 32, 3), dtype=np.uint8)
    decode_into(encoded(stored, "PNG"), out, np.array([0.25, 0.5, 0.75, 1.0]))
    np.testing.assert_array_equal(out, np.asarray(stored)[32:64, 16:48])


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    for data in (encoded(scene(32, 32), "PNG"), encoded(scene(32, 32), quality=92)):
        out = np.zeros((32, 32, 3), dtype=np.uint8)
        decode_into(data, out)
        np.testing.assert_array_equal(out, decode_rgb(data))
    np.testing.assert_array_equal(decode_rgb(encoded(scene(32, 32), "PNG")), np.asarray(scene(32, 32)))


@pytest.mark.parametrize("data", [PICTURES["baseline"], encoded(scene(32, 32), quality=92)], ids=["other size", "same"])
def test_a_batch_is_filled_in_place_and_nothing_beside_it(data: bytes) -> None:
    batch = np.full((3, 32, 32, 3), 7, dtype=np.uint8)
    decode_into(data, batch[1])
    assert (batch[0] == 7).all()
    assert (batch[2] == 7).all()
    assert not (batch[1] == 7).all()


def test_pictures_do_not_share_the_memory_that_decoding_uses() -> None:
    first = decode_rgb(PICTURES["baseline"])
    kept = first.copy()
    decode_rgb(PICTURES["4:4:4"])
    np.testing.assert_array_equal(first, kept)


def test_threads_decode_the_same() -> None:
    names = [name for name in PICTURES for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: decode_rgb(PICTURES[name]), names))
    for name, pixels in zip(names, found, strict=True):
        np.testing.assert_array_equal(pixels, decode_rgb(PICTURES[name]))


def test_pictures_of_the_training_size_need_no_torch() -> None:
    """Or a loader process would take seconds to start."""
    code = "import sys, paml.data.decoders; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


WITHOUT_TURBO = """
import sys
sys.modules["simplejpeg"] = None
import numpy as np
from paml.data import decode
from tests.data.test_decode import PICTURES
assert decode._turbo is None
np.savez(sys.argv[1], **{name: decode.decode_rgb(data) for name, data in PICTURES.items()})
for data in (PICTURES["baseline"][:-400], b""):
    try:
        decode.decode_rgb(data)
    except decode.UndecodableError:
        continue
    raise SystemExit("a damaged picture was read")
"""


def test_without_libjpeg_turbo_pil_reads_the_same(tmp_path: Path) -> None:
    if decode._turbo is None:
        pytest.skip("simplejpeg is not installed here: there is nothing to compare with")
    out = tmp_path / "pixels.npz"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", WITHOUT_TURBO, str(out)], check=True, cwd=ROOT, env=environment, timeout=120)
    with np.load(out) as found:
        assert set(found.files) == set(PICTURES)
        for name, data in PICTURES.items():
            assert np.abs(found[name].astype(int) - decode_rgb(data).astype(int)).max() <= LOSSY, name
