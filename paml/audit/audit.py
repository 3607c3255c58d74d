"""The audit of a split's labels by a run's checkpoints, from settings to the files for people and tools."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from paml import storage
from paml.audit.evidence import open_checkpoints, read_issue_images
from paml.audit.issues import KIND_TITLES, MISSING, LabelIssues, issue_table, write_csv, write_parquet
from paml.audit.label_studio import TASKS, write_tasks
from paml.audit.page import page_html
from paml.audit.rank import checkpoint_agreement, fit_class_scale, rank_issues
from paml.audit.scoring import View, score_labels
from paml.data.loader import Loader
from paml.errors import DataError, SettingsError, check_setting
from paml.models.backbones import check_takes_images
from paml.runs.spec import parse_run, training_split_of
from paml.training.data import Split, eval_loader, open_split, split_reader
from paml.training.hooks import terminal_progress
from paml.training.world import World, current_world

LARGE_PAGE_BYTES = 50_000_000
"""Browsers are slow with larger pages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """What to audit, and how many labels to list."""

    run: str = "runs/openimages-v3"
    """FOLDER[@CHECKPOINT][:alpha=A]. CHECKPOINT is best (default), newest or step-*; A defaults to the run's
    boost.eval."""
    checkpoints: int | None = None
    """Number of checkpoints: the one that scores, and older ones at ends of epochs as evidence; null uses all. To
    retain the checkpoints of all epochs, train with `--checkpoint.keep null`."""
    mirror: bool = True
    """Average the scores of an image and its mirror image; one more forward pass."""
    split: str = "train"
    """Split of the prepared data."""
    labels: str | None = None
    """Label table to audit, relative to `root`; null uses the run's data.train_labels for its training split, otherwise
    labels/{split}.arrow."""
    root: str | None = None
    """Prepared data folder; null uses the run's data.root."""
    images: Literal["observed", "positive", "all"] = "observed"
    """Images to audit: those with an observed label, those with a positive label, or all."""
    missing: int = 1000
    """Number of unobserved labels to list, the most likely positives first."""
    wrong: int = 200
    """Number of observed labels to list, the most likely wrong ones first."""
    max_per_class: int | None = None
    """Limit for the labels of one class and kind; null sets no limit. Memory: 16 bytes × classes × min(this,
    missing)."""
    batch_size: int = 32
    """Images per batch."""
    image_url: str | None = None
    """Address of an image with {key} in it, such as https://host/{key}.jpg, as Label Studio can open it: also write the
    issues as its tasks, label_studio.json, and its labeling interface, label_studio.xml."""
    out: str = "runs/audit"
    """Output folder for issues.parquet, issues.csv and page.html, local or s3://. Files are overwritten."""

    def __post_init__(self) -> None:
        parse_run(self.run)
        minimums = {"checkpoints": 1, "missing": 0, "wrong": 0, "max_per_class": 1, "batch_size": 1}
        for name, minimum in minimums.items():
            value = getattr(self, name)
            check_setting(value is None or value >= minimum, name, value, f"at least {minimum}")
        valid = self.image_url is None or self.image_url.count("{key}") == 1
        check_setting(valid, "image_url", self.image_url, "an address with {key} in it, once")
        if self.missing + self.wrong == 0:
            raise SettingsError("missing and wrong are 0, so there is nothing to list: set one of them")
        choices = ("observed", "positive", "all")
        check_setting(self.images in choices, "images", self.images, f"one of {', '.join(choices)}")


