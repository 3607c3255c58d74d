"""From a release's files, or one's own, to a prepared data folder: shards with their manifest, and label tables.

<out>/shards/{split}/   tar files, manifest.arrow, rejects.csv, coverage.parquet (by class: labels with an image)
<out>/labels/{split}.arrow, {split}-full.arrow (full labels, where known), train-single.arrow (protocol)
<out>/labels/{split}-audited.arrow, train-single-audited.arrow: new versions of these tables, with verdicts merged in
"""

import csv
import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import pyarrow as pa

from paml import storage
from paml.errors import DataError, SettingsError
from paml.labels import LabelSettings, LabelTable, build_label_table, observe_single_positive
from paml.labels.coverage import measure_coverage, missing_keys
from paml.labels.verdicts import apply_verdicts
from paml.reading import reading
from paml.shards import Manifest, PartsFailed, ShardSettings, write_parts
from paml.shards.progress import Progress
from paml.shards.tasks import LocalTasks, Tasks
from paml.sources.bucket import bucket_parts
from paml.sources.flickr import FlickrSettings, flickr_parts
from paml.sources.folder import KeyRule, folder_parts, key_of
from paml.sources.own import own_labels
from paml.sources.parts import Part, Payload
from paml.sources.release import V3, ReleaseFiles, fetch_release, find_release_files
from paml.sources.tars import TAR_SUFFIXES, count_tars, tar_parts

Images = Literal["auto", "folder", "bucket", "tars"]

