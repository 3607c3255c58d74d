"""The paper's analysis of explanations: the maps of two or more checkpoints, on the same labels of the same images.

Kim et al. (CVPR 2023, section 3) find that training on partial labels as AN keeps the order of a map's scores and
shrinks the large ones. `explain` measures both between any checkpoints, of raw and of boosted maps, and draws them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from paml import storage
from paml.data.decode import decode_into
from paml.data.loader import Batch
from paml.errors import DataError, SettingsError
from paml.explain import measures
from paml.explain.boxes import Boxes, read_boxes
from paml.explain.panel import PanelRow, choose_labels, draw_map_panel, panel_row
from paml.explain.rejected import draw_rejected, rejects
from paml.explain.report import (
    KINDS,
    Measured,
    draw_ends,
    draw_likeness,
    summary,
    summary_csv,
    summary_text,
    write_rows,
)
from paml.explain.runs import OpenRun, open_runs
from paml.labels.states import POSITIVE
from paml.shards.reader import ShardReader
from paml.training.data import Split, eval_loader, open_split, same_classes
from paml.training.loop import terminal_bar
from paml.training.world import World, current_world

PAIRS_AT_ONCE = 4096
"""Labels whose maps are measured together: bounds the memory of a batch with many labels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainSettings:
    """What to compare."""

    runs: dict[str, str]
    """Title: FOLDER[@CHECKPOINT][:alpha=A], two or more. CHECKPOINT is best (the default), newest or step-*; A is the
    run's boost.eval unless given: '{full: runs/full, AN + boost: "runs/an@best:alpha=5"}'."""
    reference: str | None = None
    """Title of the run that the others are compared with; null takes the first."""
    split: str = "test"
    """Split of the prepared data, with the labels of its table."""
    root: str | None = None
    """Prepared data folder; null takes the reference run's data.root."""
    images: int | None = None
    """Take only so many images of the split, drawn with `seed`; null takes all."""
    seed: int = 0
    """Of the images drawn and of the panel's labels."""
    boxes: str | None = None
    """CSV of boxes as Open Images has (annotations-human-bbox.csv), for the pointing game and box IoU."""
    box_share: float = 0.2
    """Share of a map's maximum from which on a pixel belongs to a box."""
    examples: int = 4
    """Positive labels on the panel; 0 draws none."""
    examples_by: str = "difference"
    """'difference': those whose probability differs most between the runs, one of each class first; 'random'."""
    batch_size: int = 32
    """Images at once: memory for batch × classes maps."""
    out: str = "runs/explain"
    """Folder for maps.parquet, summary.txt, summary.csv and the figures, local or s3://; files there are replaced."""

    def __post_init__(self) -> None:
        if len(self.runs) < 2:
            raise SettingsError(f"runs names {len(self.runs)}: give two or more, as '{{full: runs/a, AN: runs/b}}'")
        if self.reference is not None and self.reference not in self.runs:
            raise SettingsError(f"reference is {self.reference!r}; runs names {', '.join(map(repr, self.runs))}")
        for name, least in (("images", 1), ("examples", 0), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"{name} is {value}; it must be at least {least}")
        if not 0 < self.box_share <= 1:
            raise SettingsError(f"box_share is {self.box_share}; it must be above 0 and at most 1")
        if self.examples_by not in ("difference", "random"):
            raise SettingsError(f"examples_by is {self.examples_by!r}; it must be difference or random")


def explain(settings: ExplainSettings, say: Callable[[str], None] = print) -> Measured:
    """Measure, write and draw everything below `settings.out`; print the summary. Raises PamlError."""
    world = current_world()
    runs = open_runs(settings.runs, world.device)
    reference = list(settings.runs).index(settings.reference or runs[0].title)
    split, size = _split(settings, runs, reference)
    whole = len(split.samples)
    split = drawn_images(split, settings.images, settings.seed)
    say(
        f"{len(split.samples):,} of {whole:,} images of {split.name}, "
        + ("all of them" if len(split.samples) == whole else f"drawn with seed {settings.seed}")
    )
    boxes = None
    if settings.boxes is not None:
        keys = [split.manifest.key(int(place)) for place in split.samples.index]
        boxes = read_boxes(settings.boxes, keys, split.table.classes)
        say(f"{sum(map(len, boxes.of.values())):,} of {boxes.rows:,} boxes lie in these images and classes")
        if boxes.malformed:
            say(f"warning: {boxes.malformed:,} boxes have edges that are not 0 ≤ min < max ≤ 1 and are left out")

    of_reference = runs[reference].settings
    data = dataclasses.replace(of_reference.data, root=settings.root or of_reference.data.root)
    loader = eval_loader(
        dataclasses.replace(of_reference, data=data, eval_batch_size=settings.batch_size),
        split,
        size,
        World(device=world.device),
    )
    bar = terminal_bar("maps", len(split.samples))
    measured = measure(
        runs, reference, loader, split, boxes=boxes, box_share=settings.box_share, size=size, watch=bar.update
    )
    bar.close()
    if loader.bad:
        say(f"warning: {len(loader.bad)} images could not be used: {', '.join(bad.key for bad in loader.bad[:20])}")

    rows = summary(measured)
    text = summary_text(measured, rows)
    say(text)
    write_rows(measured, split, settings, storage.join(settings.out, "maps.parquet"))
    storage.write_bytes(storage.join(settings.out, "summary.txt"), (text + "\n").encode())
    storage.write_bytes(storage.join(settings.out, "summary.csv"), summary_csv(rows))
    written = ["maps.parquet", "summary.txt", "summary.csv", "likeness.png", "ends.png"]
    draw_likeness(measured, storage.join(settings.out, "likeness.png"))
    draw_ends(measured, storage.join(settings.out, "ends.png"))
    titles = [run.title for run in runs]
    if panel := _panel(settings, runs, measured, split, size):
        draw_map_panel(titles, panel, storage.join(settings.out, "panel.png"))
        written.append("panel.png")
    if any(rejects(run.history) for run in runs):
        draw_rejected(_histories(runs), storage.join(settings.out, "rejected.png"))
        written.append("rejected.png")
    say(f"\nin {settings.out}: {', '.join(written)}")
    return measured


