"""Prepare data: from images and labels to shards with a manifest, and label tables.

<out>/shards/{split}/   tar files, manifest.arrow, rejects.csv, coverage.parquet (labels with an image, by class)
<out>/labels/{split}.arrow, {split}-full.arrow (full labels, if known), train-single.arrow (protocol)
<out>/labels/{split}-audited.arrow, train-single-audited.arrow: new versions of these tables with verdicts
"""

import dataclasses
import os
from collections.abc import Callable, Iterator

import pandas as pd
import pyarrow as pa

from paml import storage
from paml.errors import DataError, SettingsError, check_setting
from paml.labels import LabelSettings, LabelTable, build_label_table, observe_single_positive, split
from paml.labels.coverage import Coverage, measure_coverage, missing_keys
from paml.labels.verdicts import apply_verdicts
from paml.parsing import parse_errors_as
from paml.progress import Progress
from paml.shards import Manifest, ShardReport, ShardSettings, write_parts
from paml.sources import IMAGE_SOURCES
from paml.sources.flickr import FlickrSettings, flickr_parts
from paml.sources.folder import key_of
from paml.sources.label_file import build_from_label_file
from paml.sources.parts import ImageRequest, KeyRule, Part
from paml.sources.release import V3, V3_ARCHIVES, fetch_release, find_release_files
from paml.sources.tars import tars_of_split
from paml.tasks import LocalTaskRunner, PartsFailed, TaskRunner

