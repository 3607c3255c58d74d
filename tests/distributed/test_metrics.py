"""A real training's figures at Ray's own exporter, and a dashboard that asks for nothing else."""

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
OF_GPUS = {"ray_node_gpus_utilization"}
UNUSED = {
    *(f"ray_paml_{name}_total" for name in ("bucket_bytes", "cache_hits", "cache_misses", "images_past_cache")),
    "ray_paml_rejection_precision",  # full labels are known nowhere in this run
}


def asked_for() -> set[str]:
    """Names of metrics in the dashboard's queries."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return {name for query in queries for name in re.findall(r"ray_\w+", query)}


def test_the_dashboard_asks_for_figures_that_paml_or_ray_has() -> None:
    ours = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    assert {name for name in asked_for() if name.startswith("ray_paml")} <= ours
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
    assert all(panel["description"] for panel in dashboard["panels"])


def test_prometheus_finds_the_exporters_by_the_name_of_their_port() -> None:
    pods, here = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["scrape_configs"]
    (kept,) = [rule for rule in pods["relabel_configs"] if rule.get("action") == "keep"]
    cluster = (MONITORING.parent / "base" / "raycluster.yaml").read_text()
    assert cluster.count(f"{{name: {kept['regex']}, containerPort: 8080}}") == 3  # head, CPU nodes, GPU nodes
    assert here["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the exporter of a Ray of one node."""
    import ray

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "2000")
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    ray.shutdown()


@pytest.mark.slow
def test_a_real_training_is_seen_at_rays_exporter(exporter: str, prepared: Path, tmp_path: Path) -> None:
    import ray

    over = tmp_path / "over"

    @ray.remote
    def trained() -> dict[str, float]:
        from paml.distributed.metrics import RayMeter
        from paml.training.loop import Watcher, train
        from paml.training.world import World
        from tests.helpers.prepared import tiny_settings

        result = train(tiny_settings(prepared, tmp_path, epochs=2), World(), Watcher(meter=RayMeter("seen", 0)))
        while not over.exists():  # Ray forgets the figures of a process that has ended
            time.sleep(0.2)
        return result.history[-1]

    training: Any = trained.remote()
    found: dict[str, float] = {}
    limit = time.monotonic() + 200
    missing = wanted = asked_for() - OF_GPUS
    while missing or found.get("ray_paml_epoch") != 2 or found.get("ray_paml_images_total") != 92:
        assert time.monotonic() < limit, (found, missing)
        time.sleep(1)
        text = urllib.request.urlopen(exporter, timeout=30).read().decode()
        tagged = re.findall(r'^(ray_paml_\w+)\{[^}]*run="seen"[^}]*\} (\S+)$', text, re.MULTILINE)
        found = {name: float(value) for name, value in tagged}
        told = set(re.findall(r"^(ray_\w+)\{", text, re.MULTILINE))
        missing = {name for name in wanted if name not in told and name not in UNUSED}  # a node's come later than ours
    over.touch()
    figures = ray.get(training)
    assert found["ray_paml_validation_map"] == pytest.approx(figures["val/map"])
    assert found["ray_paml_rejected_share"] == pytest.approx(figures["rejection/rejected_share"])
    assert 0 < found["ray_paml_data_wait_seconds_total"] < found["ray_paml_train_seconds_total"]
    assert found["ray_paml_checkpoints_total"] >= 2
    assert 'rank="0"' in text