def drawn_images(split: Split, count: int | None, seed: int) -> Split:
    """The split with `count` of its images, drawn by `seed`, in their old order; all where there are no more."""
    if count is None or count >= len(split.samples):
        return split
    chosen = np.sort(np.random.default_rng(seed).permutation(len(split.samples))[:count])
    samples = split.samples
    kept = {name: getattr(samples, name)[chosen] for name in ("index", "row", "shard")}
    return dataclasses.replace(split, samples=dataclasses.replace(samples, **kept))


def measure(
    runs: Sequence[OpenRun],
    reference: int,
    batches: Iterable[Batch],
    split: Split,
    *,
    boxes: Boxes | None = None,
    box_share: float = 0.2,
    size: int = 0,
    watch: Callable[[int], None] = lambda images: None,
) -> Measured:
    """The figures of every labelled (image, class) pair, by run, of raw and of boosted maps.

    One batch's maps are held at a time, so that memory grows with the pairs alone. `size`: side of the pictures in
    pixels, for boxes. Raises SettingsError where the maps of the runs differ in size: their ranks and ends could only
    be compared after resampling, which changes both.
    """
    pairs: list[np.ndarray] = []
    values: list[np.ndarray] = []
    boxed: list[np.ndarray] = []
    keys_of_boxes = {} if boxes is None else boxes.of
    for batch in batches:
        labels = batch.labels
        maps: dict[int, torch.Tensor] = {}
        for run in runs:
            if id(run.model) not in maps:
                maps[id(run.model)] = run.maps(batch.images)
        _refuse_other_sizes(runs, [maps[id(run.model)].shape[2:] for run in runs])
        keys = batch.keys() if keys_of_boxes else []
        for start in range(0, len(labels.cls), PAIRS_AT_ONCE):
            part = slice(start, start + PAIRS_AT_ONCE)
            image, cls, state = labels.image[part], labels.cls[part], labels.state[part]
            own = [
                keys_of_boxes.get((keys[i], split.table.classes[c])) if keys and s == POSITIVE else None
                for i, c, s in zip(image.tolist(), cls.tolist(), state.tolist(), strict=True)
            ]
            raw = np.stack([_picked(maps[id(run.model)], image, cls) for run in runs])
            values.append(_figures(raw, [run.alpha for run in runs], reference, own, box_share, size))
            pairs.append(np.stack([batch.index[image.numpy()], cls.numpy(), state.numpy().astype(np.int64)]))
            boxed.append(np.array([found is not None for found in own], bool))
        watch(len(batch))
    if not pairs:
        raise DataError(f"no image of {split.manifest.folder} has a label in {split.table.path}: nothing to compare")
    index, cls, state = np.concatenate(pairs, axis=1)
    return Measured(
        titles=tuple(run.title for run in runs),
        checkpoints=tuple(storage.join(run.folder, "checkpoints", run.checkpoint) for run in runs),
        alphas=tuple(run.alpha for run in runs),
        reference=reference,
        index=index,
        cls=cls.astype(np.int32),
        state=state.astype(np.int8),
        boxed=np.concatenate(boxed),
        values=np.concatenate(values, axis=3),
    )


