"""A training's figures for Prometheus, through the exporter that every Ray node has (`cluster/monitoring`).

Ray puts `ray_` before a name and, for what only grows, `_total` behind it; it publishes every ten seconds or so.
"""

import math

from ray.util.metrics import Counter, Gauge

from paml.training.meter import Meter, Usage

COUNTERS = {
    "paml_images": "Images trained on.",
    "paml_train_seconds": "Worker seconds of training, waits and checkpoints included, scoring not.",
    "paml_data_wait_seconds": "Of these: waiting for batches that were not ready.",
    "paml_checkpoint_seconds": "Of these: standing still for a checkpoint.",
    "paml_checkpoints": "Checkpoints made.",
    "paml_bucket_bytes": "Bytes of shards read from a bucket.",
    "paml_cache_hits": "Shards opened that lay in the node's cache.",
    "paml_cache_misses": "Shards fetched into the node's cache.",
    "paml_images_past_cache": "Images read straight from a bucket, since the cache had no room.",
}
GAUGES = {
    "paml_epoch": ("epoch", "The last epoch with figures."),
    "paml_train_loss": ("train/loss", "Loss of that epoch, over all workers."),
    "paml_validation_map": ("val/map", "Validation mAP, 0 to 1."),
    "paml_rejected_share": ("rejection/rejected_share", "Share of the unobserved labels that were rejected."),
    "paml_rejection_precision": ("rejection/precision", "Of the rejected labels, truly false negatives (full labels)."),
    "paml_probe_recall": ("rejection/probe_recall", "Hidden positives that were rejected: an estimate of recall."),
    "paml_probe_false_rejection": ("rejection/probe_false_rejection", "Hidden negatives that were rejected."),
}
"""Name in Prometheus: name among an epoch's figures, and what it says. The first worker alone publishes them."""


class RayMeter(Meter):
    """A worker's meter whose sums and figures go to Ray's exporter, tagged by run and rank."""

    def __init__(self, run: str, rank: int) -> None:
        super().__init__()
        by_rank, by_run = {"run": run, "rank": str(rank)}, {"run": run}
        self._counters = {name: Counter(name, about, tuple(by_rank)) for name, about in COUNTERS.items()}
        self._gauges = {name: Gauge(name, about, tuple(by_run)) for name, (_, about) in GAUGES.items()}
        for counter in self._counters.values():
            counter.set_default_tags(by_rank)
        for gauge in self._gauges.values():
            gauge.set_default_tags(by_run)

    def publish(self, used: Usage) -> None:
        """Add to the counters; what has not grown is left alone."""
        traffic = used.traffic
        values = {
            "paml_images": used.images,
            "paml_train_seconds": used.seconds,
            "paml_data_wait_seconds": used.waited_seconds,
            "paml_checkpoint_seconds": used.checkpoint_seconds,
            "paml_checkpoints": used.checkpoints,
            "paml_bucket_bytes": traffic.bytes_fetched,
            "paml_cache_hits": traffic.hits,
            "paml_cache_misses": traffic.misses,
            "paml_images_past_cache": traffic.ranges,
        }
        for name, value in values.items():
            if value > 0:
                self._counters[name].inc(value)

    def figures(self, figures: dict[str, float]) -> None:
        """Set the gauges that the epoch has figures for."""
        for name, (figure, _) in GAUGES.items():
            value = figures.get(figure, math.nan)
            if not math.isnan(value):
                self._gauges[name].set(value)
