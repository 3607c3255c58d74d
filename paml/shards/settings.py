"""How images become shards."""

import dataclasses
from typing import Any

from paml.errors import SettingsError
from paml.shards.images import Chroma, Resize

_ADDED_LATER = {"chroma": "4:2:0"}
"""Settings that older shards do not name, and what they were made with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """How images become shards. The bytes of the shards depend on these and on the images alone."""

    size: int = 448
    """Side of the stored images in pixels, from 16 to 8192; unused with `original`."""
    resize: Resize = "squash"
    """`squash`: both sides become `size`, as in the papers. `shorter_side`: the shorter side comes down to
    `size`, aspect kept, never enlarged. `original`: the bytes stay as they are (jpg, png and webp)."""
    quality: int = 90
    """Of the JPEG encoding (baseline), 1 to 100; unused with `original`."""
    chroma: Chroma = "4:2:0"
    """Colours at half the resolution, as nearly every photo has them, or `4:4:4`: at all of it, for 15 % more bytes.
    Better for small pictures: at 160 px 4:2:0 cost 0.4 points of mAP. In YAML with quotes. Unused with `original`."""
    samples_per_shard: int = 2000
    """Images a shard holds on average: sizes vary by about the square root of it."""
    seed: int = 0
    """Of the hash that gives an image its shard and its place in it."""
    strict: bool = True
    """Refuse JPEG files that decode only with the decoder's warnings (corrupt data); False keeps them."""
    max_pixels: int = 1 << 27
    """Images with more pixels are refused, so that one file cannot use up the memory."""

    def __post_init__(self) -> None:
        if self.resize not in ("squash", "shorter_side", "original"):
            raise SettingsError(f"shards.resize is {self.resize!r}: set it to squash, shorter_side or original")
        if self.chroma not in ("4:2:0", "4:4:4"):
            raise SettingsError(f"shards.chroma is {self.chroma!r}: set it to '4:2:0' or '4:4:4'")
        for name, low, high in (
            ("size", 16, 8192),
            ("quality", 1, 100),
            ("samples_per_shard", 1, 10_000_000),
            ("seed", 0, 2**64 - 1),
            ("max_pixels", 1, 2**40),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise SettingsError(f"shards.{name} is {value!r}: set it to a whole number from {low} to {high}")

    def made(self, stored: dict[str, Any]) -> bool:
        """Whether shards that say they were made with `stored` are those that these settings make."""
        return _ADDED_LATER | stored == dataclasses.asdict(self)
