"""One picture of two or more runs: their maps of the same labels, their validation curve, their rejected labels."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from paml import storage
from paml.data.decode import decode_rgb
from paml.data.device import Normaliser
from paml.models.boost import boost_lu
from paml.models.cam import CamClassifier, build_model, pool_logits
from paml.shards.reader import ShardReader
from paml.training.checkpoint import read_checkpoint
from paml.training.data import Split
from paml.training.loop import Result
from paml.training.settings import TrainSettings


@dataclasses.dataclass(frozen=True)
class RunOnPanel:
    """A finished run and how to call it."""

    title: str
    folder: str
    settings: TrainSettings
    result: Result


def best_model(run: RunOnPanel, num_classes: int) -> CamClassifier:
    """The network with the scored weights of its best epoch, in evaluation mode."""
    group = "averaged" if run.settings.optimiser.average else "weights"
    name = run.result.best[f"{run.settings.boost.eval:g}"]["checkpoint"]
    model = build_model(dataclasses.replace(run.settings.model, weights=None), num_classes)
    model.load_state_dict(read_checkpoint(run.folder, name, groups=(group,)).tensors[group])
    return model.eval()


@torch.inference_mode()
def boosted_map(run: RunOnPanel, model: CamClassifier, pixels: np.ndarray, cls: int) -> tuple[np.ndarray, float]:
    """(map float32 [H, W] as boosted in scoring, logit) of class `cls` for one picture, uint8 [S, S, 3]."""
    settings = run.settings.model
    normalise = Normaliser(settings.pixel_mean, settings.pixel_std, torch.device("cpu"))
    maps_BKHW = model.maps(normalise(torch.from_numpy(pixels)[None])).float()
    alpha = run.settings.boost.eval
    return boost_lu(maps_BKHW[0, cls], alpha).numpy(), float(pool_logits(maps_BKHW, alpha)[0, cls])


def draw_panel(runs: Sequence[RunOnPanel], split: Split, path: str, *, examples: int = 3, seed: int = 0) -> None:
    """Draw to `path` (PNG): above the curves by epoch, below `examples` labels with each run's map of them.

    The labels are positives of the split that the runs score most differently. The colours of a row share one
    scale, so a weak map looks weak.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    models = [best_model(run, split.table.num_classes) for run in runs]
    chosen = _examples(runs, models, split, examples, seed)
    figure = Figure(figsize=(3.0 * (len(runs) + 1), 3.4 + 2.6 * examples), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(3.4, 2.6 * examples))  # pyright: ignore[reportGeneralTypeIssues]
    _curves(above, runs)
    axes = below.subplots(examples, len(runs) + 1, squeeze=False)
    for row, (pixels, cls) in zip(axes, chosen, strict=True):
        found = [boosted_map(run, model, pixels, cls) for run, model in zip(runs, models, strict=True)]
        limit = max(1e-6, max(float(np.abs(scores).max()) for scores, _ in found))
        row[0].imshow(pixels)
        row[0].set_title(split.table.names[cls], fontsize=10)
        for axis, run, (scores, logit) in zip(row[1:], runs, found, strict=True):
            side = pixels.shape[0]
            axis.imshow(pixels)
            extent = (-0.5, side - 0.5, side - 0.5, -0.5)
            colours = {"cmap": "coolwarm", "vmin": -limit, "vmax": limit}
            axis.imshow(scores, extent=extent, alpha=0.6, interpolation="bilinear", **colours)
            axis.set_title(f"{run.title}: p = {1 / (1 + np.exp(-logit)):.2f}", fontsize=10)
        scale = ScalarMappable(Normalize(-limit, limit), "coolwarm")
        below.colorbar(scale, ax=list(row), shrink=0.8)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    with storage.replacing(path) as local:
        figure.savefig(local, format="png")


def _curves(figure, runs: Sequence[RunOnPanel]) -> None:
    score, rejected = figure.subplots(1, 2)
    for run in runs:
        epochs = [figures["epoch"] for figures in run.result.history]
        score.plot(epochs, [100 * f["val/map"] for f in run.result.history], marker="o", label=run.title)
        if "rejection/rejected" not in run.result.history[-1]:
            continue
        rejected.bar(epochs, [f["rejection/rejected"] for f in run.result.history], label="rejected", color="0.75")
        if "rejection/rejected_false_negatives" in run.result.history[-1]:
            true = [f["rejection/rejected_false_negatives"] for f in run.result.history]
            rejected.bar(epochs, true, label="truly false negatives", color="tab:green")
            rejected.set_title(f"{run.title}: labels rejected", fontsize=10)
    score.set(xlabel="epoch", ylabel="validation mAP, %")
    score.legend(fontsize=9)
    rejected.set(xlabel="epoch")
    if rejected.patches:
        rejected.legend(fontsize=9)


def _examples(
    runs: Sequence[RunOnPanel], models: Sequence[CamClassifier], split: Split, count: int, seed: int
) -> list[tuple[np.ndarray, int]]:
    """Positives that the last run scores well above the first, of different pictures and classes."""
    reader = ShardReader(split.manifest)
    drawn = np.random.default_rng(seed).permutation(len(split.samples))[:120]
    found: list[tuple[float, np.ndarray, int]] = []
    for sample in drawn:
        labels = split.table.lookup(split.samples.row[[sample]])
        positives = labels.cls[labels.state == 1]
        if not len(positives):
            continue
        pixels = decode_rgb(reader.read(int(split.samples.index[sample])))
        scores = [
            [boosted_map(run, model, pixels, int(cls))[1] for cls in positives]
            for run, model in ((runs[0], models[0]), (runs[-1], models[-1]))
        ]
        chances = 1 / (1 + np.exp(-np.array(scores)))
        gain = chances[1] - chances[0]
        best = int(gain.argmax())
        found.append((float(gain[best]), pixels, int(positives[best])))
    found.sort(key=lambda item: -item[0])
    chosen: list[tuple[np.ndarray, int]] = []
    for _, pixels, cls in found:
        if len(chosen) < count and cls not in {other for _, other in chosen}:
            chosen.append((pixels, cls))
    for _, pixels, cls in found:
        if len(chosen) < count:
            chosen.append((pixels, cls))
    return chosen
