"""Decode compressed images directly into the batch, cropped and resized.

torch's antialiased bilinear resize of uint8 is within one gray level of Pillow's. Images stored at the training size
need no torch.
"""

import numpy as np

from paml.shards.decode import UndecodableError as UndecodableError
from paml.shards.decode import decode_upright


def decode_rgb(data: bytes | memoryview) -> np.ndarray:
    """Decode to uint8 [H, W, 3]. Raises UndecodableError."""
    return decode_upright(data).copy()


def decode_into(data: bytes | memoryview, out: np.ndarray, crop: np.ndarray | None = None) -> None:
    """Decode one image into `out`, uint8 [S, S, 3] in C order, and resize it if its size differs.

    crop: float64[4], left, top, right and bottom as fractions of width and height; None for the whole image. Raises
    UndecodableError; the content of `out` is then undefined.
    """
    pixels = decode_upright(data, out if crop is None else None)
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
