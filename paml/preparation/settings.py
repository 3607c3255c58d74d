"""Settings of `paml prepare`."""

import dataclasses

from paml.errors import SettingsError, check_setting
from paml.labels import LabelSettings
from paml.shards import ShardSettings
from paml.sources.flickr import FlickrSettings
from paml.sources.parts import KeyRule
from paml.sources.registry import SOURCES, SourceSettings
from paml.sources.splits import SPLITS

IMAGE_PLACES = ("folder", "bucket", "tars", "none")
PROTOCOLS = ("single-positive", "random-share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriceSettings:
    """Prices for `--plan`, in US dollars: list prices of a large cloud. Compare them with your own bill."""

    egress_per_gb: float = 0.0
    """Each GB read from the images' bucket: 0 within its region, about 0.09 to the internet."""
    node_hour: float = 0.68
    """One node."""
    cpus_per_node: int = 16
    """CPUs of one node."""
    nodes: int | None = None
    """Nodes to plan for; null: the available cluster, or this machine."""

    def __post_init__(self) -> None:
        if min(self.egress_per_gb, self.node_hour) < 0:
            raise SettingsError("a price is negative: set prices.egress_per_gb and prices.node_hour to 0 or more")
        if self.cpus_per_node < 1 or (self.nodes is not None and self.nodes < 1):
            raise SettingsError("set prices.cpus_per_node and prices.nodes to 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenImagesSettings:
    """The source `openimages`."""

    download_from: str | None = None
    """Web address, folder or s3://bucket/prefix to download V3's archives from if `labels` lacks files, e.g.
    https://storage.googleapis.com/openimages. null: nothing is downloaded."""
    flickr: bool = False
    """Download labeled images that `images` lacks from their original addresses (images.csv of the release) at a
    polite rate: days for millions. About a fifth of them no longer exist."""
    flickr_requests: FlickrSettings = dataclasses.field(default_factory=FlickrSettings)
    """Limits of these requests."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareSettings(SourceSettings):
    """Images and labels to read, and what to write."""

    out: str = "data/prepared"
    """Folder of the prepared data, local or s3://; pass it to training as data.root."""
    source: str = "auto"
    """Format of the labels: openimages, table (CSV, TSV, Parquet), coco (and LVIS), voc, nus_wide, cub, webdataset, hf
    (Hugging Face), label_studio or fiftyone. `auto` detects it, says which, and fails if several match."""
    labels: str = "downloads/2017_11"
    """File or folder of the labels, local or s3://. With {split} in its name there is one per split."""
    images: str | None = None
    """Folder or s3://bucket/prefix of the images: with {split}/ folders, {split}*.tar files, or one for all splits.
    null: where the labels say, or downloads/images for openimages."""
    images_from: str = "auto"
    """`folder`: list the files. `bucket`: read {split}/{key}.jpg of each labeled image without listing. `tars`: read
    tar files. `none`: write the label tables alone, to train on embeddings. `auto`: the folder, or tars if it has only
    those; `bucket` for openimages in S3 with only_labeled."""
    class_list: str | None = None
    """The classes in the order of the head, one per line or as CSV of class and name; null: those of the labels."""
    splits: tuple[str, ...] | None = None
    """Splits to prepare, of train, validation and test; null: all."""
    split_names: dict[str, str] = dataclasses.field(default_factory=dict)
    """The labels' own names of the splits, such as {validation: val2017}; the usual ones are recognized."""
    split: str = "0.8,0.1,0.1"
    """Fractions of the images for train, validation and test if the labels have no splits. The sample is stratified by
    class. If only validation is missing, it is taken from train."""
    split_seed: int = 0
    """Seed of this sample."""
    unlisted: str | dict[str, str] | None = None
    """What a class is that the labels of an image do not list, for all splits or by split: `negative` if the labels are
    complete, else `unobserved`, such as {train: unobserved, validation: negative, test: negative}. null: what the
    format says, negative for coco, voc, nus_wide and cub, else unobserved."""
    keys: KeyRule = "name"
    """An image's key is its file name without folders and suffix (`name`), or its path without suffix (`path`)."""
    same_image: str = "key"
    """What must not be in two splits: images of the same `key`, or also of the same `content`."""
    full_labels: str | None = None
    """For experiments: complete labels in the format of `labels`, with {split} if they are one file per split (a folder
    with {split}/annotations-human.csv for openimages). They are written as labels/{split}-full.arrow."""
    protocol: str | None = None
    """Simulate partial labels of train from complete ones: `single-positive` writes labels/train-single.arrow, with one
    positive per image, `random-share` labels/train-share.arrow. Train with data.train_labels set to that file."""
    protocol_seed: int = 1200
    """Seed of the protocol's sample; 1200 is the papers'."""
    protocol_share: float = 0.1
    """Fraction of the labels that `random-share` observes."""
    min_found: float = 0.5
    """Smallest fraction of the labeled images of a split that must have a file."""
    only_labeled: bool = False
    """Leave images without labels out of the shards, and report labeled ones that have no image."""
    verdicts: tuple[str, ...] = ()
    """Verdict files exported from the page of `paml audit` (rows as in `annotations-human.csv`), or Label Studio's
    JSON export of its tasks. They are merged into new versions of the tables of `verdicts_split`:
    labels/train-audited.arrow, and that of the protocol. A verdict replaces the table's label."""
    verdicts_split: str = "train"
    """Split of the images with verdicts."""
    openimages: OpenImagesSettings = dataclasses.field(default_factory=OpenImagesSettings)
    """The source `openimages`."""
    label_table: LabelSettings = dataclasses.field(default_factory=LabelSettings)
    """How labels become tables."""
    shards: ShardSettings = dataclasses.field(default_factory=ShardSettings)
    """Image size and format, and shard size."""
    workers: int | None = None
    """Threads that decode and encode in this process; null uses all cores. Unused on Ray."""
    ray: bool | None = None
    """Run the work as tasks on a Ray cluster; null: if one is available (`ray job submit`, RAY_ADDRESS)."""
    cpus_per_task: int | None = None
    """On Ray; null: 1, and up to 8 if there are fewer parts than CPUs."""
    retries: int = 3
    """How often to read a part again that failed, or whose worker was killed, before it is reported."""
    plan: bool = False
    """Dry run: print images, bytes, hours and cost, and write nothing."""
    prices: PriceSettings = dataclasses.field(default_factory=PriceSettings)
    """Prices for `plan`."""

    def __post_init__(self) -> None:
        sources = ("auto", *SOURCES)
        check_setting(self.source in sources, "source", self.source, f"one of {', '.join(sources)}")
        kinds = ("auto", *IMAGE_PLACES)
        check_setting(self.images_from in kinds, "images_from", self.images_from, f"one of {', '.join(kinds)}")
        check_setting(self.retries >= 0, "retries", self.retries, "0 or more")
        check_setting(self.keys in ("name", "path"), "keys", self.keys, "name or path")
        check_setting(self.same_image in ("key", "content"), "same_image", self.same_image, "key or content")
        check_setting(0 <= self.min_found <= 1, "min_found", self.min_found, "from 0 to 1")
        protocols = (None, *PROTOCOLS)
        check_setting(self.protocol in protocols, "protocol", self.protocol, f"null, {' or '.join(PROTOCOLS)}")
        check_setting(0 <= self.protocol_share <= 1, "protocol_share", self.protocol_share, "from 0 to 1")
        if self.splits is not None:
            allowed = f"some of {', '.join(SPLITS)}, each once"
            distinct = bool(self.splits) and len(set(self.splits)) == len(self.splits)
            check_setting(distinct and set(self.splits) <= set(SPLITS), "splits", self.splits, allowed)
        named = self.unlisted if isinstance(self.unlisted, dict) else {}
        for name, values in (("unlisted", named), ("split_names", self.split_names)):
            check_setting(set(values) <= set(SPLITS), name, values, f"a mapping from {', '.join(SPLITS)}")
        states = {self.unlisted} if isinstance(self.unlisted, str) else set(named.values())
        allowed = "negative or unobserved, or a mapping of splits to them, such as {validation: negative}"
        check_setting(states <= {"negative", "unobserved"}, "unlisted", self.unlisted, allowed)
        _ = self.split_fractions  # raises SettingsError
        if self.openimages.flickr and self.images_from in ("tars", "bucket"):
            raise SettingsError(
                f"openimages.flickr needs a list of the images; images_from {self.images_from} has none"
            )
        if self.verdicts and self.images_from == "none":
            raise SettingsError("verdicts need images: leave them out, or set images_from to another value than none")
        names = list(self.split_names.values())
        check_setting(len(set(names)) == len(names), "split_names", self.split_names, "another name for each split")
        if self.verdicts and self.splits is not None and self.verdicts_split not in self.splits:
            raise SettingsError(
                f"verdicts_split is {self.verdicts_split!r}: set it to one of the splits, {', '.join(self.splits)}"
            )

    def unlisted_in(self, split: str) -> str | None:
        """What a class is that the labels of a split do not list; None: what their format says."""
        return self.unlisted.get(split) if isinstance(self.unlisted, dict) else self.unlisted

    @property
    def split_fractions(self) -> dict[str, float]:
        """The fraction of each split."""
        try:
            values = [float(part) for part in self.split.strip("[]() ").split(",")]
        except ValueError:
            values = []
        valid = len(values) == len(SPLITS) and min(values, default=-1) >= 0 and abs(sum(values) - 1) < 1e-6
        check_setting(valid, "split", self.split, "three fractions that add up to 1, such as 0.8,0.1,0.1")
        return dict(zip(SPLITS, values, strict=True))
