"""Random flips and crops: pure functions of (seed, epoch, image)."""

import dataclasses

import numpy as np

from paml.data.plan import draw64

_FLIP = 3
_CROP_AREA, _CROP_ASPECT, _CROP_LEFT, _CROP_TOP = 6, 7, 8, 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The random flips and crops of one epoch; the default changes nothing."""

    seed: int = 0
    epoch: int = 0
    flip_prob: float = 0.0
    """Probability of mirroring an image."""
    min_crop_area: float = 1.0
    """Smallest area of a crop, as a fraction of the image; 1 disables cropping."""

    def flips(self, index: np.ndarray) -> np.ndarray:
        """bool[n]: whether to mirror each image; index int64[n], positions in the manifest."""
        return self._draw(_FLIP, index) < np.uint64(min(self.flip_prob * 2.0**64, 2.0**64 - 1025))

    def crops(self, index: np.ndarray) -> np.ndarray | None:
        """float64[n, 4]: left, top, right and bottom of each crop, as fractions of width and height; None if disabled.

        Random resized crops (Szegedy et al. 2015): the area is uniform in [min_crop_area, 1]. The aspect ratio,
        relative to the image's, is log-uniform in [3/4, 4/3]. A side that would be longer than the image's is cut to
        it.
        """
        if self.min_crop_area >= 1:
            return None
        area, aspect, left, top = (
            (self._draw(purpose, index) >> np.uint64(11)).astype(np.float64) * 2.0**-53
            for purpose in (_CROP_AREA, _CROP_ASPECT, _CROP_LEFT, _CROP_TOP)
        )
        area = self.min_crop_area + (1 - self.min_crop_area) * area
        aspect = np.exp((2 * aspect - 1) * np.log(4 / 3))
        width, height = np.minimum(1, np.sqrt(area * aspect)), np.minimum(1, np.sqrt(area / aspect))
        left, top = left * (1 - width), top * (1 - height)
        return np.stack([left, top, left + width, top + height], axis=1)

    def _draw(self, purpose: int, index: np.ndarray) -> np.ndarray:
        return draw64(self.seed, self.epoch, purpose, index)