def audit(settings: AuditSettings, log: Callable[[str], None] = print) -> LabelIssues:
    """Score and rank the labels and write the files to `settings.out`. Raises PamlError."""
    storage.ensure_writable(settings.out)
    world = World(device=current_world().device)
    checkpoints = open_checkpoints(settings.run, settings.checkpoints, world.device)
    check_takes_images(checkpoints[-1].settings.model, checkpoints[-1].folder)
    run, names = checkpoints[-1], [checkpoint.checkpoint for checkpoint in checkpoints]
    data = dataclasses.replace(run.settings.data, root=settings.root or run.settings.data.root)
    labels = settings.labels
    if labels is None:
        labels = data.train_labels if settings.split == data.train_split else f"labels/{settings.split}.arrow"
    split = open_split(data, settings.split, labels, images=settings.images)
    _, size = training_split_of(run, split, settings.root)
    others = ", ".join(names[:-1])
    log(
        f"{len(split.samples):,} images of {split.name}, {split.table.num_classes:,} classes, labels of "
        f"{split.table.path}; scored by {run.checkpoint} of {run.folder}, alpha {run.alpha:g}"
        + (f"; evidence also from {others}" if others else "")
    )

    def load(images: Split) -> Loader:
        return eval_loader(data, images, size, world, batch_size=settings.batch_size)

    views: list[View] = [lambda batch: run.maps(batch.images)]
    if settings.mirror:
        views.append(lambda batch: run.maps(batch.images.flip(2)))
    loader, bar = load(split), terminal_progress("scores", len(split.samples))
    scores = score_labels(
        views,
        loader,
        alpha=run.alpha,
        num_classes=split.table.num_classes,
        per_class=min(settings.missing, settings.max_per_class or settings.missing),
        on_batch=bar.update,
    )
    bar.close()
    if loader.bad:
        log(f"warning: skipped {len(loader.bad)} bad images: {', '.join(bad.key for bad in loader.bad[:20])}")
    scale = fit_class_scale(scores)
    issues = rank_issues(scores, scale, settings.missing, settings.wrong, settings.max_per_class)
    if not len(issues):
        raise DataError(f"{split.table.path} has no label to review in {scores.images:,} images")
    selected = split.subset(np.flatnonzero(np.isin(split.samples.index, issues.image)))
    shown = read_issue_images(checkpoints, issues, split, load(selected), split_reader(data, split))
    agreement = checkpoint_agreement(issues, scale, shown.logits)
    table = issue_table(issues, shown.logits, agreement, split)
    about = {
        "run": run.folder,
        "checkpoints": names,
        "alpha": run.alpha,
        "images": split.manifest.digest,
        "labels": split.table.digest,
        "scored_images": scores.images,
        "settings": dataclasses.asdict(settings),
    }
    write_parquet(table, about, storage.join(settings.out, "issues.parquet"))
    write_csv(table, storage.join(settings.out, "issues.csv"))
    if settings.image_url is not None:
        count = write_tasks(storage.join(settings.out, "issues.parquet"), settings.image_url, settings.out)
        log(f"{count:,} tasks for Label Studio in {storage.join(settings.out, TASKS)}")
    entries = [
        {name: row[name] for name in ("key", "mid", "name", "rank", "state")}
        | {name: round(row[name], 4) for name in ("score", "probability")}
        | {
            "kind": KIND_TITLES[row["kind"]],
            "evidence": f"{round(row['agreement'] * len(names))} of {len(names)} checkpoints agree" if others else "",
            "image": shown.thumbnail_of[image],
        }
        for row, image in zip(table.to_pylist(), issues.image.tolist(), strict=True)
    ]
    title = f"Label audit: {split.name}, {len(issues):,} labels to review"
    page = page_html(title, entries, shown.thumbnails, shown.maps).encode()
    storage.write_bytes(storage.join(settings.out, "page.html"), page)
    missing = int((issues.kind == MISSING).sum())
    log(f"{missing:,} likely missing labels, {len(issues) - missing:,} likely wrong labels")
    log(f"wrote issues.parquet, issues.csv and page.html ({len(page) / 1e6:.1f} MB) to {settings.out}")
    log("open page.html in a browser to review the labels")
    if len(page) > LARGE_PAGE_BYTES:
        log("warning: page.html is larger than 50 MB: reduce missing, wrong or max_per_class")
    return issues
