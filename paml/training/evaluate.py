"""Scores a model on annotated pairs. Each image is scored once, whatever the number of workers."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from paml.data.device import Normalize, Normalizer, features_as_float
from paml.data.loader import Batch
from paml.labels.table import LabelTable
from paml.metrics import MetricSettings, Pairs, Scores, gather_pairs, join_pairs, pairs_of, scores
from paml.models import CamClassifier
from paml.models.cam import pool_logits
from paml.training.world import World


def normalizer_of(model: CamClassifier, device: torch.device) -> Normalize:
    """What the model's input is made with: from images, or from cached features."""
    return features_as_float if model.on_features else Normalizer(model.info.mean, model.info.std, device)


@torch.inference_mode()
def score_pairs(
    model: CamClassifier,
    batches: Iterable[Batch],
    *,
    alphas: tuple[float, ...],
    world: World,
    autocast: torch.dtype | None,
    on_batch: Callable[[int], object] = lambda images: None,
) -> dict[float, Pairs]:
    """The scored pairs of all workers for each alpha, on every worker. Scores are float32 logits.

    One forward pass serves all alphas, because the boost is applied to the maps. on_batch: called with the number of
    images after each batch.
    """
    parts: dict[float, list[Pairs]] = {alpha: [] for alpha in alphas}
    for batch, maps_BKHW in _maps(model, batches, world, autocast):
        labels = batch.labels.to(world.device)
        index_B = torch.from_numpy(batch.index).to(world.device)
        for alpha in alphas:
            logits_BK = pool_logits(maps_BKHW, alpha)
            parts[alpha].append(pairs_of(logits_BK, labels.image, labels.cls, labels.state, index_B))
        on_batch(len(batch))
    return {alpha: gather_pairs(join_pairs(own, world.device), world.group) for alpha, own in parts.items()}


@torch.inference_mode()
def mean_scores(
    model: CamClassifier, batches: Iterable[Batch], *, alpha: float, world: World, autocast: torch.dtype | None
) -> np.ndarray:
    """float64 [K]: the mean of sigmoid(logit) of each class over all images of this worker, an estimate of its prior.

    P-ASL selective (`loss.p_asl.prior_file`) uses the priors of a model trained with p-asl-ignore.
    """
    total_K, images = torch.zeros(model.head.out_channels, dtype=torch.float64, device=world.device), 0
    for batch, maps_BKHW in _maps(model, batches, world, autocast):
        total_K += torch.sigmoid(pool_logits(maps_BKHW, alpha)).sum(0, dtype=torch.float64)
        images += len(batch)
    return (total_K / max(1, images)).cpu().numpy()


def _maps(
    model: CamClassifier, batches: Iterable[Batch], world: World, autocast: torch.dtype | None
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Each batch that has images, with its maps [B, K, h, w]."""
    normalize = normalizer_of(model, world.device)
    with evaluation_mode(model):
        for batch in batches:
            if len(batch):
                images = normalize(batch.images.to(world.device, non_blocking=True), None)
                with torch.autocast(world.device.type, autocast, enabled=autocast is not None):
                    maps_BKHW = model.maps(images)
                yield batch, maps_BKHW


def scores_by_alpha(
    pairs: dict[float, Pairs], settings: MetricSettings, train_table: LabelTable
) -> dict[float, Scores]:
    """Scores for each alpha. train_table: the training labels, whose counts define the five groups of classes."""
    positives, negatives = train_table.class_counts()
    return {
        alpha: scores(*scored[:3], train_table.num_classes, settings=settings, train_counts=positives + negatives)
        for alpha, scored in pairs.items()
    }


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and restore the mode of each module afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
