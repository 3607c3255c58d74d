"""Settings of the data plane."""

import dataclasses
from typing import Literal

from paml.errors import SettingsError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the prepared data lie and how they are read."""

    root: str = "data/openimages_v3"
    """Folder made by jobs/prepare_openimages.py: shards/{split}/ and labels/{split}.arrow. Local or s3://."""
    train_labels: str = "labels/train.arrow"
    """Label table to train on, below `root`; another label set needs no new shards."""
    train_truth: str | None = "labels/train-full.arrow"
    """Table of full labels of the training images, if there is one: counts the rejected false negatives."""
    train_split: str = "train"
    """Folder below shards/ that holds the training images."""
    validation_split: str = "validation"
    """Folder below shards/ and table below labels/ that choose the epoch."""
    test_split: str | None = "test"
    """Scored once at the end with the chosen epoch; null for none."""
    images: Literal["observed", "positive", "all"] = "observed"
    """Training images: with any observed label, with a positive one, or all of the manifest."""
    image_size: int | None = None
    """Side of the training picture in pixels; null takes the size of the shards as stored."""
    flip: float = 0.5
    """Share of the training images mirrored in an epoch, 0 to 1."""
    crop: float = 1.0
    """Smallest share of a training picture's area that a random crop keeps; the crop is resized to the training size.
    1 crops nothing, as the papers do. What is labelled may lie outside of a small crop."""
    shuffle_window: int = 1024
    """Samples of a stream shuffled together, over what their hashed places in the shards mix already. Larger suits
    other people's shards, sorted by class; smaller keeps fewer shards in use at a time (benchmarks/plan.txt)."""
    probe: float = 0.01
    """Share of the observed training labels hidden to estimate the rejection's recall, 0 to below 1."""
    decode_threads: int | None = None
    """Decoding threads of each worker; null takes the CPUs that the worker has."""
    loader_processes: int = 0
    """Decoding processes of each worker; 0 decodes in threads, which is faster (benchmarks/loader.py)."""
    prefetch: int = 3
    """Batches decoded ahead of the step."""
    cache_dir: str | None = None
    """Folder for shards of a bucket, shared by all processes of a node; null takes $PAML_CACHE or ~/.cache/paml."""
    cache_gb: float | None = None
    """Bound of that folder in GB (1e9 bytes); null takes 80 % of the room that its disk has."""
    shards_ahead: int = 4
    """Shards of a bucket fetched by each worker before they are needed."""
    features_dir: str | None = None
    """Folder for the features of model.train_from, shared by all runs; null takes `root`/features where root is local,
    else features in the folder of `cache_dir`."""
    max_bad_share: float = 0.001
    """A run stops once more than this share of a worker's images of an epoch cannot be used."""

    def __post_init__(self) -> None:
        for name, low, high in (("flip", 0, 1), ("probe", 0, 0.5), ("max_bad_share", 0, 1)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise SettingsError(f"data.{name} is {value}; it must lie between {low} and {high}")
        if not 0 < self.crop <= 1:
            raise SettingsError(f"data.crop is {self.crop}; it must be above 0 and at most 1 (1 crops nothing)")
        if self.images not in ("observed", "positive", "all"):
            raise SettingsError(f"data.images is {self.images!r}; it must be observed, positive or all")
        for name in ("shuffle_window", "prefetch", "decode_threads", "image_size", "shards_ahead"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"data.{name} is {value}; it must be at least 1")
        for name in ("loader_processes", "cache_gb"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise SettingsError(f"data.{name} is {value}; it must be at least 0")
