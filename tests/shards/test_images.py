import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin

from paml.shards.images import PreparedImage, UndecodableError, image_size, prepare_image
from paml.shards.settings import ShardSettings
from tests.shards.images import decoded, encoded, gradient


def prepare(data: bytes, size: int = 32, resize: str = "squash", **options: object) -> PreparedImage:
    options = {"quality": 90, "max_pixels": 1 << 24, **options}
    return prepare_image(data, ShardSettings(size=size, resize=resize, **options))  # pyright: ignore[reportArgumentType]


def distance(image: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference in gray levels."""
    return float(np.abs(np.asarray(image.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)).mean())


def test_output_is_a_baseline_420_jpeg() -> None:
    prepared = prepare(encoded(gradient(1, 300, 200), progressive=True, quality=95, subsampling=0))
    image = decoded(prepared.data)
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
    assert "progressive" not in image.info
    assert JpegImagePlugin.get_sampling(image) == 2
    assert (prepared.width, prepared.height, prepared.extension) == (32, 32, "jpg")


def test_full_chroma_resolution_is_closer_to_the_original() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)
    original = Image.fromarray(noise)
    half, full = (decoded(prepare(encoded(original, "PNG"), 48, chroma=chroma).data) for chroma in ("4:2:0", "4:4:4"))
    assert [JpegImagePlugin.get_sampling(image) for image in (half, full)] == [2, 0]
    assert distance(full, original) < 0.5 * distance(half, original)


def test_resize_equals_pillows_antialiased_bilinear() -> None:
    original = gradient(2, 517, 389)
    reference = original.resize((160, 160), Image.Resampling.BILINEAR)
    by_pillow = decoded(encoded(reference, quality=90, subsampling="4:2:0"))
    ours = decoded(prepare(encoded(original, "PNG"), 160).data)
    assert distance(ours, reference) < 1.02 * distance(by_pillow, reference)
    assert distance(ours, by_pillow) < 0.5


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 200), height=st.integers(1, 200), size=st.integers(16, 100))
def test_shorter_side_keeps_the_aspect_ratio_and_never_enlarges(width: int, height: int, size: int) -> None:
    data = encoded(Image.new("RGB", (width, height), (9, 99, 200)))
    prepared = prepare(data, size, "shorter_side")
    assert min(prepared.width, prepared.height) == min(size, width, height)
    assert abs(prepared.width * height - prepared.height * width) <= max(width, height)
    assert decoded(prepared.data).size == (prepared.width, prepared.height)
    assert decoded(prepare(data, size).data).size == (size, size)


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_original_keeps_the_bytes(kind: str, extension: str) -> None:
    data = encoded(gradient(3), kind)
    assert prepare(data, resize="original") == (data, 64, 48, extension)
    with pytest.raises(UndecodableError):
        prepare(data[: len(data) // 2], resize="original")


def test_original_rejects_formats_that_readers_do_not_support() -> None:
    with pytest.raises(UndecodableError, match="BMP cannot be stored"):
        prepare(encoded(gradient(3), "BMP"), resize="original")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    original = gradient(4)
    if mode == "I;16":
        gray = np.asarray(original.convert("L"))
        image, expected = Image.fromarray(gray.astype(np.uint16) * 257), original.convert("L")
    else:
        image = expected = original.convert(mode, palette=Image.Palette.ADAPTIVE)
    kind = {"CMYK": "JPEG", "YCbCr": "TIFF"}.get(mode, "PNG")
    data = encoded(image, kind, **({"quality": 98} if kind == "JPEG" else {}))
    for resize in ("squash", "shorter_side"):
        out = decoded(prepare(data, 64, resize, quality=98).data)
        assert out.mode == "RGB"
        assert distance(out, expected.convert("RGB").resize(out.size, Image.Resampling.BILINEAR)) < 12
    assert distance(decoded(prepare(data, 48, "shorter_side", quality=98).data), expected) < (30 if mode == "1" else 4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    stored = gradient(5, 80, 40)
    data = encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = stored
    transforms = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.ROTATE_270, Image.Transpose.FLIP_LEFT_RIGHT],
        6: [Image.Transpose.ROTATE_270],
        7: [Image.Transpose.ROTATE_90, Image.Transpose.FLIP_LEFT_RIGHT],
        8: [Image.Transpose.ROTATE_90],
    }
    for transform in transforms.get(orientation, []):
        upright = upright.transpose(transform)
    prepared = prepare(data, 40, "shorter_side")
    assert (prepared.width, prepared.height) == upright.size == image_size(data)
    assert distance(decoded(prepared.data), upright) < 8
    if kind != "TIFF":
        assert prepare(data, resize="original")[:3] == (data, *upright.size)


def test_an_invalid_tag_next_to_the_orientation_rejects_no_image() -> None:
    exif = Image.Exif()
    exif[274], exif[296] = 6, 2
    unit, negative = bytes.fromhex("0128 0003 00000001 0002"), bytes.fromhex("0128 0008 00000001 ffff")
    assert unit in exif.tobytes()
    prepared = prepare(
        encoded(gradient(5, 80, 40), "PNG", exif=exif.tobytes().replace(unit, negative)), 40, "shorter_side"
    )
    assert (prepared.width, prepared.height) == (40, 80)


def test_a_side_that_jpeg_cannot_store_is_rejected() -> None:
    data = encoded(Image.new("L", (16, 66_000)), "PNG")
    with pytest.raises(UndecodableError, match="65500"):
        prepare(data, 16, "shorter_side")
    assert prepare(data, 16).width == 16


def test_too_many_pixels_are_rejected() -> None:
    with pytest.raises(UndecodableError, match="64x48 pixels: at most 1,000"):
        prepare(encoded(gradient(6)), max_pixels=1000)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_an_image_or_bad_image(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]))
    raw = bytearray(encoded(gradient(7), kind))
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    try:
        prepared, reason = prepare(bytes(raw[:cut]), 16), None
    except UndecodableError as error:
        prepared, reason = None, str(error)
    if prepared is None:
        assert reason
        assert "\n" not in reason
    else:
        assert Image.open(io.BytesIO(prepared.data)).size == (16, 16)