Log = Callable[[str], None]


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
class PrepareSettings:
    """Images and labels to read, and what to write."""

    out: str = "data/openimages_v3"
    """Folder of the prepared data, local or s3://; pass it to training as data.root."""
    images: str = "downloads/images"
    """Folder or s3://bucket/prefix with {split}/ image folders, or with {split}*.tar or {split}*.tar.gz files. With
    `labels` it may also be one folder for all splits."""
    images_from: str = "auto"
    """`folder`: list {split}/ and read the images there. `bucket`: read {split}/{key}.jpg of each labeled image without
    listing. `tars`: read {split}*.tar and {split}*.tar.gz. `auto`: the folder if it exists, else tars; in S3 `bucket`
    with only_labeled, else `folder`."""
    labels: str | None = None
    """CSV or Parquet file with the columns `image,class,state` or `image,labels` (classes separated by `;`). With
    {split} in its name there is one file per split; one file for all is divided by `split_fractions`. null: the labels
    of `release`."""
    class_list: str | None = None
    """With `labels`: class list in the order of the head; null uses the classes of the label file, sorted."""
    complete_labels: bool = False
    """With `labels`: the column `labels` lists all classes of an image, so others are negative, not unobserved."""
    keys: KeyRule = "name"
    """With `labels`: an image's key is its file name without folders and suffix (`name`), or its path without suffix
    (`path`)."""
    split_fractions: tuple[float, ...] = (0.8, 0.1, 0.1)
    """With one label file for all splits: the random fraction of the images in each of `splits`."""
    release: str = "downloads/2017_11"
    """Folder of the class lists and annotation files of Open Images, under their published names (V3 to V7)."""
    release_from: str | None = None
    """Web address, folder or s3://bucket/prefix to download V3's archives from if `release` lacks files, e.g.
    https://storage.googleapis.com/openimages. null: nothing is downloaded."""
    flickr: bool = False
    """Download labeled images that `images` lacks from their original addresses (images.csv of the release) at a
    polite rate: days for millions. About a fifth of them no longer exist."""
    flickr_requests: FlickrSettings = dataclasses.field(default_factory=FlickrSettings)
    """Limits of these requests."""
    splits: tuple[str, ...] = ("train", "validation", "test")
    """Splits to prepare."""
    full_labels: str | None = None
    """Folder with full labels, {split}/annotations-human.csv, for experiments; null for none."""
    single_positive_seed: int | None = None
    """With full labels: also write labels/train-single.arrow, one positive per image, sampled with this seed."""
    verdicts: tuple[str, ...] = ()
    """Verdict files exported from the page of `paml audit` (rows as in `annotations-human.csv`). They are merged into
    new versions of the tables of `verdicts_split`: labels/train-audited.arrow, and labels/train-single-audited.arrow if
    there is a train-single. A verdict replaces the table's label."""
    verdicts_split: str = "train"
    """Split of the images with verdicts."""
    only_labeled: bool = False
    """Leave images without labels out of the shards, and report labeled ones that have no image."""
    label_table: LabelSettings = dataclasses.field(default_factory=LabelSettings)
    """How label files become tables."""
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
        sources = ("auto", *IMAGE_SOURCES)
        check_setting(self.images_from in sources, "images_from", self.images_from, f"one of {', '.join(sources)}")
        check_setting(self.retries >= 0, "retries", self.retries, "0 or more")
        if self.single_positive_seed is not None and self.full_labels is None:
            raise SettingsError("single_positive_seed needs full_labels: the positive is sampled from all true ones")
        if self.labels is not None and self.full_labels is not None:
            raise SettingsError("full_labels is for a release, not for labels: leave one of them out")
        if self.labels is not None and self.flickr:
            raise SettingsError("flickr is for images of a release; those of labels have no addresses: leave it out")
        if self.flickr and self.images_from == "tars":
            raise SettingsError("flickr needs a list of the images, which tar files do not have: use a folder")
        if not self.splits:
            raise SettingsError("splits is empty: set train, validation or test")
        if self.one_label_file and len(self.split_fractions) != len(self.splits):
            raise SettingsError(
                f"labels is one file for {len(self.splits)} splits and split_fractions has {len(self.split_fractions)} "
                "values: set one per split, or include {split} in labels"
            )
        if self.verdicts and self.verdicts_split not in self.splits:
            raise SettingsError(
                f"verdicts_split is {self.verdicts_split!r}: set it to one of the splits, {', '.join(self.splits)}"
            )

    @property
    def one_label_file(self) -> bool:
        """Whether `labels` is one file for several splits."""
        return self.labels is not None and "{split}" not in self.labels and len(self.splits) > 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What was written for one split."""

    table: LabelTable
    shards: ShardReport
    coverage: Coverage


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What `prepare` wrote."""

    out: str
    """The prepared folder: pass it to training as data.root."""
    splits: dict[str, SplitReport]

    def __str__(self) -> str:
        lines = [
            f"{name}: {report.shards.written:,} images, {report.table.num_annotations:,} labels, "
            f"{report.shards.rejected:,} images rejected"
            for name, report in self.splits.items()
        ]
        return "\n".join([*lines, f"prepared data in {self.out}"])


def prepare(
    settings: PrepareSettings, log: Log = print, *, tasks: TaskRunner | None = None, progress: Progress | None = None
) -> PrepareReport:
    """Write the prepared folder, or complete it; an interrupted call resumes when it is repeated.

    `tasks` runs the work on images: in threads of this process by default. Label tables are rebuilt each time
    (seconds to minutes); finished shards are kept. If parts of a split fail, the other splits are still prepared;
    PartsFailed then lists the parts. Raises PamlError.
    """
    tasks = tasks or LocalTaskRunner(settings.workers, retries=settings.retries)
    if storage.is_remote(settings.out):
        storage.ensure_writable(settings.out)  # before the downloads; it leaves no folder in a bucket
    fetch_missing_release(settings, log)
    folder = storage.join(settings.out, "labels")
    reports: dict[str, SplitReport] = {}
    failed: list[PartsFailed] = []
    for name, table in build_tables(settings, folder, log):
        if settings.full_labels is not None:
            _write_full_labels(settings, name, folder, log)
        try:
            reports[name] = _write_split(settings, name, table, tasks, progress, log)
        except PartsFailed as error:
            log(f"shards of {name}: {error}")
            failed.append(error)
        else:
            if settings.verdicts and name == settings.verdicts_split:
                _merge_verdicts(settings, name, table, log)
    if failed:
        raise PartsFailed(
            [failure for error in failed for failure in error.failures], sum(e.of for e in failed), "tasks"
        )
    log(f"prepared data in {settings.out}; train with: paml train --data.root {settings.out}")
    return PrepareReport(out=settings.out, splits=reports)


