"""Priors of classes as a run's network estimates them: the mean score of each class over the training images.

Of a run with `loss.name: p-asl-ignore`, for `loss.p_asl.prior_file` of one with p-asl-selective:

    python -m paml.training.prior --run runs/ignore --out prior.csv
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable

import numpy as np
import torch

from paml import storage
from paml.data.device import Normaliser
from paml.data.loader import Batch
from paml.errors import PamlError, SettingsError
from paml.losses.prior import write_prior
from paml.models.cam import CamClassifier
from paml.training.data import eval_loader, open_split
from paml.training.loop import terminal_bar
from paml.training.score_run import choose_checkpoint, load_model, settings_of_run
from paml.training.state import autocast_type
from paml.training.world import World, current_world


@torch.inference_mode()
def mean_scores(
    model: CamClassifier,
    batches: Iterable[Batch],
    *,
    alpha: float,
    normalise: Normaliser,
    world: World,
    autocast: torch.dtype | None,
    watch: Callable[[int], None] = lambda images: None,
) -> np.ndarray:
    """float64[K]: of each class the mean of sigmoid(logit) over all images."""
    model.eval()
    total_K, images = torch.zeros(model.head.out_channels, dtype=torch.float64, device=world.device), 0
    for batch in batches:
        if len(batch):
            with torch.autocast(world.device.type, autocast, enabled=autocast is not None):
                logits_BK = model(normalise(batch.images.to(world.device)), alpha)
            total_K += torch.sigmoid(logits_BK).sum(0, dtype=torch.float64)
            images += len(batch)
            watch(len(batch))
    return (total_K / max(1, images)).cpu().numpy()


def estimate_prior(run: str, out: str, checkpoint: str = "best", root: str | None = None) -> np.ndarray:
    """Write the priors of a run's classes, by MID.

    Args:
        run: the run's folder.
        out: the file to write, CSV or .parquet.
        checkpoint: best (by validation), newest, or a folder's name such as step-000001234.
        root: the prepared data; the run's own unless given.
    """
    settings = settings_of_run(run)
    data = dataclasses.replace(settings.data, root=root or settings.data.root)
    train = open_split(data, data.train_split, data.train_labels, images=data.images)
    classes, world = train.table.classes, current_world()
    name, facts = choose_checkpoint(run, settings, checkpoint, settings.boost.eval)
    if facts["num_classes"] != len(classes):
        raise SettingsError(
            f"{train.table.path} has {len(classes)} classes, the head of {run} has {facts['num_classes']}: give the "
            "root that the run was trained on"
        )
    model = load_model(run, settings, name)
    bar = terminal_bar("training images", len(train.samples))
    prior_K = mean_scores(
        model.to(world.device),
        eval_loader(settings, train, data.image_size or train.image_size, world),
        alpha=settings.boost.eval,
        normalise=Normaliser(settings.model.pixel_mean, settings.model.pixel_std, world.device),
        world=world,
        autocast=autocast_type(settings, world.device),
        watch=bar.update,
    )
    bar.close()
    write_prior(out, classes, prior_K)
    return prior_K


def main(args: list[str] | None = None) -> int:
    """Write the file and say what stands in it; status 0, or 1 after saying what is wrong."""
    from jsonargparse import auto_cli

    try:
        prior_K = auto_cli(estimate_prior, args=args, as_positional=False, prog="python -m paml.training.prior")
    except (PamlError, storage.StorageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(prior_K):,} classes, {int((prior_K > 0.05).sum()):,} of them with a prior above 0.05")
    return 0


if __name__ == "__main__":
    sys.exit(main())
