"""The paper's analysis of explanations: maps of two or more checkpoints, compared on the same labels.

Kim et al. (CVPR 2023, section 3) observe that training with partial labels as AN keeps the order of a map's scores and
shrinks the large ones. `explain` measures both effects between any checkpoints, for raw and boosted maps.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from paml import storage
from paml.data.decode import decode_into
from paml.data.loader import Batch
from paml.errors import DataError, SettingsError, check_setting
from paml.explain import measures
from paml.explain.boxes import read_boxes
from paml.explain.panel import PanelRow, boosted_map, choose_labels, draw_map_panel, draw_rows
from paml.explain.plots import draw_extremes, draw_learning_curves, draw_rejected, draw_similarity
from paml.explain.report import MAP_KINDS, METRICS, MapMetrics, summary_text, write_metrics
from paml.labels.states import POSITIVE
from paml.models.backbones import check_takes_images
from paml.plots import new_figure, save_figure
from paml.runs.spec import OpenRun, open_runs, training_split_of
from paml.shards.reader import ShardReader
from paml.training.data import Split, eval_loader, open_split
from paml.training.hooks import terminal_progress
from paml.training.world import World, current_world

LABELS_PER_CHUNK = 4096
"""Labels measured at once; bounds memory for batches with many labels."""
_COMPARED_IMAGES = 120


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainSettings:
    """Which runs to compare, and on which images."""

    runs: dict[str, str]
    """Two or more runs, by title: FOLDER[@CHECKPOINT][:alpha=A]. The others are compared with the first. CHECKPOINT is
    best (default), newest or step-*; A defaults to the run's boost.eval. Example: '{full: runs/full, AN + boost:
    "runs/an@best:alpha=5"}'."""
    split: str = "test"
    """Split of the prepared data, with the labels of its table."""
    root: str | None = None
    """Prepared data folder; null uses the first run's data.root."""
    images: int | None = None
    """Size of a random sample of the split's images; null uses all images."""
    seed: int = 0
    """Seed of the image sample."""
    boxes: str | None = None
    """CSV file of boxes in the Open Images format (annotations-human-bbox.csv), for the pointing game and box IoU."""
    examples: int = 4
    """Number of positive labels in the panel: those whose probability differs most between the runs, one per class
    first. 0 draws no panel."""
    batch_size: int = 32
    """Images per batch. Memory is needed for batch_size × classes maps."""
    out: str = "runs/explain"
    """Output folder for maps.parquet, summary.txt and plots, local or s3://. Files are overwritten."""

    def __post_init__(self) -> None:
        if len(self.runs) < 2:
            raise SettingsError(f"runs has {len(self.runs)} entries; give two or more: '{{full: runs/a, AN: runs/b}}'")
        for name, minimum in (("images", 1), ("examples", 0), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            check_setting(value is None or value >= minimum, name, value, f"at least {minimum}")


def explain(settings: ExplainSettings, log: Callable[[str], None] = print) -> MapMetrics:
    """Compute the metrics, write results and plots to `settings.out`, and log the summary. Raises PamlError."""
    world = current_world()
    runs = open_runs(settings.runs, world.device)
    for run in runs:
        check_takes_images(run.settings.model, run.folder)
    data = runs[0].settings.data
    data = dataclasses.replace(data, root=settings.root or data.root)
    split = open_split(data, settings.split, f"labels/{settings.split}.arrow", images="observed")
    sizes = {run.title: training_split_of(run, split, settings.root)[1] for run in runs}
    _check_equal("image sizes", sizes, "px", "compare runs with the same data.image_size")
    total, size = len(split.samples), sizes[runs[0].title]
    split = sample_images(split, settings.images, settings.seed)
    sampled = "all" if len(split.samples) == total else f"a random sample with seed {settings.seed}"
    log(f"{len(split.samples):,} of {total:,} images of {split.name} ({sampled})")
    boxes_of_labels = {}
    if settings.boxes is not None:
        keys = [split.manifest.key(int(index)) for index in split.samples.index]
        boxes_of_labels, rows, malformed = read_boxes(settings.boxes, keys, split.table.classes)
        log(f"{sum(map(len, boxes_of_labels.values())):,} of {rows:,} boxes are of these images and classes")
        if malformed:
            log(f"warning: skipped {malformed:,} boxes whose edges are not 0 ≤ min < max ≤ 1")

    loader = eval_loader(data, split, size, World(device=world.device), batch_size=settings.batch_size)
    bar = terminal_progress("maps", len(split.samples))
    metrics = compute_metrics(runs, loader, split, boxes_of_labels, size=size, on_batch=bar.update)
    bar.close()
    if loader.bad:
        log(f"warning: skipped {len(loader.bad)} bad images: {', '.join(bad.key for bad in loader.bad[:20])}")
    text = summary_text(metrics)
    log(text)
    write_metrics(metrics, split, settings, storage.join(settings.out, "maps.parquet"))
    storage.write_bytes(storage.join(settings.out, "summary.txt"), (text + "\n").encode())
    written = ["maps.parquet", "summary.txt", *_draw_all(settings, runs, metrics, split, size)]
    log(f"\nwrote {', '.join(written)} to {settings.out}")
    return metrics


def _check_equal(what: str, values: Mapping[str, object], unit: str, fix: str) -> None:
    """Raise SettingsError if the values of the runs, by title, differ."""
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{title} {value} {unit}" for title, value in values.items())
        raise SettingsError(f"the runs' {what} differ ({listed}): {fix}")


def sample_images(split: Split, count: int | None, seed: int) -> Split:
    """The split with a random sample of `count` of its images in manifest order, or all if there are no more."""
    if count is None or count >= len(split.samples):
        return split
    return split.subset(np.sort(np.random.default_rng(seed).permutation(len(split.samples))[:count]))


def compute_metrics(
    runs: Sequence[OpenRun],
    batches: Iterable[Batch],
    split: Split,
    boxes_of_labels: Mapping[tuple[str, str], np.ndarray] | None = None,
    *,
    size: int = 0,
    on_batch: Callable[[int], None] = lambda images: None,
) -> MapMetrics:
    """Metrics of every observed (image, class) pair, by run, for raw and boosted maps; compared with the first run.

    Only one batch's maps are in memory at a time. boxes_of_labels: as `Boxes.by_label`. size: side of the images in
    pixels, for boxes. Raises SettingsError if the runs' maps differ in size, because resampling would change their
    ranks and extremes.
    """
    boxes_of_labels, classes = boxes_of_labels or {}, split.table.classes
    alphas = [run.alpha for run in runs]
    labels_by_chunk: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for batch in batches:
        computed = {model: run.maps(batch.images) for model, run in {id(run.model): run for run in runs}.items()}
        maps_of = {run.title: computed[id(run.model)] for run in runs}
        sizes = {title: f"{maps.shape[2]} × {maps.shape[3]}" for title, maps in maps_of.items()}
        fix = "compare runs with the same model.output_stride; resampling would change the maps' ranks and extremes"
        _check_equal("map sizes", sizes, "cells", fix)
        keys = batch.keys() if boxes_of_labels else []
        columns = (batch.labels.image, batch.labels.cls, batch.labels.state)
        for start in range(0, len(batch.labels.cls), LABELS_PER_CHUNK):
            image, cls, state = (column[start : start + LABELS_PER_CHUNK] for column in columns)
            boxes = [
                boxes_of_labels.get((keys[i], classes[k])) if keys and s == POSITIVE else None
                for i, k, s in zip(image.tolist(), cls.tolist(), state.tolist(), strict=True)
            ]
            raw = torch.stack([maps[image.to(maps.device), cls.to(maps.device)] for maps in maps_of.values()])
            values.append(_metrics_of_chunk(raw.cpu().double().numpy(), alphas, boxes, size))
            labels_by_chunk.append(np.stack([batch.index[image.numpy()], cls.numpy(), state.numpy().astype(np.int64)]))
        on_batch(len(batch))
    if not labels_by_chunk:
        raise DataError(f"no image of {split.manifest.folder} has a label in {split.table.path}: nothing to compare")
    index, cls, state = np.concatenate(labels_by_chunk, axis=1)
    return MapMetrics(
        titles=tuple(run.title for run in runs),
        checkpoints=tuple(storage.join(run.folder, "checkpoints", run.checkpoint) for run in runs),
        alphas=tuple(alphas),
        index=index,
        cls=cls.astype(np.int32),
        state=state.astype(np.int8),
        values=np.concatenate(values, axis=3),
    )


def _metrics_of_chunk(
    raw: np.ndarray,
    alphas: Sequence[float],
    boxes: list[np.ndarray | None],
    size: int,
) -> np.ndarray:
    """float64 [R, 2, F, n] in the order of MAP_KINDS and METRICS; NaN for metrics that do not apply.

    raw: float64 [R, n, H, W]. Metrics that boost cannot change (see measures) are computed from raw maps only.
    """
    values = np.full((len(raw), len(MAP_KINDS), len(METRICS), raw.shape[1]), np.nan)
    metric = {name: values[:, :, position] for position, name in enumerate(METRICS)}
    boosted = np.stack([np.where(maps > 0, alpha * maps, maps) for maps, alpha in zip(raw, alphas, strict=True)])
    with_box = [i for i, box in enumerate(boxes) if box is not None]
    known_boxes = [box for box in boxes if box is not None]
    for run in range(len(raw)):
        if run == 0:
            metric["control"][run] = measures.spearman(raw[run], measures.centered_gaussian(*raw.shape[2:])[None])
        else:
            metric["spearman"][run] = measures.spearman(raw[run], raw[0])
        if known_boxes:
            maps = raw[run][with_box]
            metric["pointing_hit"][run][:, with_box] = measures.pointing_hits(maps, known_boxes)
            metric["box_iou"][run][:, with_box] = measures.best_box_iou(maps, known_boxes, size=size)
        for kind, maps in enumerate((raw, boosted)):
            metric["logit"][run, kind] = maps[run].mean((1, 2))
            metric["top"][run, kind], metric["bottom"][run, kind] = measures.tail_means(maps[run])
            if run:
                difference = np.abs(maps[run] - maps[0])
                metric["mean_absolute_difference"][run, kind] = difference.mean((1, 2))
                metric["concordance"][run, kind] = measures.concordance(maps[run], maps[0])
    return values


def draw_run_comparison(runs: Sequence[OpenRun], split: Split, path: str, *, examples: int = 3) -> None:
    """Draw to `path` (PNG) learning curves of the runs and, below them, their maps of `examples` labels.

    The labels are positives of a sample of the split that the last run scores well above the first.
    """
    sample, data = sample_images(split, _COMPARED_IMAGES, seed=0), runs[0].settings.data
    batches = eval_loader(data, sample, split.image_size, World(), batch_size=ExplainSettings.batch_size)
    metrics = compute_metrics(runs, batches, sample)
    rows = _panel_rows(
        runs, metrics, sample, split.image_size, examples, lambda scores_RN: scores_RN[-1] - scores_RN[0]
    )
    figure = new_figure(3.0 * (len(runs) + 1), 3.4 + 2.6 * examples)
    top, bottom = figure.subfigures(2, 1, height_ratios=(3.4, 2.6 * examples))
    draw_learning_curves(top, {run.title: (position, run.history) for position, run in enumerate(runs)})
    draw_rows(bottom, [run.title for run in runs], rows)
    save_figure(figure, path)


def _draw_all(
    settings: ExplainSettings, runs: Sequence[OpenRun], metrics: MapMetrics, split: Split, size: int
) -> list[str]:
    """Draw the plots; returns their file names."""
    draw_similarity(metrics, storage.join(settings.out, "similarity.png"))
    draw_extremes(metrics, storage.join(settings.out, "extremes.png"))
    written = ["similarity.png", "extremes.png"]
    if rows := _panel_rows(runs, metrics, split, size, settings.examples, lambda scores_RN: np.ptp(scores_RN, axis=0)):
        draw_map_panel([run.title for run in runs], rows, storage.join(settings.out, "panel.png"))
        written.append("panel.png")
    positions = {run.folder: i for i, run in reversed(list(enumerate(runs)))}  # a run of several titles, once
    histories = {runs[i].title: (i, runs[i].history) for i in sorted(positions.values())}
    if draw_rejected(histories, storage.join(settings.out, "rejected.png")):
        written.append("rejected.png")
    return written


def _panel_rows(
    runs: Sequence[OpenRun],
    metrics: MapMetrics,
    split: Split,
    size: int,
    count: int,
    priority: Callable[[np.ndarray], np.ndarray],
) -> list[PanelRow]:
    """The `count` positive labels of highest priority, a function of the runs' probabilities, float64 [R, n]."""
    positive = np.flatnonzero(metrics.state == POSITIVE)
    logits = metrics.metric("logit")[:, MAP_KINDS.index("boosted")][:, positive]
    priorities = priority(1 / (1 + np.exp(-logits)))
    reader, rows = ShardReader(split.manifest), []
    for label in positive[choose_labels(priorities, metrics.cls[positive], count)]:
        pixels = np.empty((size, size, 3), np.uint8)
        decode_into(reader.read(int(metrics.index[label])), pixels)
        cls = int(metrics.cls[label])
        maps = [boosted_map(run, pixels, cls) for run in runs]
        rows.append(PanelRow(pixels, split.table.names[cls], maps))
    return rows
