"""Prepare data: from images and labels to shards with a manifest, and label tables.

<out>/shards/{split}/   tar files, manifest.arrow, rejects.csv, coverage.parquet (labels with an image, by class)
<out>/labels/{split}.arrow, {split}-full.arrow (complete labels, if known), train-single.arrow (protocol)
<out>/labels/{split}-audited.arrow, train-single-audited.arrow: new versions of these tables with verdicts
"""

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Callable

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from paml import storage
from paml.audit.label_studio import read_verdicts
from paml.errors import DataError
from paml.labels import LabelTable, apply_verdicts
from paml.labels.coverage import Coverage, measure_coverage
from paml.parsing import parse_errors_as
from paml.preparation.dataset import Dataset, open_dataset
from paml.preparation.images import SplitImages, check_found, find_images
from paml.preparation.settings import PrepareSettings
from paml.preparation.tables import check_scorable
from paml.progress import Progress
from paml.shards import Manifest, ShardReport, write_parts
from paml.shards.manifest import MANIFEST_NAME, REJECTS_NAME
from paml.shards.write import MISSING_REASON
from paml.tasks import LocalTaskRunner, PartsFailed, TaskRunner

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What was written for one split."""

    table: LabelTable
    shards: ShardReport | None
    """None without images."""
    coverage: Coverage | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What `prepare` wrote."""

    out: str
    """The prepared folder: pass it to training as data.root."""
    splits: dict[str, SplitReport]

    def __str__(self) -> str:
        lines = []
        for name, report in self.splits.items():
            written, rejected = (report.shards.written, report.shards.rejected) if report.shards else (0, 0)
            labels = f"{report.table.num_annotations:,} labels"
            lines.append(f"{name}: {written:,} images, {labels}, {rejected:,} images rejected")
        return "\n".join([*lines, f"prepared data in {self.out}"])


def prepare(
    settings: PrepareSettings, log: Log = print, *, tasks: TaskRunner | None = None, progress: Progress | None = None
) -> PrepareReport:
    """Write the prepared folder, or complete it; an interrupted call resumes when it is repeated.

    `tasks` runs the work on images: in threads of this process by default. Label tables are rebuilt each time
    (seconds to minutes); finished shards are kept, unless there are labeled images that they do not have. If parts of
    a split fail, the other splits are still prepared; PartsFailed then lists the parts. Raises PamlError.
    """
    tasks = tasks or LocalTaskRunner(settings.workers, retries=settings.retries)
    if storage.is_remote(settings.out):
        storage.ensure_writable(settings.out)  # before the downloads; it leaves no folder in a bucket
    dataset = open_dataset(settings, log)
    tables, partial = write_tables(dataset, settings, storage.join(settings.out, "labels"), log)
    if settings.images_from == "none":
        command = f"paml train --config embeddings --data.root {settings.out} --data.embeddings FILE"
        log(f"label tables in {settings.out}; train with: {command}")
        without = {name: SplitReport(table=table, shards=None, coverage=None) for name, table in tables.items()}
        return PrepareReport(out=settings.out, splits=without)
    reports: dict[str, SplitReport] = {}
    failed: list[PartsFailed] = []
    for name, table in tables.items():
        try:
            reports[name] = _write_split(dataset, settings, name, table, tasks, progress, log)
        except PartsFailed as error:
            log(f"shards of {name}: {error}")
            failed.append(error)
        else:
            if settings.verdicts and name == settings.verdicts_split:
                _merge_verdicts(settings, name, [table, *([partial] if partial and name == "train" else [])], log)
    if failed:
        raise PartsFailed(
            [failure for error in failed for failure in error.failures], sum(e.of for e in failed), "tasks"
        )
    if settings.same_image == "content":
        _check_contents(settings.out, list(tables))
    command = f"paml train --data.root {settings.out}"
    if partial is not None:
        command += f" --data.train_labels labels/{partial.path.rsplit('/', 1)[-1]}"
    log(f"prepared data in {settings.out}; train with: {command}")
    return PrepareReport(out=settings.out, splits=reports)


def write_tables(
    dataset: Dataset, settings: PrepareSettings, folder: str, log: Log
) -> tuple[dict[str, LabelTable], LabelTable | None]:
    """(the table of each split, the partial labels of the protocol or None), all in `folder`."""
    tables = {name: dataset.write_table(name, folder) for name in dataset.splits}
    partial = None
    for name, table in tables.items():
        if name != "train":
            check_scorable(name, table)
        full = dataset.write_full(name, folder)
        if name == "train" and full is not None:
            partial = dataset.write_protocol(folder)
    if partial is not None:
        log(f"label table {partial}: {settings.protocol}, seed {settings.protocol_seed}")
    elif settings.protocol is not None:
        raise DataError(f"protocol {settings.protocol} needs complete labels of train: set full_labels")
    return tables, partial


def _write_split(
    dataset: Dataset,
    settings: PrepareSettings,
    name: str,
    table: LabelTable,
    tasks: TaskRunner,
    progress: Progress | None,
    log: Log,
) -> SplitReport:
    folder = storage.join(settings.out, "shards", name)
    images = find_images(dataset, settings, name, table, log)
    others = [other.keys for split in dataset.splits if split != name and (other := dataset.records_of(split))]
    _remove_outgrown(folder, images, table, pa.array(itertools.chain(*others), pa.string()), settings, log)
    report = write_parts(
        images.parts,
        folder,
        settings.shards,
        expected_count=images.count,
        wanted_keys=images.wanted,
        tasks=tasks,
        progress=progress,
    )
    log(f"shards of {name}: {report}")
    if report.rejected:
        for key, reason in _read_rejects(folder, 3).itertuples(index=False):
            log(f"  rejected: {key}: {reason}")
    keys = Manifest.open(folder).keys()
    coverage = measure_coverage(table, keys)
    coverage.write(storage.join(folder, "coverage.parquet"))
    log(str(coverage))
    try:
        check_found(dataset.records_of(name), table, keys, settings.min_found, name)
    except DataError as error:
        again = f"; delete {folder} to write its shards again" if report.already_done else ""
        raise DataError(f"{error}{again}") from error
    if name != "train":
        _check_still_scorable(name, coverage)
    return SplitReport(table=table, shards=report, coverage=coverage)


