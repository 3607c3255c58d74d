"""The audit of a split's labels by a run's checkpoints, from settings to the files that people and tools take."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from paml import storage
from paml.audit.finds import STATE_NAMES, UNOBSERVED_POSITIVE, Evidence, Finds, write_csv, write_parquet
from paml.audit.page import map_greys, page_html, thumbnail
from paml.audit.rank import ClassScale, choose, scale_of
from paml.audit.scoring import Scored, View, bin_of, checkpoint_logits, least_rejected_bin, score_labels
from paml.data.decode import decode_rgb
from paml.data.device import Normaliser
from paml.data.loader import Batch
from paml.errors import DataError, SettingsError
from paml.explain.runs import parse_run
from paml.labels.states import UNOBSERVED
from paml.losses import LOSSES, reject_rate
from paml.models.boost import boost_lu
from paml.models.cam import CamClassifier
from paml.training.checkpoint import committed, read_checkpoint
from paml.training.data import Split, eval_loader, open_split, same_classes, split_reader
from paml.training.loop import terminal_bar
from paml.training.score_run import choose_checkpoint, load_model, settings_of_run
from paml.training.settings import TrainSettings
from paml.training.world import World, current_world

LARGEST_PAGE = 50_000_000
"""Bytes above which a page is hard on a browser: the job then says how to make it smaller."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """What to audit."""

    run: str = "runs/openimages-v3"
    """FOLDER[@CHECKPOINT][:alpha=A]. CHECKPOINT is best (the default), newest or step-*; A is the run's boost.eval
    unless given."""
    checkpoints: int | None = None
    """Evidence by so many checkpoints: the chosen one, which scores, and those kept before it at ends of epochs; null
    takes all of them (`--checkpoint.keep null` in training keeps every epoch's). Each is one more pass of the network;
    1 takes the chosen one alone."""
    mirror: bool = True
    """Score the mean of a picture and its mirror image: one more pass of the network."""
    split: str = "train"
    """Split of the prepared data."""
    labels: str | None = None
    """Label table to audit, below `root`; null takes the run's data.train_labels for its train split, else
    labels/{split}.arrow."""
    root: str | None = None
    """Prepared data folder; null takes the run's data.root."""
    images: Literal["observed", "positive", "all"] = "observed"
    """Images to audit: with any observed label, with a positive one, or all of the manifest."""
    finds: int = 1000
    """Unobserved labels to find, the likeliest positives first."""
    observed_finds: int = 200
    """Observed labels to find, the likeliest wrong ones first."""
    most_per_class: int | None = None
    """Finds of one class and kind at most; null sets no bound. Also bounds memory, 16 bytes × classes × min(this,
    finds)."""
    batch_size: int = 32
    """Images at once."""
    out: str = "runs/audit"
    """Folder for finds.parquet, finds.csv and page.html, local or s3://; files there are replaced."""

    def __post_init__(self) -> None:
        parse_run(self.run)
        for name, least in (("checkpoints", 1), ("finds", 0), ("observed_finds", 0), ("most_per_class", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"{name} is {value}; it must be at least {least}")
        if self.batch_size < 1:
            raise SettingsError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.finds + self.observed_finds == 0:
            raise SettingsError("finds and observed_finds are 0: there is nothing to find, set one of them")
        if self.images not in ("observed", "positive", "all"):
            raise SettingsError(f"images is {self.images!r}; it must be observed, positive or all")


@dataclasses.dataclass(frozen=True)
class Auditor:
    """C checkpoints of a run, oldest first. The last one scores, the others are evidence."""

    folder: str
    settings: TrainSettings
    alpha: float
    """Boost of the maps in scoring."""
    names: tuple[str, ...]
    epochs: tuple[int, ...]
    """Epochs that each checkpoint has behind it."""
    models: tuple[CamClassifier, ...]
    device: torch.device

    def views(self, mirror: bool) -> tuple[View, ...]:
        """The images as the models take them and, where asked, mirrored.

        Checkpoints of a run that trained from a layer share what lies before it: it is computed once for all of them.
        """
        normalise = Normaliser(self.settings.model.pixel_mean, self.settings.model.pixel_std, self.device)
        front = self.models[0].front if self.models[0].on_features else lambda images: images

        def view(mirrored: bool) -> View:
            def inputs(batch: Batch) -> torch.Tensor:
                flips = torch.full((len(batch),), mirrored, device=self.device)
                return front(normalise(batch.images.to(self.device), flips))

            return inputs

        return (view(False), view(True)) if mirror else (view(False),)


def open_auditor(spec: str, checkpoints: int | None = None, device: torch.device | str = "cpu") -> Auditor:
    """Open a run's checkpoints, given as FOLDER[@CHECKPOINT][:alpha=A]: the chosen one and, of those kept before it at
    ends of epochs, the newest, `checkpoints` in all (None: all). Raises SettingsError, DataError, CheckpointError.
    """
    folder, which, alpha = parse_run(spec)
    run = settings_of_run(folder)
    alpha = run.boost.eval if alpha is None else alpha
    chosen, _ = choose_checkpoint(folder, run, which, alpha)
    names, epochs = [], []
    for name in reversed([name for name in committed(folder) if name <= chosen]):
        facts = read_checkpoint(folder, name, groups=()).facts
        if name == chosen or facts["step"] == 0:
            names.append(name)
            epochs.append(facts["epoch"] - (facts["step"] == 0))
        if len(names) == checkpoints:
            break
    models = [load_model(folder, run, name).to(device) for name in reversed(names)]
    for model in models:
        model.on_features = run.model.train_from is not None
    return Auditor(
        folder, run, alpha, tuple(reversed(names)), tuple(reversed(epochs)), tuple(models), torch.device(device)
    )


def audit(settings: AuditSettings, say: Callable[[str], None] = print) -> Finds:
    """Score, rank and write everything below `settings.out`. Raises PamlError, LabelError, StorageError."""
    world = current_world()
    storage.ensure_writable(settings.out)
    auditor = open_auditor(settings.run, settings.checkpoints, world.device)
    split, size = _split(settings, auditor)
    say(
        f"{len(split.samples):,} images of {split.name}, {split.table.num_classes:,} classes, labels of "
        f"{split.table.path}; scored by {auditor.names[-1]} of {auditor.folder}, alpha {auditor.alpha:g}"
        + (f"; evidence also by {', '.join(auditor.names[:-1])}" if len(auditor.names) > 1 else "")
    )
    keep = min(settings.finds, settings.most_per_class or settings.finds)
    bar = terminal_bar("scores", len(split.samples))
    loader = _loader(settings, auditor, split, size)
    scored = score_labels(
        auditor.models,
        loader,
        auditor.views(settings.mirror),
        alpha=auditor.alpha,
        num_classes=split.table.num_classes,
        keep=keep,
        watch=bar.update,
    )
    bar.close()
    if loader.bad:
        say(f"warning: {len(loader.bad)} images could not be used: {', '.join(bad.key for bad in loader.bad[:20])}")
    scale = scale_of(scored)
    finds = choose(scored, scale, settings.finds, settings.observed_finds, settings.most_per_class)
    if not len(finds):
        raise DataError(f"{split.table.path} leaves nothing to find among {scored.images:,} images")

    bar = terminal_bar("evidence", len(np.unique(finds.place)))
    evidence, maps, pictures, picture_of = gather_evidence(
        settings, auditor, split, size, scored, scale, finds, bar.update
    )
    bar.close()
    keys = [split.manifest.key(int(place)) for place in finds.place]
    mids = [split.table.classes[number] for number in finds.cls]
    names = [split.table.names[number] for number in finds.cls]
    about = {
        "run": auditor.folder,
        "checkpoints": list(auditor.names),
        "alpha": auditor.alpha,
        "images": split.manifest.digest,
        "labels": split.table.digest,
        "scored_images": scored.images,
        "settings": dataclasses.asdict(settings),
    }
    write_parquet(finds, evidence, keys, mids, names, about, storage.join(settings.out, "finds.parquet"))
    write_csv(finds, keys, mids, storage.join(settings.out, "finds.csv"))
    rows = [
        {
            "key": key,
            "mid": mid,
            "name": name,
            "kind": str(finds.kind[n]),
            "rank": int(finds.rank[n]),
            "score": round(float(finds.score[n]), 4),
            "probability": round(float(finds.probability[n]), 4),
            "state": STATE_NAMES[int(finds.state[n])],
            "evidence": _in_words(evidence, n, len(auditor.names)),
            "picture": picture_of[int(finds.place[n])],
        }
        for n, (key, mid, name) in enumerate(zip(keys, mids, names, strict=True))
    ]
    page = page_html(f"Label audit: {split.name}, {len(finds):,} finds", rows, pictures, maps).encode()
    storage.write_bytes(storage.join(settings.out, "page.html"), page)
    unobserved = int((finds.kind == UNOBSERVED_POSITIVE).sum())
    say(f"{unobserved:,} unobserved labels likely positive, {len(finds) - unobserved:,} observed ones likely wrong")
    say(
        f"in {settings.out}: finds.parquet, finds.csv, page.html ({len(page) / 1e6:.1f} MB); open the page in a browser"
    )
    if len(page) > LARGEST_PAGE:
        say("warning: the page is above 50 MB: audit in parts, with fewer finds or by most_per_class")
    return finds


def gather_evidence(
    settings: AuditSettings,
    auditor: Auditor,
    split: Split,
    size: int,
    scored: Scored,
    scale: ClassScale,
    finds: Finds,
    watch: Callable[[int], None] = lambda images: None,
) -> tuple[Evidence, list[np.ndarray], list[bytes], dict[int, int]]:
    """(evidence, map of each find by the newest checkpoint, pictures, place in the manifest to place in `pictures`).

    Only the images of the finds are read again. Maps are uint8 [h, w] as `map_greys` makes them.
    """
    places = np.unique(finds.place)
    logits = np.empty((len(finds), len(auditor.models)), np.float32)
    maps: list[np.ndarray] = [np.zeros((1, 1), np.uint8)] * len(finds)
    of_place: dict[int, list[int]] = {}
    for n, place in enumerate(finds.place.tolist()):
        of_place.setdefault(place, []).append(n)
    reader, pictures, picture_of = split_reader(_data(settings, auditor), split), [], {}
    (view,) = auditor.views(mirror=False)
    for batch in _loader(settings, auditor, _only(split, places), size):
        with torch.inference_mode():
            inputs = view(batch)
            own = checkpoint_logits(auditor.models, inputs, auditor.alpha)
            maps_BKHW = boost_lu(auditor.models[-1].maps(inputs).float(), auditor.alpha).cpu().numpy()
        for image, place in enumerate(batch.index.tolist()):
            picture_of[place] = len(pictures)
            pictures.append(thumbnail(decode_rgb(reader.read(place))))
            for n in of_place[place]:
                logits[n] = own[:, image, finds.cls[n]]
                maps[n] = map_greys(maps_BKHW[image, finds.cls[n]])
        watch(len(batch))
    for lost in places[~np.isin(places, list(picture_of))].tolist():
        # It was read when it was scored: storage has changed under the job.
        raise DataError(
            f"image {split.manifest.key(lost)} could be scored but not be read again: start the audit again"
        )
    return _evidence(auditor, split, scored, scale, finds, logits), maps, pictures, picture_of


def _evidence(
    auditor: Auditor, split: Split, scored: Scored, scale: ClassScale, finds: Finds, logits: np.ndarray
) -> Evidence:
    own_scores = scale.scores(finds.cls[:, None], logits, finds.state[:, None])
    agreement = np.empty(len(finds))
    for kind in np.unique(finds.kind):
        these = finds.kind == kind
        agreement[these] = (own_scores[these] >= finds.score[these].min()).mean(1)
    rejected = np.zeros(len(finds), np.int64)
    loss, rejects = auditor.settings.loss, LOSSES[auditor.settings.loss.name].rejects
    for place, epoch in enumerate(auditor.epochs):
        own = epoch - auditor.settings.linear_init.epochs
        rate = float(reject_rate(loss, own)) if rejects and own >= 1 else 0.0
        least = least_rejected_bin(scored.histograms[place], rate)
        rejected += (finds.state == UNOBSERVED) & (bin_of(logits[:, place]) >= least)
    corrected = np.zeros(len(finds), bool)
    trained = auditor.settings.data.train_split == split.name
    if LOSSES[loss.name].corrects and trained:
        progress = read_checkpoint(auditor.folder, auditor.names[-1], groups=("progress",)).tensors["progress"]
        codes = finds.place * split.table.num_classes + finds.cls
        corrected = np.isin(codes, progress["overlay"].numpy())
    return Evidence(logits, agreement, rejected, corrected)


def _in_words(evidence: Evidence, n: int, checkpoints: int) -> str:
    parts = []
    if checkpoints > 1:
        parts.append(f"{round(float(evidence.agreement[n]) * checkpoints)} of {checkpoints} checkpoints agree")
    if evidence.rejected_in[n]:
        parts.append(f"rejected in {int(evidence.rejected_in[n])} of {checkpoints}")
    if evidence.corrected[n]:
        parts.append("corrected in training")
    return " · ".join(parts)


def _only(split: Split, places: np.ndarray) -> Split:
    """The split with these images, by ascending place in the manifest."""
    chosen = np.flatnonzero(np.isin(split.samples.index, places))
    kept = {name: getattr(split.samples, name)[chosen] for name in ("index", "row", "shard")}
    return dataclasses.replace(split, samples=dataclasses.replace(split.samples, **kept))


def _data(settings: AuditSettings, auditor: Auditor) -> Any:
    data = auditor.settings.data
    return dataclasses.replace(data, root=settings.root or data.root)


def _split(settings: AuditSettings, auditor: Auditor) -> tuple[Split, int]:
    """The split with the labels to audit, and the side of the pictures in pixels."""
    data = _data(settings, auditor)
    labels = settings.labels
    if labels is None:
        labels = data.train_labels if settings.split == data.train_split else f"labels/{settings.split}.arrow"
    split = open_split(data, settings.split, labels, images=settings.images)
    train = split
    if (settings.split, labels) != (data.train_split, data.train_labels):
        train = open_split(data, data.train_split, data.train_labels, images=data.images)
    heads = auditor.models[0].head.out_channels
    if heads != split.table.num_classes:
        raise SettingsError(
            f"{split.table.path} has {split.table.num_classes} classes, the head of {auditor.folder} has {heads}: "
            "audit tables of the classes that the run was trained on"
        )
    same_classes(train.table, split.table)
    return split, data.image_size or train.image_size


def _loader(settings: AuditSettings, auditor: Auditor, split: Split, size: int) -> Any:
    run = dataclasses.replace(auditor.settings, data=_data(settings, auditor), eval_batch_size=settings.batch_size)
    return eval_loader(run, split, size, World(device=auditor.device))
