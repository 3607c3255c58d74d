"""One training under a schedule of faults: inject one, let the run recover or repeat its command, continue."""

import contextlib
import dataclasses
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import libfaketime
import psutil

from paml import storage
from paml.training.checkpoint import list_checkpoints
from tests.chaos.schedule import Fault
from tests.helpers.fault_proxy import FaultProxy, FaultyS3, faulty_s3
from tests.helpers.jobs import WORKER, Job, environment, kill, processes_named, survivors
from tests.helpers.kills import OwnRay, hard_options
from tests.tracking.conftest import MlflowServer

JOB = str(Path(__file__).with_name("job.py"))
CHECKPOINT_STEPS = 3
"""Optimizer steps between checkpoints in an epoch."""
STEPS_PER_EPOCH = 10
LIMIT_SECONDS = 30.0
"""workers.collective_timeout_seconds."""
PATIENCE_SECONDS = 300.0
"""A run without progress for this long counts as stuck."""
FAKETIME = str(Path(libfaketime.__file__).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1")
"""Makes the clock of one process jump. Built for x86-64 Linux: there are no clock jumps elsewhere."""
RAY_NAMES = {"controller": "ray::TrainController", "console": "ray::Console"}


@dataclasses.dataclass
class InjectedFault:
    """A fault and its cost."""

    fault: Fault
    form: str
    no_target: bool = False
    """There was no such process."""
    done: int = 0
    """Steps done when it was injected."""
    newest: int = 0
    """Newest checkpoint at that moment."""
    at: float = 0.0
    seconds: float | None = None
    """Time until a newer checkpoint; None if the next fault came first."""
    lost: int = 0
    """Steps that were repeated."""
    commands: int = 0
    """How often the command had to be repeated."""
    stuck: bool = False


class Services:
    """Services of the trainings: a tracking server and a bucket behind proxies, and a Ray if needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = contextlib.ExitStack()
        self.ray: OwnRay | None = None
        self.mlflow = MlflowServer(folder)
        os.environ["PAML_CHAOS"] = str(folder)
        os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "10"  # noqa: SIM112 (Ray's name)

    def __enter__(self) -> "Services":
        self.mlflow.start()
        self.tracking = FaultProxy(self.mlflow.uri)
        self.tracking.plan.fraction = 0.0
        self._stack.callback(self.tracking.close)
        self._stack.callback(self.mlflow.kill)
        self.s3: FaultyS3 = self._stack.enter_context(faulty_s3(fraction=0.0))
        self.bucket = self.s3.make_bucket("chaos")
        os.environ.update(self.s3.environment | {"AWS_ENDPOINT_URL_S3": self.s3.direct})
        return self

    def __exit__(self, *error: object) -> None:
        if self.ray is not None:
            self.ray.stop()
        self._stack.close()

    def start_ray(self) -> None:
        """Start Ray; retried because Ray gives up on a busy machine."""
        self.ray = self.ray or OwnRay()
        for attempt in range(3):
            try:
                return self.ray.start()
            except RuntimeError:
                if attempt == 2:
                    raise

    def ray_alive(self) -> bool:
        """Whether GCS and raylet run."""
        if self.ray is None:
            return False
        try:
            lines = [" ".join(process.cmdline()) for process in self.ray.processes()]
        except (AssertionError, psutil.Error):
            return False
        return all(any(part in line for line in lines) for part in ("gcs_server", "raylet/raylet"))


class Training:
    """A training of one form, and its trace."""

    def __init__(self, services: Services, form: str, data: Path, name: str, epochs: int) -> None:
        self.services, self.form, self.name = services, form, name
        self.runs = services.bucket if form == "ray-s3" else str(services.folder / "disk")
        self.run_folder = storage.join(self.runs, name)
        self.trace_folder = services.folder / f"traced-{name}"
        for part in ("orders", "trace"):
            (self.trace_folder / part).mkdir(parents=True)
        self.clock = self.trace_folder / "clock"
        self.clock.write_text("+0")
        self.clock_jumps = False
        """Whether the next command loads libfaketime. It reads the environment in any thread, which crashes the process
        if Python writes it in another."""
        self.job: Job | None = None
        self.launches = 0
        self.lines: list[dict] = []
        self._read: dict[Path, int] = {}
        self.epochs = epochs
        self._data = data

    def options(self) -> list[str]:
        """Options of the command, without --run.resume."""
        workers = 0 if self.form == "plain" else 2
        options = hard_options(self._data, Path("unused"), self.name, workers, self.epochs)
        options[options.index("--run.storage") + 1] = self.runs
        options[options.index("--run.trackers") + 1] = '["mlflow"]'
        return [*options, "--workers.collective_timeout_seconds", str(LIMIT_SECONDS)]

    def start(self) -> None:
        """Run the command, with --run.resume true if the run exists."""
        if self.form != "plain" and not self.services.ray_alive():
            if self.services.ray is not None:
                with contextlib.suppress(AssertionError):
                    self.services.ray.kill()
            self.services.start_ray()
        variables = {
            "PAML_CHAOS": str(self.trace_folder),
            "PAML_CHAOS_FORM": self.form,
            "MLFLOW_TRACKING_URI": self.services.tracking.endpoint,
        }
        env = environment(**(self.services.s3.environment | variables))
        if self.form != "plain" and self.services.ray is not None:
            env |= {name: value for name, value in self.services.ray.environment.items() if name.startswith("RAY_")}
        if self.clock_jumps:
            env |= {
                "LD_PRELOAD": FAKETIME,
                "FAKETIME_TIMESTAMP_FILE": str(self.clock),
                "FAKETIME_CACHE_DURATION": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "FAKETIME_FORCE_MONOTONIC_FIX": "0",  # else every wait for Python's lock spins forever
            }
        exists = storage.exists(storage.join(self.run_folder, "run.json"))
        command = [sys.executable, JOB, *self.options(), *(["--run.resume", "true"] if exists else [])]
        self.job = Job(command, self.trace_folder / f"{self.launches:03d}.log", env=env)
        self.launches += 1

    def ended(self) -> int | None:
        """Exit status of the command, or None while it runs."""
        assert self.job is not None
        return self.job.process.poll()

    @property
    def done(self) -> int:
        """Optimizer steps in the trace."""
        for path in (self.trace_folder / "trace").glob("*.jsonl"):
            with path.open() as file:
                file.seek(self._read.get(path, 0))
                while (text := file.readline()).endswith("\n"):
                    line = json.loads(text)
                    self.lines.append(line | {"pid": int(path.name.split("-")[0])})
                    self._read[path] = file.tell()
        return max((line["done"] for line in self.lines), default=0)

    def newest(self) -> int:
        """Optimizer steps of the newest committed checkpoint."""
        names = list_checkpoints(self.run_folder)
        return int(names[-1].removeprefix("step-")) if names else 0

    def find_process(self, target: str, seconds: float = 30.0) -> psutil.Process | None:
        """The process of a target; None if there is none within some seconds."""
        assert self.job is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.ended() is None:
            with contextlib.suppress(psutil.Error, AssertionError):
                if target in ("job", "driver"):
                    return psutil.Process(self.job.process.pid)
                assert self.services.ray is not None
                processes = self.services.ray.processes()
                if target in ("GCS", "raylet"):
                    part = {"GCS": "gcs_server", "raylet": "raylet/raylet"}[target]
                    return next(each for each in processes if part in each.cmdline()[0])
                if target.startswith("rank"):
                    found = self._rank(int(target.split()[1]), processes_named(processes, WORKER))
                else:
                    found = next(iter(processes_named(processes, RAY_NAMES[target])[-1:]), None)
                if found is not None:
                    return found
            time.sleep(0.05)
        return None

    def _rank(self, rank: int, workers: list[psutil.Process]) -> psutil.Process | None:
        """The worker of a rank by the trace, else one of two that have just started."""
        _ = self.done
        traced = [line["pid"] for line in self.lines if line["rank"] == rank][-1:]
        known = [process for process in workers if process.pid in traced]
        return known[0] if known else (workers[-2:][rank] if len(workers[-2:]) > rank else None)


class FaultInjector:
    """Injects faults into a training, and repeats its command if it has ended."""

    def __init__(self, training: Training, log: Callable[[str], None]) -> None:
        self.training, self.log = training, log
        self.injected: list[InjectedFault] = []
        self._open: list[InjectedFault] = []
        self._ballast: Path | None = None

    def run(self, faults: list[Fault]) -> None:
        """Inject all faults in order, then train to the end."""
        training = self.training
        training.start()
        for fault in faults:
            if fault.instant == "recovery":
                end = time.monotonic() + fault.delay
                self._wait_until(lambda end=end: time.monotonic() > end)
            else:
                self._recover()
                self._wait_until(lambda fault=fault: training.done >= fault.after_step)
                if fault.instant == "checkpoint":
                    self._until_write()
                time.sleep(fault.delay)
            if training.ended() == 0:
                break
            done = InjectedFault(
                fault, training.form, done=training.done, newest=training.newest(), at=time.monotonic()
            )
            self.injected.append(done)
            self._open.append(done)
            done.no_target = not self._inject(fault)
            done.newest = max(done.newest, training.newest())  # an order is executed a step later
            self.log(f"{training.form} {fault.number}: {fault.kind} of {fault.target} at step {done.done}"
                     + (" (no_target)" if done.no_target else ""))  # fmt: skip
        self._recover()
        self._wait_until(lambda: training.ended() == 0, patience=3 * PATIENCE_SECONDS)

    def _wait_until(self, until: Callable[[], object], patience: float = PATIENCE_SECONDS) -> bool:
        """Wait for a condition, and repeat the command whenever it fails. False if the condition never became true."""
        training, end = self.training, time.monotonic() + patience
        while not until() and time.monotonic() < end:
            status = training.ended()
            if status == 0:
                return bool(until())
            if status is not None:
                for each in self._open[-1:]:
                    each.commands += 1
                training.start()
            time.sleep(0.02 if training.form != "ray-s3" else 0.1)
        return bool(until())

    def _recover(self) -> None:
        """Wait for a checkpoint newer than those at the open faults."""
        if not self._open:
            return
        training, newest = self.training, max(each.newest for each in self._open)
        came = self._wait_until(lambda: training.newest() > newest or training.ended() == 0)
        for each in self._open:
            if each is self._open[-1] and came:
                each.seconds = time.monotonic() - each.at
            each.stuck = not came
        if not came:
            self.log(f"STUCK: {self._open[-1]}")
            assert training.job is not None
            with contextlib.suppress(psutil.Error):
                training.job.kill()
        self._open.clear()

    def _until_write(self) -> None:
        """Wait until a checkpoint is being written."""
        training, seen = self.training, len(self.training.services.s3.proxy.seen)

        def writing() -> bool:
            if training.form == "ray-s3":
                new = training.services.s3.proxy.seen[seen:]
                return any(each.method == "PUT" and "/checkpoints/step-" in each.path for each in new)
            folders = Path(training.run_folder, "checkpoints").glob("step-*")
            return any(not (folder / "COMMIT").exists() for folder in folders)

        end = time.monotonic() + 30
        while not writing() and training.ended() is None and time.monotonic() < end:
            time.sleep(0.002)

    # The faults. Each returns whether there was a target.

    def _inject(self, fault: Fault) -> bool:
        kind = fault.kind
        if kind == "SIGKILL of Ray" and fault.target == "all of Ray":
            assert self.training.services.ray is not None
            for process in self.training.services.ray.processes():
                kill(process)
            return True
        if kind in ("checkpoint damaged", "disk full", "network cut", "tracking cut", "tracking killed", "clock jump"):
            return {
                "checkpoint damaged": self._damage,
                "disk full": self._fill_disk,
                "network cut": self._cut_network,
                "tracking cut": self._cut_tracking,
                "tracking killed": self._kill_tracking,
                "clock jump": self._jump,
            }[kind](fault)
        orders = {
            "exception": "exception-step",
            "failing allocation": "allocation-step",
            "hang in a step": "hang-step",
            "hang in the loader": "hang-loader",
            "deadlocked collective": "deadlock-step",
        }
        if kind in orders:
            order, place = orders[kind].split("-")
            rank = int(fault.target.split()[1]) if fault.target.startswith("rank") else 0
            path = self.training.trace_folder / "orders" / f"{rank}-{place}"
            path.write_text(order)
            return self._wait_until(lambda: not path.exists(), 120)
        process = self.training.find_process(fault.target)
        if process is None:
            return False
        try:
            self._inject_into_process(fault, process)
        except psutil.NoSuchProcess:
            return False
        return True

    def _inject_into_process(self, fault: Fault, process: psutil.Process) -> None:
        if fault.kind.startswith("SIGKILL"):
            process.kill()
        elif fault.kind == "SIGTERM":
            process.terminate()
        elif fault.kind == "SIGSTOP, SIGCONT":
            process.suspend()
            time.sleep(0.5 + 4 * fault.random_value)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        elif fault.kind == "SIGSTOP without SIGCONT":
            process.suspend()
            if fault.target == "job":  # only its user notices a single frozen process
                time.sleep(3)
                process.kill()
        elif fault.kind == "out of memory":
            hard = process.rlimit(resource.RLIMIT_AS)[1]
            process.rlimit(resource.RLIMIT_AS, (process.memory_info().vms // 2, hard))  # no further allocation succeeds
        elif fault.kind == "file size limit":
            hard = process.rlimit(resource.RLIMIT_FSIZE)[1]
            process.rlimit(resource.RLIMIT_FSIZE, (int(1 + 50_000 * fault.random_value), hard))
        else:
            raise AssertionError(fault.kind)

    def _damage(self, fault: Fault) -> bool:
        """Kill the run and change or truncate a file of its newest checkpoint."""
        training, rng = self.training, random.Random(fault.random_value)
        assert training.job is not None
        old = [psutil.Process(training.job.process.pid)] if training.ended() is None else []
        left = (
            processes_named(training.services.ray.processes(), WORKER)
            if training.services.ray and training.form != "plain"
            else []
        )
        for process in old:
            kill(process)
        training.job.process.wait(30)
        survivors(left, 60)
        names = list_checkpoints(training.run_folder)
        if not names:
            return False
        folder = storage.join(training.run_folder, "checkpoints", names[-1])
        path = storage.join(folder, rng.choice(storage.list_files(folder)))
        data = bytearray(storage.read_bytes(path))
        if rng.random() < 0.5 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            del data[rng.randrange(len(data) or 1) :]
        if storage.is_remote(path):
            storage.write_bytes(path, bytes(data))
        else:
            Path(path).write_bytes(data)
        return True

    def _fill_disk(self, fault: Fault) -> bool:
        """Fill the disk until something has failed."""
        training = self.training
        ballast, log = Path(training.runs, "ballast"), training.job.output.count("restart") if training.job else 0
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * (1 << 16))
        end = time.monotonic() + 12
        try:
            while training.ended() is None and time.monotonic() < end:
                if training.job and training.job.output.count("restart") > log:
                    break
                time.sleep(0.1)
        finally:
            ballast.unlink()
        return True

    def _cut(self, proxy: FaultProxy, fault: Fault, longest: float) -> bool:
        proxy.plan.kinds = random.Random(fault.random_value).choice(
            (("reset",), ("silence",), ("internal_error", "slow_down"))
        )
        proxy.plan.max_in_a_row, proxy.plan.silence_seconds, proxy.plan.fraction = None, 10.0, 1.0
        time.sleep(0.5 + longest * fault.random_value)
        proxy.plan.fraction = 0.0
        return True

    def _cut_network(self, fault: Fault) -> bool:
        return self._cut(self.training.services.s3.proxy, fault, 12.0)

    def _cut_tracking(self, fault: Fault) -> bool:
        return self._cut(self.training.services.tracking, fault, 6.0)

    def _kill_tracking(self, fault: Fault) -> bool:
        self.training.services.mlflow.kill()
        time.sleep(4 * fault.random_value)
        self.training.services.mlflow.start()
        return True

    def _jump(self, fault: Fault) -> bool:
        """Kill the command, repeat it, and make its clock jump once it computes."""
        training = self.training
        assert training.job is not None
        training.clock.write_text("+0")
        training.clock_jumps = True
        training.job.kill()
        training.start()
        done, newest = training.done, training.newest()
        found = self._wait_until(lambda: training.done > max(done, newest), 120)
        training.clock_jumps = False
        training.clock.write_text(f"{round((fault.random_value - 0.5) * 20_000):+d}")
        time.sleep(1.2)
        return found


@contextlib.contextmanager
def mounted_disk(folder: Path, megabytes: int = 256) -> Iterator[bool]:
    """Mount a file system at `folder`; yields False if mounting is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)