def needs_release(settings: PrepareSettings) -> bool:
    """Whether `release_from` is set and `release` lacks a file."""
    if settings.labels is not None or settings.release_from is None:
        return False
    try:
        files = [find_release_files(settings.release, name) for name in settings.splits]
    except DataError:
        return True
    return settings.flickr and not all(each.images for each in files)


def fetch_missing_release(settings: PrepareSettings, log: Log) -> None:
    """Download, verify and unpack the release's archives if `needs_release`."""
    if not needs_release(settings):
        return
    folder, name = os.path.split(settings.release.rstrip("/"))
    if name != V3:
        raise SettingsError(f"release is {settings.release!r}: with release_from its last folder must be {V3!r}")
    archives = [archive for name, archive in V3_ARCHIVES.items() if settings.flickr or name != "images"]
    fetch_release(folder or ".", archives, base=settings.release_from or "", log=log)


def build_tables(settings: PrepareSettings, folder: str, log: Log) -> Iterator[tuple[str, LabelTable]]:
    """Build the label table of each split, `{folder}/{split}.arrow`; yields (split, table)."""
    if settings.one_label_file:
        path = _build_from_label_file(settings, "all", settings.class_list, folder, log)
        outs = [storage.join(folder, f"{name}.arrow") for name in settings.splits]
        tables = split(LabelTable.open(path), outs, settings.split_fractions, seed=0)
        storage.delete(path)
        for name, table in zip(settings.splits, tables, strict=True):
            log(f"label table of {name}: {table}")
            if not table.num_images:
                raise DataError(f"no image was assigned to the split {name!r}: change splits or split_fractions")
        yield from zip(settings.splits, tables, strict=True)
        return
    for name in settings.splits:
        if settings.labels is None:
            path = _build_from_release(settings, name, f"{name}.arrow", folder, log)
        else:
            first = storage.join(folder, f"{settings.splits[0]}.classes.csv")
            classes = settings.class_list or (None if name == settings.splits[0] else first)
            path = _build_from_label_file(settings, name, classes, folder, log)
        yield name, LabelTable.open(path)


def _build_from_label_file(settings: PrepareSettings, name: str, classes: str | None, folder: str, log: Log) -> str:
    report = build_from_label_file(
        (settings.labels or "").format(split=name),
        storage.join(folder, f"{name}.arrow"),
        classes=classes,
        complete=settings.complete_labels,
        keys=settings.keys,
        settings=settings.label_table,
    )
    log(str(report))
    return report.table.path


def _build_from_release(
    settings: PrepareSettings, name: str, out: str, folder: str, log: Log, annotations: str | None = None
) -> str:
    files = find_release_files(settings.release, name)
    report = build_label_table(
        annotations or files.annotations,
        files.classes,
        storage.join(folder, out),
        descriptions=files.descriptions,
        settings=settings.label_table,
    )
    log(str(report))
    return report.table.path


def _write_full_labels(settings: PrepareSettings, name: str, folder: str, log: Log) -> None:
    """Write the table of full labels and, for train, the single-positive one."""
    annotations = storage.join(settings.full_labels or "", name, "annotations-human.csv")
    full = LabelTable.open(_build_from_release(settings, name, f"{name}-full.arrow", folder, log, annotations))
    if name == "train" and settings.single_positive_seed is not None:
        path = storage.join(folder, "train-single.arrow")
        single = observe_single_positive(full, path, settings.single_positive_seed)
        log(f"label table {path}: {single.num_images:,} images with one positive each")


