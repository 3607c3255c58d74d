"""Metrics of a training in Ray's exporter, and the dashboard that shows them."""

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from paml.distributed.metrics import COUNTERS, GAUGES

MONITORING = Path(__file__).resolve().parents[2] / "cluster" / "monitoring"
GPU_METRICS = {"ray_node_gpus_utilization"}
UNUSED = {
    *(
        f"ray_paml_{name}_total"
        for name in ("remote_read_bytes", "cache_hits", "cache_misses", "cache_bypassed_images")
    ),
    "ray_paml_rejection_precision",  # needs full labels
}


def dashboard_metrics() -> set[str]:
    """Metrics in the queries of the dashboard."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return {name for query in queries for name in re.findall(r"ray_\w+", query)}


def test_the_dashboard_uses_existing_metrics() -> None:
    ours = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    assert {name for name in dashboard_metrics() if name.startswith("ray_paml")} <= ours
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    positions = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(positions)) == len(positions)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(positions)
    assert all(panel["description"] for panel in dashboard["panels"])


def test_prometheus_discovers_the_exporters_by_port_name() -> None:
    pods, here = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["scrape_configs"]
    (keep,) = [rule for rule in pods["relabel_configs"] if rule.get("action") == "keep"]
    cluster = (MONITORING.parent / "jobs" / "raycluster.yaml").read_text()
    assert cluster.count(f"{{name: {keep['regex']}, containerPort: 8080}}") == 3  # head, CPU nodes, GPU nodes
    assert here["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of the exporter of a single-node Ray."""
    import ray

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "2000")
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    ray.shutdown()


@pytest.mark.slow
def test_a_training_exports_its_metrics(exporter: str, prepared: Path, tmp_path: Path) -> None:
    import ray

    done = tmp_path / "done"

    @ray.remote
    def trained() -> dict[str, float]:
        from paml.distributed.metrics import RayMeter
        from paml.training.hooks import RunHooks
        from paml.training.loop import train
        from paml.training.world import World
        from tests.helpers.prepared import tiny_settings

        result = train(tiny_settings(prepared, tmp_path, epochs=2), World(), RunHooks(meter=RayMeter("seen", 0)))
        while not done.exists():  # Ray drops the metrics of processes that have ended
            time.sleep(0.2)
        return result.history[-1]

    training: Any = trained.remote()
    exported: dict[str, float] = {}
    names: set[str] = set()  # of all scrapes: the exporter shows a gauge only until Ray's next report
    limit = time.monotonic() + 200
    missing = expected = dashboard_metrics() - GPU_METRICS
    while missing or exported.get("ray_paml_epoch") != 2 or exported.get("ray_paml_images_total") != 92:
        assert time.monotonic() < limit, (exported, missing)
        time.sleep(1)
        text = urllib.request.urlopen(exporter, timeout=30).read().decode()
        tagged = re.findall(r'^(ray_paml_\w+)\{[^}]*run="seen"[^}]*\} (\S+)$', text, re.MULTILINE)
        exported |= {name: float(value) for name, value in tagged}
        names |= set(re.findall(r"^(ray_\w+)\{", text, re.MULTILINE))
        missing = {name for name in expected if name not in names and name not in UNUSED}
    done.touch()
    figures = ray.get(training)
    assert exported["ray_paml_val_map"] == pytest.approx(figures["val/mAP"])
    assert exported["ray_paml_rejected_fraction"] == pytest.approx(figures["rejection/rejected_fraction"])
    assert 0 < exported["ray_paml_data_wait_seconds_total"] < exported["ray_paml_train_seconds_total"]
    assert exported["ray_paml_checkpoints_total"] >= 2
    assert 'rank="0"' in text
