"""Settings of the shard writer."""

import dataclasses
from typing import Literal

from paml.errors import check_setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """How to store images in shards. The bytes of the shards depend only on these settings and the images."""

    size: int = 448
    """Side of the stored images in pixels, 16 to 8192; unused with `original`."""
    resize: Literal["squash", "shorter_side", "original"] = "squash"
    """`squash`: resize both sides to `size`, as in the papers. `shorter_side`: reduce the shorter side to `size` and
    keep the aspect ratio; never enlarge. `original`: keep the bytes (jpg, png and webp)."""
    quality: int = 90
    """JPEG quality, 1 to 100; unused with `original`."""
    chroma: Literal["4:2:0", "4:4:4"] = "4:2:0"
    """Chroma subsampling: `4:2:0` (half resolution, as in most photos) or `4:4:4` (full, 15 % more bytes). Use 4:4:4
    for small images: at 160 px, 4:2:0 costs 0.4 points of mAP. Quote the value in YAML. Unused with `original`."""
    samples_per_shard: int = 2000
    """Average number of images per shard; the numbers vary by about its square root."""
    seed: int = 0
    """Seed of the hash that determines the shard of an image and its position in it."""
    max_pixels: int = 1 << 27
    """Reject images with more pixels, which could exhaust the memory."""

    def __post_init__(self) -> None:
        for name, choices in (("resize", ("squash", "shorter_side", "original")), ("chroma", ("4:2:0", "4:4:4"))):
            value = getattr(self, name)
            check_setting(value in choices, f"shards.{name}", value, f"one of {', '.join(map(repr, choices))}")
        for name, low, high in (
            ("size", 16, 8192),
            ("quality", 1, 100),
            ("samples_per_shard", 1, 10_000_000),
            ("seed", 0, 2**64 - 1),
            ("max_pixels", 1, 2**40),
        ):
            value = getattr(self, name)
            check_setting(
                type(value) is int and low <= value <= high, f"shards.{name}", value, f"an integer from {low} to {high}"
            )