def find_images(
    settings: PrepareSettings, name: str, table: LabelTable
) -> tuple[list[Part], int, pa.StringArray | None]:
    """(parts, expected number of images, keys to keep or None for all) of a split.

    They come from the source that `settings` name. Raises DataError if there are none.
    """
    request = ImageRequest(
        images=settings.images,
        split=name,
        table=table,
        keys=settings.keys,
        shared_folder=settings.labels is not None,
    )
    kind = _choose_source(settings, request) if settings.images_from == "auto" else settings.images_from
    image_set = IMAGE_SOURCES[kind](request)
    parts = image_set.parts
    if settings.flickr:
        parts = [*parts, *_flickr_parts(settings, request)]
    only_labeled = settings.only_labeled or image_set.only_labeled
    wanted = pa.array(table.keys(), pa.string()) if only_labeled else None
    counts = [part.images for part in parts]
    if None not in counts:
        count = sum(images or 0 for images in counts)
    elif wanted is None and image_set.count is not None:
        count = image_set.count()
    else:
        count = table.num_images
    return parts, count if wanted is None else min(len(wanted), count), wanted


def _choose_source(settings: PrepareSettings, request: ImageRequest) -> str:
    if storage.is_remote(request.images):
        return "bucket" if settings.only_labeled else "folder"
    if os.path.isdir(request.folder):
        return "folder"
    return "folder" if request.shared_folder and not tars_of_split(request.images, request.split) else "tars"


def _flickr_parts(settings: PrepareSettings, request: ImageRequest) -> list[Part]:
    """The labeled images that the folder lacks, at their original addresses."""
    lacking = missing_keys(request.table, [key_of(name) for name in storage.list_files(request.folder)])
    if not lacking:
        return []
    image_list = find_release_files(settings.release, request.split).images
    if image_list is None:
        raise DataError(
            f"{settings.release} has no list of the images' addresses for {request.split!r} (V3: "
            f"{request.split}/images.csv): download it, or leave flickr out"
        )
    return flickr_parts(image_list, lacking, settings.flickr_requests)


def _write_split(
    settings: PrepareSettings,
    name: str,
    table: LabelTable,
    tasks: TaskRunner,
    progress: Progress | None,
    log: Log,
) -> SplitReport:
    folder = storage.join(settings.out, "shards", name)
    parts, count, wanted = find_images(settings, name, table)
    report = write_parts(
        parts,
        folder,
        settings.shards,
        expected_count=count,
        wanted_keys=wanted,
        tasks=tasks,
        progress=progress,
    )
    log(f"shards of {name}: {report}")
    if report.rejected:
        path = storage.join(folder, "rejects.csv")
        with storage.open_input(path) as file, parse_errors_as(path, "write the shards again"):
            for key, reason in pd.read_csv(file, nrows=3, dtype=str, keep_default_na=False).itertuples(index=False):
                log(f"  rejected: {key}: {reason}")
    coverage = measure_coverage(table, Manifest.open(folder).keys())
    coverage.write(storage.join(folder, "coverage.parquet"))
    log(str(coverage))
    return SplitReport(table=table, shards=report, coverage=coverage)


def _merge_verdicts(settings: PrepareSettings, name: str, table: LabelTable, log: Log) -> None:
    """Write new versions, with the verdicts, of the tables that training uses for a split."""
    keys = Manifest.open(storage.join(settings.out, "shards", name)).keys()
    tables = [table]
    if name == "train" and settings.single_positive_seed is not None:
        tables.append(LabelTable.open(storage.join(settings.out, "labels", "train-single.arrow")))
    for old in tables:
        out = old.path.removesuffix(".arrow") + "-audited.arrow"
        log(str(apply_verdicts(old, settings.verdicts, out, images=keys)))