def _check_still_scorable(name: str, coverage: Coverage) -> None:
    """Raise DataError if no class of the images that were found has both positive and negative labels."""
    positives, negatives = (coverage.by_class[f"{state}_found"].to_numpy() for state in ("positives", "negatives"))
    if not ((positives > 0) & (negatives > 0)).any():
        raise DataError(
            f"{name} cannot be scored: of its images that were found, no class has both positive and negative labels; "
            f"{coverage.images_missing:,} are missing: add them, or leave it out of splits"
        )


def _remove_outgrown(
    folder: str, images: SplitImages, table: LabelTable, others: pa.StringArray, settings: PrepareSettings, log: Log
) -> None:
    """Delete complete shards if the labels name images that they lack, or have put some of theirs into the `others`
    splits, and all images that belong there can be written again.

    Raises DataError if not all can, or if that is not known.
    """
    if not storage.exists(storage.join(folder, MANIFEST_NAME)):
        return
    manifest = Manifest.open(folder)
    if manifest.settings != dataclasses.asdict(settings.shards):
        return  # write_parts refuses other settings
    rejects = _read_rejects(folder)
    is_missing = rejects["reason"] == MISSING_REASON
    missing, damaged = (pa.array(rejects["key"][mask], pa.string()) for mask in (is_missing, ~is_missing))
    labeled = pa.array(table.keys(), pa.string())
    candidates = labeled if images.found is None else _select(labeled, images.found)
    new = _select(_select(candidates, manifest.keys(), False), damaged, False)
    if images.found is None:
        new = _select(new, missing, False) if images.wanted is not None else new[:0]
    kept = _select(manifest.keys(), others, False)
    moved = len(manifest.keys()) - len(kept)
    if images.found is not None and moved:
        moved = len(_select(_select(manifest.keys(), others), images.found, False))
    if not len(new) and not (moved and images.found is not None):
        return
    text = (
        f"{len(new):,} labeled images are not in {folder}, such as {new[0].as_py()!r}"
        if len(new)
        else (f"{moved:,} images of {folder} are in another split now")
    )
    if images.found is None:
        raise DataError(f"{text}: the labels grew after it was written; delete it to write it again")
    if lost := len(_select(kept, images.found, False)):
        raise DataError(
            f"{text}, and {lost:,} of its images have no file any more: bring them back, or delete it to write it again"
        )
    log(f"{text}: writing its shards again")
    storage.delete_folder(folder)


def _select(values: pa.StringArray, known: pa.StringArray, among: bool = True) -> pa.StringArray:
    """The values that are `among` the known ones, or not."""
    mask = pc.call_function("is_in", [values], pc.SetLookupOptions(known))
    return values.filter(mask if among else pc.call_function("invert", [mask]))


def _read_rejects(folder: str, count: int | None = None) -> pd.DataFrame:
    """The columns `key` and `reason` of the first `count` rejected images, or of all."""
    path = storage.join(folder, REJECTS_NAME)
    if not storage.exists(path):
        return pd.DataFrame({"key": [], "reason": []}, dtype=str)
    with storage.open_input(path) as file, parse_errors_as(path, "write the shards again"):
        return pd.read_csv(file, dtype=str, keep_default_na=False, nrows=count)


def _check_contents(out: str, splits: list[str]) -> None:
    """Raise DataError if an image of one split has the same stored bytes as one of another, by size and CRC-32."""
    first: dict[tuple[int, int], tuple[str, str]] = {}
    shared: list[tuple[str, str, str, str]] = []
    for split in splits:
        manifest = Manifest.open(storage.join(out, "shards", split))
        contents = zip(manifest.size.tolist(), manifest.crc32.tolist(), strict=True)
        for key, content in zip(manifest.keys().to_pylist(), contents, strict=True):
            other = first.setdefault(content, (split, key))
            if other[0] != split:
                shared.append((*other, split, key))
    if shared:
        a, b, c, d = shared[0]
        raise DataError(
            f"{len(shared):,} images are in two splits under other names, such as {b!r} in {a} and {d!r} in {c}: "
            "remove them from the labels of one"
        )


def _merge_verdicts(settings: PrepareSettings, name: str, tables: list[LabelTable], log: Log) -> None:
    """Write new versions, with the verdicts, of the tables that training uses for a split."""
    keys = Manifest.open(storage.join(settings.out, "shards", name)).keys()
    with tempfile.TemporaryDirectory(prefix="paml-verdicts-") as folder:
        files = []
        for number, path in enumerate(settings.verdicts):
            files.append(path)
            if path.endswith(".json"):
                files[-1] = os.path.join(folder, f"{number}.csv")
                counts = read_verdicts(path, files[-1])
                log(f"{path}: {counts.verdicts:,} verdicts in {counts.tasks:,} tasks, {counts.open:,} without one")
        for old in tables:
            out = old.path.removesuffix(".arrow") + "-audited.arrow"
            log(str(apply_verdicts(old, files, out, images=keys)))