def _figures(
    raw: np.ndarray,
    alphas: Sequence[float],
    reference: int,
    boxes: list[np.ndarray | None],
    box_share: float,
    size: int,
) -> np.ndarray:
    """float64 [R, 2, F, n] in the order of KINDS and FIGURES; NaN where a figure does not apply.

    raw: float64 [R, n, H, W]. What the boost cannot change (see measures) is computed of raw maps alone.
    """
    found = np.full((len(raw), len(KINDS), len(Measured.FIGURES), raw.shape[1]), np.nan)
    at = {name: place for place, name in enumerate(Measured.FIGURES)}
    boosted = np.stack([np.where(maps > 0, alpha * maps, maps) for maps, alpha in zip(raw, alphas, strict=True)])
    own = [place for place, box in enumerate(boxes) if box is not None]
    known = [box for box in boxes if box is not None]
    for run, out in enumerate(found):
        if run == reference:
            out[:, at["control"]] = measures.spearman(raw[run], measures.centred_gaussian(*raw.shape[2:])[None])
        else:
            out[:, at["spearman"]] = measures.spearman(raw[run], raw[reference])
        if known:
            out[:, at["pointing_hit"], own] = measures.points_into(raw[run][own], known)
            out[:, at["box_iou"], own] = measures.best_box_iou(raw[run][own], known, share=box_share, size=size)
        for kind, maps in enumerate((raw, boosted)):
            out[kind, at["logit"]] = maps[run].mean((1, 2))
            out[kind, at["top"]], out[kind, at["bottom"]] = measures.end_means(maps[run])
            if run != reference:
                pair = (maps[run], maps[reference])
                out[kind, at["mean_absolute_difference"]] = measures.mean_absolute_difference(*pair)
                out[kind, at["concordance"]] = measures.concordance(*pair)
    return found


def _picked(maps_BKHW: torch.Tensor, image: torch.Tensor, cls: torch.Tensor) -> np.ndarray:
    """float64 [n, H, W]: the maps of these labels."""
    device = maps_BKHW.device
    return maps_BKHW[image.to(device), cls.to(device)].cpu().double().numpy()


def _refuse_other_sizes(runs: Sequence[OpenRun], sizes: Sequence[tuple[int, ...]]) -> None:
    if len({tuple(size) for size in sizes}) > 1:
        listed = ", ".join(f"{run.title} {h} × {w}" for run, (h, w) in zip(runs, sizes, strict=True))
        raise SettingsError(
            f"the runs' maps differ in size ({listed}): ranks and ends of a map depend on it, and resampling would "
            "change both. Compare runs of one model.output_stride"
        )


def _split(settings: ExplainSettings, runs: Sequence[OpenRun], reference: int) -> tuple[Split, int]:
    """The split to explain and the side of its pictures in pixels; refuses runs that cannot be compared on it."""
    root = settings.root or runs[reference].settings.data.root
    data = dataclasses.replace(runs[reference].settings.data, root=root)
    split = open_split(data, settings.split, f"labels/{settings.split}.arrow", images="observed")
    sizes: dict[str, int] = {}
    for run in runs:
        heads = run.model.head.out_channels
        if heads != split.table.num_classes:
            raise SettingsError(
                f"the run {run.title!r} ({run.folder}) has {heads} classes, {split.table.path} has "
                f"{split.table.num_classes}: compare runs of the same classes"
            )
        own = dataclasses.replace(run.settings.data, root=settings.root or run.settings.data.root)
        train = open_split(own, own.train_split, own.train_labels, images=own.images)
        same_classes(train.table, split.table)
        sizes[run.title] = own.image_size or train.image_size
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{title} {side}" for title, side in sizes.items())
        raise SettingsError(f"the runs see pictures of different sides in pixels ({listed}): compare runs of one size")
    return split, next(iter(sizes.values()))


def _panel(
    settings: ExplainSettings, runs: Sequence[OpenRun], measured: Measured, split: Split, size: int
) -> list[PanelRow]:
    positive = np.flatnonzero(measured.state == POSITIVE)
    if settings.examples_by == "random":
        worth = np.random.default_rng(settings.seed).random(len(positive))
    else:
        chances = 1 / (1 + np.exp(-measured.figure("logit")[:, KINDS.index("boosted")][:, positive]))
        worth = np.ptp(chances, axis=0)
    reader, rows = ShardReader(split.manifest), []
    for place in positive[choose_labels(worth, measured.cls[positive], settings.examples)]:
        pixels = np.empty((size, size, 3), np.uint8)
        decode_into(reader.read(int(measured.index[place])), pixels)
        cls = int(measured.cls[place])
        rows.append(panel_row(runs, pixels, cls, split.table.names[cls]))
    return rows


def _histories(runs: Sequence[OpenRun]) -> dict[str, tuple[int, list]]:
    """By title: place and history; a run that several titles name stands once."""
    found: dict[str, tuple[int, list]] = {}
    seen: set[str] = set()
    for place, run in enumerate(runs):
        if run.folder not in seen:
            found[run.title] = (place, run.history)
        seen.add(run.folder)
    return found
