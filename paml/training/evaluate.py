"""Scores of a model on annotated pairs: every image once, whatever the number of workers."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch

from paml.data.device import Normalise
from paml.data.loader import Batch
from paml.metrics import Pairs, gather_pairs, join_pairs, pairs_of
from paml.models import CamClassifier
from paml.models.cam import pool_logits
from paml.training.world import World


@torch.inference_mode()
def score_pairs(
    model: CamClassifier,
    batches: Iterable[Batch],
    *,
    alphas: tuple[float, ...],
    world: World,
    normalise: Normalise,
    autocast: torch.dtype | None,
    watch: Callable[[int], None] = lambda images: None,
) -> dict[float, Pairs]:
    """For each alpha the scores of all annotated pairs of all workers, on every worker.

    One pass of the network serves all alphas, since the boost acts on its maps. Scores are float32 logits.
    """
    found: dict[float, list[Pairs]] = {alpha: [] for alpha in alphas}
    with evaluating(model):
        for batch in batches:
            if not len(batch):
                continue
            images = normalise(_move(batch.images, world.device), None)
            with _autocast(world.device, autocast):
                maps_BKHW = model.maps(images)
            labels = batch.labels.to(world.device)
            place_B = torch.from_numpy(batch.index).to(world.device)
            for alpha in alphas:
                logits_BK = pool_logits(maps_BKHW, alpha)
                found[alpha].append(pairs_of(logits_BK, labels.image, labels.cls, labels.state, place_B))
            watch(len(batch))
    return {alpha: gather_pairs(join_pairs(parts, world.device), world.group) for alpha, parts in found.items()}


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then every module has the mode again that it had, frozen ones too."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in was_training.items():
            module.training = mode


def _move(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    return images if device.type == "cpu" else images.to(device, non_blocking=True)


def _autocast(device: torch.device, autocast: torch.dtype | None) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, autocast, enabled=autocast is not None)
