"""Samples the machine's load into the journal, under the names that MLflow's system metrics tab shows."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from paml.tracking.journal import Journal, read_journal

_SAMPLES_PER_SEGMENT = 6


class SystemSampler:
    """A thread that journals processor, memory, disk, network and GPU figures every `interval_s` seconds.

    GPU figures come through pynvml where it is installed, else its memory through torch where CUDA is in use.
    Steps count samples and go on where an earlier part of the run stopped.
    """

    def __init__(self, journal: Journal, interval_s: float = 10.0):
        if interval_s <= 0:
            raise ValueError(f"interval_s is {interval_s}: it must be above 0 seconds")
        self._journal = journal
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-sampler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Journals what has been sampled and stops."""
        self._stop.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        try:
            held = read_journal(self._journal.run_folder, unreadable={})
        except OSError:
            # Steps that stand already then keep their first value, which costs a few samples.
            held = []
        steps = [event.step for event in held if event.kind == "metric" and event.key.startswith("system/")]
        step = max(steps, default=-1) + 1
        sample = _sampler()
        rows: list[tuple[str, float, int, int]] = []
        stopped = False
        while not stopped:
            stopped = self._stop.wait(self._interval_s)
            now = time.time_ns() // 1_000_000
            rows += [(f"system/{key}", value, step, now) for key, value in sample().items()]
            step += 1
            if stopped or step % _SAMPLES_PER_SEGMENT == 0:
                try:
                    self._journal.metric_rows(rows)
                    rows = []
                except OSError:
                    # The run's own writes report a storage that is full or away; these rows wait for it.
                    continue


def _sampler() -> Any:
    import psutil

    start = psutil.net_io_counters()
    psutil.cpu_percent()
    gpus = _gpu_handles()

    def sample() -> dict[str, float]:
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
        for index, handle in enumerate(gpus):
            values |= {f"gpu_{index}_{key}": value for key, value in _gpu_figures(handle).items()}
        if not gpus:
            values |= _torch_figures()
        return {key: round(value, 1) for key, value in values.items()}

    return sample


def _gpu_handles() -> list[Any]:
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _gpu_figures(handle: Any) -> dict[str, float]:
    import pynvml  # pyright: ignore[reportMissingImports]

    values: dict[str, float] = {}
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        values["memory_usage_percentage"] = float(memory.used) / float(memory.total) * 100
        values["memory_usage_megabytes"] = float(memory.used) / 1e6
        values["utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
        watts = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
        values["power_usage_watts"] = watts
        values["power_usage_percentage"] = watts * 1e5 / pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)
    except pynvml.NVMLError:
        # Some cards and containers answer only part of these.
        return values
    return values


def _torch_figures() -> dict[str, float]:
    import sys

    torch = sys.modules.get("torch")
    # Asking earlier would itself start CUDA in this process.
    if torch is None or not torch.cuda.is_initialized():
        return {}
    values: dict[str, float] = {}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        values[f"gpu_{index}_memory_usage_percentage"] = (total - free) / total * 100
        values[f"gpu_{index}_memory_usage_megabytes"] = (total - free) / 1e6
    return values
