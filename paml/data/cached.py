"""Features of a frozen front, in files mapped into memory, read in the place of images. No torch here."""

import dataclasses
from collections.abc import Callable

import numpy as np

from paml.data.decoders import Faults, Filling, Pool, Threads
from paml.shards.cache import Traffic


@dataclasses.dataclass(frozen=True)
class CachedFeatures:
    """What the front gives for the n images of a manifest, in its order."""

    plain: np.ndarray
    """float16 [n, h, w, C]."""
    mirrored: np.ndarray
    """The same of the mirrored images; `plain` itself where none is mirrored."""
    bad: dict[int, str]
    """Places of the images that could not be used, each with the reason; their features are 0."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, C)."""
        return self.plain.shape[1:]  # pyright: ignore[reportReturnType]


class FeatureReaders:
    """Decoders that decode nothing: threads copy rows, so that the step does not wait for a cold disk.

    `flips` says of places in the manifest, int64[n], which images are mirrored, bool[n].
    """

    def __init__(
        self,
        features: CachedFeatures,
        flips: Callable[[np.ndarray], np.ndarray],
        batch_size: int,
        threads: int,
        *,
        keep: int,
    ) -> None:
        self._features, self._flips = features, flips
        self._pool = Pool(lambda: np.empty((batch_size, *features.shape), np.float16), keep)
        self._workers = Threads(threads, "features")

    def fill(self, index: np.ndarray, out: np.ndarray | None = None) -> Filling:
        rows = self._pool.take()[: len(index)] if out is None else out
        return Filling(rows, [(0, self._workers.submit(self._copy, index, rows))])

    def _copy(self, index: np.ndarray, out: np.ndarray) -> Faults:
        features, faults = self._features, []
        for place, (sample, mirror) in enumerate(zip(index.tolist(), self._flips(index).tolist(), strict=True)):
            out[place] = (features.mirrored if mirror else features.plain)[sample]
            if sample in features.bad:
                faults.append((place, features.bad[sample]))
        return faults

    def release(self, shards: list[int]) -> None:
        """Nothing is held."""

    def traffic(self) -> Traffic:
        return Traffic()

    def close(self) -> None:
        self._workers.close()
