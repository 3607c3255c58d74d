"""Settings of the data pipeline."""

import dataclasses
import os
from typing import Literal

from paml import storage
from paml.errors import SettingsError, check_setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Location of the prepared data and how to read it."""

    root: str = ""
    """Folder written by `paml prepare`, with shards/{split}/ and labels/{split}.arrow. Local or s3://. Required."""
    embeddings: str | None = None
    """File of embeddings to train on instead of images, local or s3://: Parquet (key, vector), or .npy [N, C] or
    [N, C, H, W] with the keys in keys.txt or keys.npy next to it. {split} stands for the split, if each has a file.
    `root` then needs labels only."""
    train_labels: str = "labels/train.arrow"
    """Label table for training, relative to `root`. Another label set needs no new shards."""
    train_truth: str | None = "labels/train-full.arrow"
    """Table with the full labels of the training images, if it exists. Used to count rejected false negatives."""
    train_split: str = "train"
    """Name of the training split: the folder below shards/."""
    validation_split: str = "validation"
    """Name of the split that selects the best epoch: the folder below shards/ and the table below labels/."""
    test_split: str | None = "test"
    """Name of the split that is scored once at the end, with the best epoch; null skips the test."""
    images: Literal["observed", "positive", "all"] = "observed"
    """Training images: with an observed label (observed), with a positive label (positive), or all."""
    image_size: int | None = None
    """Side of the training images in pixels; null uses the size stored in the shards."""
    flip_prob: float = 0.5
    """Probability of mirroring a training image, 0 to 1."""
    min_crop_area: float = 1.0
    """Smallest area of a random crop, as a fraction of the image; crops are resized to `image_size`. 1 disables
    cropping, as in the papers. A small crop may miss the labeled object."""
    shuffle_window: int = 1024
    """Samples of a stream that are shuffled together, after the shuffle of shards and within shards. Use a larger
    window for shards sorted by class; a smaller one keeps fewer shards in use at a time."""
    probe_fraction: float = 0.01
    """Fraction of the observed training labels to hide, at most 0.5. They estimate the recall of the rejection."""
    decode_threads: int | None = None
    """Decoding threads per worker; null uses the CPUs of the worker."""
    cache_dir: str | None = None
    """Folder for shards of a bucket, shared by all processes of a node; null uses $PAML_CACHE or ~/.cache/paml."""
    cache_gb: float | None = None
    """Size limit of the cache in GB (1e9 bytes); null uses 80 % of the free space on its disk."""
    features_dir: str | None = None
    """Folder for the features of model.train_from and for converted `embeddings`, shared by all runs; null uses
    `root`/features if `root` is local, otherwise features in the folder of `cache_dir`."""
    max_bad_fraction: float = 0.001
    """Largest fraction of unusable images per worker and epoch; a run with more stops."""

    def __post_init__(self) -> None:
        for name, high in (("flip_prob", 1), ("probe_fraction", 0.5), ("max_bad_fraction", 1)):
            value = getattr(self, name)
            check_setting(0 <= value <= high, f"data.{name}", value, f"from 0 to {high}")
        allowed = "above 0 and at most 1 (1 disables cropping)"
        check_setting(0 < self.min_crop_area <= 1, "data.min_crop_area", self.min_crop_area, allowed)
        embeddings, suffixes = self.embeddings, (".parquet", ".npy")
        valid = embeddings is None or embeddings.endswith(suffixes)
        check_setting(valid, "data.embeddings", embeddings, "a file ending in .parquet or .npy, or null")
        images = ("observed", "positive", "all")
        check_setting(self.images in images, "data.images", self.images, f"one of {', '.join(images)}")
        for name, low in (("shuffle_window", 1), ("decode_threads", 1), ("image_size", 1), ("cache_gb", 0)):
            value = getattr(self, name)
            check_setting(value is None or value >= low, f"data.{name}", value, f"at least {low}")


def features_folder(settings: DataSettings) -> str:
    """The folder of cached features and embeddings. Raises SettingsError if it is not on a local disk."""
    if settings.features_dir is not None:
        if storage.is_remote(settings.features_dir):
            raise SettingsError(f"data.features_dir is {settings.features_dir}: set it to a local folder")
        return settings.features_dir
    root = settings.root
    if storage.is_remote(root):
        root = settings.cache_dir or storage.cache_folder()
    return os.path.join(root, "features")
