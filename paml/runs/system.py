"""Samples the load of the machine into a run's journal as `system/...` metrics."""

import os
import sys
import threading
import time
from typing import Any

import psutil

from paml.runs.journal import Journal, read_journal

INTERVAL_S = 10.0
_SAMPLES_PER_SEGMENT = 6


class SystemSampler:
    """A thread that journals metrics of CPU, memory, disk, network and GPUs every `interval_s` seconds.

    GPUs are measured if this process uses them; their utilization and power need pynvml. Steps number the samples; a
    resumed run continues them.
    """

    def __init__(self, journal: Journal, interval_s: float = INTERVAL_S) -> None:
        self._journal, self._interval_s = journal, interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-sampler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Journal the last samples and stop."""
        self._stop.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        try:
            events = read_journal(self._journal.run_folder, unreadable={})
        except OSError:
            events = []  # steps of an earlier part of the run then keep their first value
        steps = [event.step for event in events if event.kind == "metric" and event.key.startswith("system/")]
        step = max(steps, default=-1) + 1
        start = psutil.net_io_counters()
        psutil.cpu_percent()  # the first call starts the measurement
        rows: list[tuple[str, float, int, int]] = []
        stopped = False
        while not stopped:
            stopped = self._stop.wait(self._interval_s)
            now = time.time_ns() // 1_000_000
            rows += [(f"system/{name}", value, step, now) for name, value in _sample(start).items()]
            step += 1
            if stopped or step % _SAMPLES_PER_SEGMENT == 0:
                try:
                    self._journal.metric_rows(rows)
                    rows = []
                except OSError:
                    continue  # training reports storage that fails; try these rows again later


def _sample(start: Any) -> dict[str, float]:
    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.used / memory.total * 100,
        "disk_usage_percentage": disk.percent,
        "disk_usage_megabytes": disk.used / 1e6,
        "disk_available_megabytes": disk.free / 1e6,
    }
    if start is not None and network is not None:
        values["network_receive_megabytes"] = (network.bytes_recv - start.bytes_recv) / 1e6
        values["network_transmit_megabytes"] = (network.bytes_sent - start.bytes_sent) / 1e6
    return {name: round(value, 1) for name, value in (values | _gpu_metrics()).items()}


def _gpu_metrics() -> dict[str, float]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():  # other queries would initialize CUDA in this process
        return {}
    values: dict[str, float] = {}
    for index in [torch.cuda.current_device()]:  # a query of another one would create a context there
        free, total = torch.cuda.mem_get_info(index)
        values[f"gpu_{index}_memory_usage_percentage"] = (total - free) / total * 100
        values[f"gpu_{index}_memory_usage_megabytes"] = (total - free) / 1e6
        try:
            values[f"gpu_{index}_utilization_percentage"] = torch.cuda.utilization(index)
            values[f"gpu_{index}_power_usage_watts"] = torch.cuda.power_draw(index) / 1000
        except Exception:
            continue  # without pynvml, or where the card or the container does not provide them
    return values
