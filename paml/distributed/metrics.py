"""Metrics of a training for Prometheus, through the exporter of each Ray node (see `cluster/monitoring`).

Ray adds the prefix `ray_`, and the suffix `_total` to counters, and exports about every ten seconds.
"""

import math
import operator

from ray.util.metrics import Counter, Gauge

from paml.training.meter import Meter, Usage

COUNTERS = {
    "paml_images": ("images", "Images trained on."),
    "paml_train_seconds": ("seconds", "Worker seconds of training, with waits and checkpoints, without evaluation."),
    "paml_data_wait_seconds": ("waited_seconds", "Of these, seconds spent waiting for batches."),
    "paml_checkpoint_seconds": ("checkpoint_seconds", "Of these, seconds spent waiting for checkpoints."),
    "paml_checkpoints": ("checkpoints", "Checkpoints written."),
    "paml_remote_read_bytes": ("traffic.bytes_fetched", "Bytes of shards read from a bucket."),
    "paml_cache_hits": ("traffic.hits", "Shards opened from the node's cache."),
    "paml_cache_misses": ("traffic.misses", "Shards fetched into the node's cache."),
    "paml_cache_bypassed_images": ("traffic.ranges", "Images read directly from a bucket because the cache was full."),
}
"""Name in Prometheus -> (attribute of a worker's usage, description)."""
GAUGES = {
    "paml_epoch": ("epoch", "The last evaluated epoch."),
    "paml_train_loss": ("train/loss", "Loss of that epoch, over all workers."),
    "paml_val_map": ("val/mAP", "Validation mAP, 0 to 1."),
    "paml_rejected_fraction": ("rejection/rejected_fraction", "Fraction of the unobserved labels that was rejected."),
    "paml_rejection_precision": ("rejection/precision", "Fraction of rejected labels that are false negatives."),
    "paml_probe_recall": ("rejection/probe_recall", "Fraction of hidden positives that was rejected."),
    "paml_probe_false_rejection_rate": (
        "rejection/probe_false_rejection_rate",
        "Rejected fraction of hidden negatives.",
    ),
}
"""Name in Prometheus -> (metric of an epoch, description). Exported by the first worker."""


class RayMeter(Meter):
    """A meter that exports usage and metrics, tagged by run and rank."""

    def __init__(self, run: str, rank: int) -> None:
        super().__init__()
        self._counters = {name: Counter(name, about, ("run", "rank")) for name, (_, about) in COUNTERS.items()}
        self._gauges = {name: Gauge(name, about, ("run",)) for name, (_, about) in GAUGES.items()}
        for counter in self._counters.values():
            counter.set_default_tags({"run": run, "rank": str(rank)})
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def publish(self, usage: Usage) -> None:
        """Add the usage to the counters."""
        for name, (attribute, _) in COUNTERS.items():
            if (value := operator.attrgetter(attribute)(usage)) > 0:
                self._counters[name].inc(value)

    def epoch_metrics(self, metrics: dict[str, float]) -> None:
        """Set the gauges of the metrics that the epoch has."""
        for name, (metric, _) in GAUGES.items():
            value = metrics.get(metric, math.nan)
            if not math.isnan(value):
                self._gauges[name].set(value)
