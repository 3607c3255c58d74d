"""The metrics of an epoch, by their names in the journal and in trackers."""

import math

from paml.losses import LOSSES
from paml.metrics import Scores
from paml.shards.cache import Traffic
from paml.training.data import RunData
from paml.training.meter import Usage
from paml.training.state import COUNTS, TrainState
from paml.training.world import World


def epoch_metrics(state: TrainState, data: RunData, seconds: float, first_step: int) -> dict[str, float]:
    """Metrics of training and rejection over all workers; all must call it.

    seconds: duration of the steps since `first_step`, which is above 0 in the first epoch after a resume.
    """
    loss = LOSSES[state.settings.loss.name]
    counts = dict(zip(COUNTS, state.world.sum(state.counts.clone()).tolist(), strict=True))
    loss_sum = float(state.world.sum(state.loss_sum.clone()))
    images = max(1, counts["images"])
    timed_fraction = (state.step - first_step) / max(1, state.steps_per_epoch)
    metrics: dict[str, float] = {
        "train/loss": loss_sum / (images * state.num_classes),
        "train/learning_rate": state.optimizer.param_groups[0]["lr"],
        "train/images_per_second": images * timed_fraction / max(seconds, 1e-9),
        "train/bad_images": counts["bad_images"],
        "train/workers": state.world.size,
    }
    if state.settings.linear_init.epochs:
        metrics["train/head_only"] = state.phase.head_only
    if not loss.rejects:
        return {name: float(value) for name, value in metrics.items()}
    rejected = counts["rejected"]
    metrics |= {
        "rejection/rejected": rejected,
        "rejection/rejected_fraction": rejected / max(1, counts["unobserved"]),
    }
    if loss.recovers:
        metrics["recovery/recovered"] = rejected
    if loss.corrects:
        metrics["recovery/recovered_total"] = len(state.overlay)
    if data.train.truth is not None:
        correct = counts["rejected_false_negatives"]
        metrics |= {
            "rejection/rejected_false_negatives": correct,
            "rejection/precision": correct / rejected if rejected else math.nan,
            "rejection/recall": correct / max(1, counts["false_negatives"]),
        }
    for name, labels in (("probe_recall", "probe_positives"), ("probe_false_rejection_rate", "probe_negatives")):
        if counts[labels]:
            metrics[f"rejection/{name}"] = counts[f"rejected_{labels}"] / counts[labels]
    return {name: float(value) for name, value in metrics.items()}


def usage_metrics(world: World, usage: Usage) -> dict[str, float]:
    """Time lost and bytes read from a bucket since the last epoch, over all workers; all must call it."""
    total = Usage()
    for part in world.gather_objects(usage):
        total.add(part)
    seconds, traffic = max(total.seconds, 1e-9), total.traffic
    metrics = {
        "train/data_wait_fraction": total.waited_seconds / seconds,
        "train/checkpoint_fraction": total.checkpoint_seconds / seconds,
    }
    if traffic == Traffic():
        return metrics
    return metrics | {
        "data/remote_read_gb": traffic.bytes_fetched / 1e9,
        "data/cache_hits": traffic.hits,
        "data/cache_misses": traffic.misses,
        "data/cache_bypassed_images": traffic.ranges,
    }


def score_metrics(scores: dict[float, Scores], prefix: str, group_prefix: str) -> dict[str, float]:
    """Scores by name: `val/mAP` for the first alpha, `val/mAP_alpha_5` for others."""
    metrics: dict[str, float] = {}
    for position, (alpha, score) in enumerate(scores.items()):
        suffix = "" if position == 0 else f"_alpha_{alpha:g}"
        for name, value in score.metrics().items():
            metrics[f"{group_prefix if name in score.groups else prefix}/{name}{suffix}"] = value
    return metrics


def epoch_line(state: TrainState, metrics: dict[str, float]) -> str:
    """A summary of the epoch before the current one, for the console."""
    head_only = metrics.get("train/head_only", 0.0) > 0
    parts = [
        f"epoch {state.epoch - 1}/{state.settings.all_epochs}" + (" (head only)" if head_only else ""),
        f"loss {metrics['train/loss']:.5f}",
        f"val mAP {100 * metrics['val/mAP']:.2f}",
    ]
    texts = {"rejected": "rejected {:,.0f}", "precision": "precision {:.3f}", "probe_recall": "probe recall {:.3f}"}
    values = {name: metrics.get(f"rejection/{name}", math.nan) for name in texts}
    parts += [texts[name].format(value) for name, value in values.items() if not math.isnan(value)]
    if metrics["train/bad_images"]:
        parts.append(f"bad images {metrics['train/bad_images']:.0f}")
    return " · ".join([*parts, f"{metrics['train/images_per_second']:.1f} images/s"])