_TAR_IMAGE_BYTES = 300_000
_FLICKR_PARTS_AT_A_TIME = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnSettings:
    """One's own labels in place of a release's."""

    labels: str | None = None
    """CSV or Parquet file of `image,class,state` or `image,labels` (with `;` between classes); {split} stands for the
    split. null: the labels of `release`."""
    classes: str | None = None
    """Class list in the order of the head; null takes the classes of the first split's file, sorted."""
    complete: bool = False
    """`image,labels` names all that an image shows: the other classes are negative, not unobserved."""
    keys: KeyRule = "name"
    """`name`: an image's key is its file name without folders and suffix. `path`: its path, without suffix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriceSettings:
    """What `--plan` reckons with, in US dollars. List prices of a large cloud; CHECK THEM AGAINST YOUR OWN BILL."""

    egress_per_gb: float = 0.0
    """For each GB read from the images' bucket: 0 within its region, about 0.09 to the internet."""
    get_per_1000: float = 0.0004
    """Read requests to S3."""
    put_per_1000: float = 0.005
    """Write requests to S3."""
    storage_gb_month: float = 0.023
    """Of the shards, in S3."""
    node_hour: float = 0.68
    """One node."""
    cpus_per_node: int = 16
    """CPUs that one node has."""
    nodes: int | None = None
    """Nodes to plan for; null: the cluster at hand, or this machine."""

    def __post_init__(self) -> None:
        for name in ("egress_per_gb", "get_per_1000", "put_per_1000", "storage_gb_month", "node_hour"):
            if getattr(self, name) < 0:
                raise SettingsError(f"prices.{name} is {getattr(self, name)}: set it to 0 or more")
        for name in ("cpus_per_node", "nodes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SettingsError(f"prices.{name} is {value}: set it to 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Where the images and CSV files lie and what to make of them."""

    out: str = "data/openimages_v3"
    """The prepared folder, local or s3://; give it as data.root to training."""
    release: str = "downloads/2017_11"
    """Folder of the class lists and the annotation files."""
    release_from: str | None = None
    """Where to fetch V3's archives from, where `release` lacks their files: a web address, folder or
    s3://bucket/prefix, e.g. https://storage.googleapis.com/openimages. null: nothing is fetched."""
    images: str = "downloads/images"
    """Folder or s3://bucket/prefix of {split}/ image folders, or of {split}*.tar or {split}*.tar.gz files."""
    images_from: Images = "auto"
    """`folder`: list {split}/ and take the images there. `bucket`: ask for {split}/{key}.jpg of each labelled image,
    without listing. `tars`: read {split}*.tar and {split}*.tar.gz. `auto`: on a disk the folder, or tars where there
    is none; in S3 `bucket` with only_labelled, and `folder` without."""
    flickr: bool = False
    """Fetch labelled images that `images` lacks from their original addresses (images.csv of the release), politely:
    days for millions. About a fifth of them are gone."""
    flickr_requests: FlickrSettings = dataclasses.field(default_factory=FlickrSettings)
    """How politely."""
    splits: tuple[str, ...] = ("train", "validation", "test")
    """Splits to prepare."""
    annotations: str = "{split}/annotations-human.csv"
    """Annotation file of a split, below `release`; where it is not there, the names of V3 to V7 are looked for."""
    classes: str = "classes-trainable.txt"
    """The classes in the order of the head, below `release`: one MID a line."""
    descriptions: str | None = "class-descriptions.csv"
    """MID and display name, below `release`; null for none."""
    own: OwnSettings = dataclasses.field(default_factory=OwnSettings)
    """One's own data, in place of a release."""
    full_labels: str | None = None
    """Folder with the same annotation files holding full labels (experiments); null for none."""
    single_positive_seed: int | None = None
    """With full labels: also make labels/train-single.arrow, one positive an image, drawn by this seed."""
    verdicts: tuple[str, ...] = ()
    """Files of verdicts that the page of jobs/audit_labels.py exported (`annotations-human.csv` rows). They are merged
    into the tables that training sees of `verdicts_split`, as new versions beside them: labels/train-audited.arrow,
    and labels/train-single-audited.arrow where there is a train-single. A verdict wins over the label there was."""
    verdicts_split: str = "train"
    """Split whose images the verdicts are on."""
    only_labelled: bool = False
    """Leave images without labels out of the shards, and name labelled ones that no source has."""
    shards: ShardSettings = dataclasses.field(default_factory=ShardSettings)
    labels: LabelSettings = dataclasses.field(default_factory=LabelSettings)
    workers: int | None = None
    """Threads that decode and encode in this process; null takes all cores. Unused on Ray."""
    ray: bool | None = None
    """Run the work as tasks on a Ray cluster; null: where one is at hand (`ray job submit`, RAY_ADDRESS)."""
    cpus_per_task: int | None = None
    """On Ray; null: 1, and up to 8 where there are fewer parts than CPUs."""
    retries: int = 3
    """How often a part that failed, or whose worker was killed, is read again before it is reported."""
    plan: bool = False
    """Dry run: print images, bytes, hours and money, and write nothing."""
    prices: PriceSettings = dataclasses.field(default_factory=PriceSettings)
    """For `plan`."""

    def __post_init__(self) -> None:
        if self.single_positive_seed is not None and self.full_labels is None:
            raise SettingsError("single_positive_seed needs full_labels: the positive is drawn from all true ones")
        if "{split}" not in self.annotations:
            raise SettingsError(f"annotations is {self.annotations!r}; it must contain {{split}}")
        if self.own.labels is not None and self.full_labels is not None:
            raise SettingsError("full_labels goes with a release, not with own.labels: leave one of them out")
        if self.own.labels is not None and self.flickr:
            raise SettingsError("flickr is for images of a release; your own have no addresses: leave it out")
        if self.flickr and self.images_from == "tars":
            raise SettingsError("flickr needs to know what `images` lacks, which tar files tell too late: use a folder")
        if self.verdicts and self.verdicts_split not in self.splits:
            raise SettingsError(
                f"verdicts_split is {self.verdicts_split!r}; splits names {', '.join(self.splits)}: name one of them"
            )
        if not self.splits:
            raise SettingsError("splits is empty: name train, validation or test")
        if self.retries < 0:
            raise SettingsError(f"retries is {self.retries}: set it to 0 or more")


@dataclasses.dataclass(frozen=True)
class FewAtATime:
    """A part of a source that wants few readers."""

    part: Part
    at_a_time: int = _FLICKR_PARTS_AT_A_TIME

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def images(self) -> int | None:
        return self.part.images

    @property
    def bytes(self) -> int | None:
        return self.part.bytes

    def __iter__(self) -> Iterator[tuple[str, Payload]]:
        return iter(self.part)


def release_files(settings: PrepareSettings, split: str) -> ReleaseFiles:
    """The files of a split by the names that `settings` give or, where those are not there, by those of V3 to V7.

    Raises DataError that says what is absent and where it comes from.
    """
    annotations = storage.join(settings.release, settings.annotations.format(split=split))
    classes = storage.join(settings.release, settings.classes)
    if not (storage.exists(annotations) and storage.exists(classes)):
        return find_release_files(settings.release, split)
    descriptions = settings.descriptions and storage.join(settings.release, settings.descriptions)
    images = storage.join(settings.release, f"{split}/images.csv")
    return ReleaseFiles(annotations, classes, descriptions, images if storage.exists(images) else None)


def has_release(settings: PrepareSettings) -> bool:
    """Whether all files of the release that `settings` need are there."""
    try:
        found = [release_files(settings, split) for split in settings.splits]
    except DataError:
        return False
    return not settings.flickr or all(files.images for files in found)


def fetch(settings: PrepareSettings, say: Callable[[str], None]) -> None:
    """Fetch, check and unpack the release's archives where its files are not there and `release_from` is given."""
    if settings.own.labels is not None or settings.release_from is None or has_release(settings):
        return
    folder, name = os.path.split(settings.release.rstrip("/"))
    if name != V3:
        raise SettingsError(f"release is {settings.release!r}; what release_from fetches unpacks to a folder {V3!r}")
    archives = ["classes", "annotations_human", *(["images"] if settings.flickr else [])]
    fetch_release(folder or ".", archives, base=settings.release_from, say=say)


def label_table(settings: PrepareSettings, split: str, labels_folder: str, say: Callable[[str], None]) -> LabelTable:
    """Build the label table of a split, `{labels_folder}/{split}.arrow`."""
    out = storage.join(labels_folder, f"{split}.arrow")
    own = settings.own
    if own.labels is None:
        return _table(settings, release_files(settings, split).annotations, split, out, say)
    first = storage.join(labels_folder, f"{settings.splits[0]}.classes.csv")
    classes = own.classes or (first if split != settings.splits[0] else None)
    path = own.labels.format(split=split)
    report = own_labels(path, out, classes=classes, complete=own.complete, keys=own.keys, settings=settings.labels)
    say(str(report))
    return LabelTable.open(out)


def _table(settings: PrepareSettings, annotations: str, split: str, out: str, say: Callable[[str], None]) -> LabelTable:
    files = release_files(settings, split)
    report = build_label_table(
        annotations, files.classes, out, descriptions=files.descriptions, settings=settings.labels
    )
    say(str(report))
    return LabelTable.open(out)


@dataclasses.dataclass(frozen=True)
class Source:
    """The images of a split."""

    parts: list[Part]
    expected_count: int
    wanted: pa.Array | None
    """Keys that are taken; None takes all."""


def source_of(settings: PrepareSettings, split: str, table: LabelTable) -> Source:
    """Where the images of a split are read. Raises DataError where there are none."""
    folder = storage.join(settings.images, split)
    remote = storage.is_remote(settings.images)
    own = settings.own.labels is not None
    wanted = settings.only_labelled
    kind = settings.images_from
    tars = [] if remote and kind != "tars" else _tars(settings.images, split)
    if kind == "auto":
        if remote:
            kind = "bucket" if wanted else "folder"
        elif os.path.isdir(folder) or (own and not tars):
            kind = "folder"
        else:
            kind = "tars"
    if own and not remote and not os.path.isdir(folder):
        # One folder for all splits: the label files say which images belong to which.
        folder, wanted = settings.images, True
    if kind == "tars":
        if not tars:
            raise DataError(
                f"no images of split {split!r}: neither a folder {folder} nor files {split}*.tar in "
                f"{settings.images}; set images to the folder that holds them"
            )
        parts = tar_parts(tars)
    elif kind == "bucket":
        parts, wanted = bucket_parts(settings.images, table.keys(), split), True
    else:
        parts = folder_parts(folder, keys=settings.own.keys)
    keys = pa.array(table.keys(), pa.string()) if wanted else None
    if settings.flickr:
        parts = [*parts, *_flickr(settings, split, table, folder)]
    if keys is not None:
        known = [part.images for part in parts]
        most = len(keys) if None in known else sum(images or 0 for images in known)
        expected = min(len(keys), most)
    elif kind == "tars":
        expected = _count(tars, parts)
    else:
        expected = sum(part.images or 0 for part in parts)
    return Source(parts, expected, keys)


def _tars(folder: str, split: str) -> list[str]:
    names = [name for name in storage.list_files(folder) if name.rsplit("/", 1)[-1].startswith(split)]
    return [storage.join(folder, name) for name in names if name.endswith(TAR_SUFFIXES)]


def _count(tars: Sequence[str], parts: Sequence[Part]) -> int:
    """Images in tar files: counted where they lie here, else reckoned from their sizes."""
    if not any(storage.is_remote(path) for path in tars):
        return count_tars(tars)
    return sum(-(-(part.bytes or 0) // _TAR_IMAGE_BYTES) for part in parts)


def _flickr(settings: PrepareSettings, split: str, table: LabelTable, folder: str) -> list[Part]:
    """The labelled images that `folder` has not, from where they came."""
    have = [key_of(name) for name in storage.list_files(folder)]
    lacking = missing_keys(table, have)
    if not lacking:
        return []
    listed = release_files(settings, split).images
    if listed is None:
        raise DataError(
            f"{settings.release} has no list of the images' addresses for {split!r} (V3: {split}/images.csv)"
        )
    return [FewAtATime(part) for part in flickr_parts(listed, lacking, settings.flickr_requests)]


def _first_rejects(folder: str, count: int = 3) -> list[list[str]]:
    path = storage.join(folder, "rejects.csv")
    with (
        io.TextIOWrapper(storage.open_input(path), "utf-8", newline="") as file,
        reading(path, "write the shards again", also=(csv.Error,)),
    ):
        rows = csv.reader(file)
        next(rows, None)
        return [row for _, row in zip(range(count), rows, strict=False)]


def prepare(
    settings: PrepareSettings,
    say: Callable[[str], None] = print,
    *,
    tasks: Tasks | None = None,
    progress: Progress | None = None,
) -> None:
    """Make or complete the prepared folder; a run that was cut off goes on where it stood.

    `tasks` runs the work on images: in threads of this process by default. Label tables are built anew each time
    (seconds to minutes); finished shards are kept. Where parts of a split fail, the other splits are still
    prepared; PartsFailed then names the parts. Raises PamlError, StorageError.
    """
    tasks = tasks or LocalTasks(settings.workers, retries=settings.retries)
    storage.ensure_writable(settings.out)
    fetch(settings, say)
    labels = storage.join(settings.out, "labels")
    failed: list[PartsFailed] = []
    for split in settings.splits:
        table = label_table(settings, split, labels, say)
        if settings.full_labels is not None:
            out = storage.join(labels, f"{split}-full.arrow")
            true = storage.join(settings.full_labels, settings.annotations.format(split=split))
            full = _table(settings, true, split, out, say)
            if split == "train" and settings.single_positive_seed is not None:
                path = storage.join(labels, "train-single.arrow")
                single = observe_single_positive(full, path, settings.single_positive_seed)
                say(f"label table {path}: {single.num_images:,} images with one positive each")
        try:
            _write_split(settings, split, table, tasks, progress, say)
        except PartsFailed as error:
            say(f"shards of {split}: {error}")
            failed.append(error)
        else:
            if settings.verdicts and split == settings.verdicts_split:
                _merge_verdicts(settings, split, table, say)
    if failed:
        raise PartsFailed(
            [failure for error in failed for failure in error.failures], sum(e.of for e in failed), "tasks"
        )
    say(f"prepared: give data.root = {settings.out} to jobs/train_openimages.py")


def _merge_verdicts(settings: PrepareSettings, split: str, table: LabelTable, say: Callable[[str], None]) -> None:
    """New versions, with the verdicts merged in, of the tables that training sees of a split."""
    keys = Manifest.open(storage.join(settings.out, "shards", split)).keys()
    tables = [table]
    if split == "train" and settings.single_positive_seed is not None:
        tables.append(LabelTable.open(storage.join(settings.out, "labels", "train-single.arrow")))
    for old in tables:
        out = old.path.removesuffix(".arrow") + "-audited.arrow"
        say(str(apply_verdicts(old, settings.verdicts, out, images=keys)))


def _write_split(
    settings: PrepareSettings,
    split: str,
    table: LabelTable,
    tasks: Tasks,
    progress: Progress | None,
    say: Callable[[str], None],
) -> None:
    folder = storage.join(settings.out, "shards", split)
    source = source_of(settings, split, table)
    report = write_parts(
        source.parts,
        folder,
        settings.shards,
        expected_count=source.expected_count,
        wanted_keys=source.wanted,
        tasks=tasks,
        progress=progress,
    )
    say(f"shards of {split}: {report}")
    if report.rejected:
        for key, reason in _first_rejects(folder):
            say(f"  rejected: {key}: {reason}")
    coverage = measure_coverage(table, Manifest.open(folder).keys())
    coverage.write(storage.join(folder, "coverage.parquet"))
    say(str(coverage))
