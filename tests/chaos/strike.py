"""One training under a schedule of faults: strike, let it go on by itself or by the same command, and judge the end."""

import collections
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
from paml.tracking import replay
from paml.training.checkpoint import committed, read_checkpoint
from tests.chaos.schedule import Fault
from tests.helpers.fault_proxy import FaultProxy, FaultyS3, faulty_s3
from tests.helpers.jobs import WORKER, Job, environment, gone, kill, named
from tests.helpers.kills import OwnRay, differing, final_tensors, hard_options
from tests.tracking.conftest import MlflowServer, differences

JOB = str(Path(__file__).with_name("job.py"))
EVERY = 3
"""Steps of the optimiser between checkpoints within an epoch."""
STEPS_AN_EPOCH = 10
LIMIT_SECONDS = 30.0
"""workers.collective_timeout_seconds."""
PATIENCE_SECONDS = 300.0
"""A run that is no further after this is said not to have gone on."""
FAKETIME = str(Path(libfaketime.__file__).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1")
"""Lets a process's clock jump; the machine's own is never touched. Built for x86-64 Linux: elsewhere no clock jumps."""
RAY_NAMES = {"controller": "ray::TrainController", "console": "ray::Console"}


@dataclasses.dataclass
class Struck:
    """One fault and what it cost."""

    fault: Fault
    form: str
    missed: bool = False
    """No such process at that moment."""
    done: int = 0
    """Steps computed when it struck."""
    newest: int = 0
    """Newest checkpoint then."""
    at: float = 0.0
    seconds: float | None = None
    """Until a checkpoint newer than the newest; None where the next fault struck before."""
    lost: int = 0
    """Steps computed again."""
    commands: int = 0
    """How often the same command had to be given again."""
    stuck: bool = False


class Surroundings:
    """What trainings live in: a tracking server and a bucket behind proxies, and where it is wanted a Ray."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = contextlib.ExitStack()
        self.ray: OwnRay | None = None
        self.mlflow = MlflowServer(folder)
        os.environ["PAML_CHAOS"] = str(folder)
        os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "10"  # noqa: SIM112 (Ray's own name, and its 60 s say nothing)

    def __enter__(self) -> "Surroundings":
        self.mlflow.start()
        self.tracking = FaultProxy(self.mlflow.uri)
        self.tracking.plan.share = 0.0
        self._stack.callback(self.tracking.close)
        self._stack.callback(self.mlflow.kill)
        self.s3: FaultyS3 = self._stack.enter_context(faulty_s3(share=0.0))
        self.bucket = self.s3.make_bucket("chaos")
        os.environ.update(self.s3.environment | {"AWS_ENDPOINT_URL_S3": self.s3.direct})
        return self

    def __exit__(self, *error: object) -> None:
        if self.ray is not None:
            self.ray.stop()
        self._stack.close()

    def start_ray(self) -> None:
        """Up; tried again where the machine is so busy that Ray gives up."""
        self.ray = self.ray or OwnRay()
        for attempt in range(3):
            try:
                return self.ray.start()
            except RuntimeError:
                if attempt == 2:
                    raise

    def ray_alive(self) -> bool:
        """Whether GCS and raylet are there."""
        if self.ray is None:
            return False
        try:
            lines = [" ".join(process.cmdline()) for process in self.ray.processes()]
        except (AssertionError, psutil.Error):
            return False
        return all(any(part in line for line in lines) for part in ("gcs_server", "raylet/raylet"))


class Training:
    """A training of one form, its trace, and whoever gives its command again."""

    def __init__(self, around: Surroundings, form: str, data: Path, name: str, epochs: int) -> None:
        self.around, self.form, self.name = around, form, name
        self.runs = around.bucket if form == "ray-s3" else str(around.folder / "disk")
        self.run_folder = storage.join(self.runs, name)
        self.trace_folder = around.folder / f"traced-{name}"
        for part in ("orders", "trace"):
            (self.trace_folder / part).mkdir(parents=True)
        self.clock = self.trace_folder / "clock"
        self.clock.write_text("+0")
        self.clock_jumps = False
        """Whether the command is given so that its clock can jump. libfaketime reads the environment in any thread that
        asks the time, while Python writes it in another: sooner or later that ends the process."""
        self.job: Job | None = None
        self.launches = 0
        self.lines: list[dict] = []
        self._read: dict[Path, int] = {}
        self.epochs = epochs
        self._data = data

    def options(self) -> list[str]:
        """The command's, without --run.resume."""
        workers = 0 if self.form == "plain" else 2
        options = hard_options(self._data, Path("unused"), self.name, workers, self.epochs)
        options[options.index("--run.storage") + 1] = self.runs
        options[options.index("--run.mlflow") + 1] = "true"
        return [*options, "--workers.collective_timeout_seconds", str(LIMIT_SECONDS)]

    def start(self) -> None:
        """Give the command, with --run.resume true where the run has begun."""
        if self.form != "plain" and not self.around.ray_alive():
            if self.around.ray is not None:
                with contextlib.suppress(AssertionError):
                    self.around.ray.kill()
            self.around.start_ray()
        own = {
            "PAML_CHAOS": str(self.trace_folder),
            "PAML_CHAOS_FORM": self.form,
            "MLFLOW_TRACKING_URI": self.around.tracking.endpoint,
        }
        env = environment(**(self.around.s3.environment | own))
        if self.form != "plain" and self.around.ray is not None:
            env = {**self.around.ray.environment, **env, "RAY_ADDRESS": self.around.ray.environment["RAY_ADDRESS"]}
        if self.clock_jumps:
            env |= {
                "LD_PRELOAD": FAKETIME,
                "FAKETIME_TIMESTAMP_FILE": str(self.clock),
                "FAKETIME_CACHE_DURATION": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "FAKETIME_FORCE_MONOTONIC_FIX": "0",  # else every wait for Python's lock turns without end
            }
        begun = storage.exists(storage.join(self.run_folder, "run.json"))
        command = [sys.executable, JOB, *self.options(), *(["--run.resume", "true"] if begun else [])]
        self.job = Job(command, self.trace_folder / f"{self.launches:03d}.log", env=env)
        self.launches += 1

    def ended(self) -> int | None:
        """Exit status of the command, if it has ended."""
        assert self.job is not None
        return self.job.process.poll()

    @property
    def done(self) -> int:
        """Steps of the optimiser that the trace shows."""
        for path in (self.trace_folder / "trace").glob("*.jsonl"):
            with path.open() as file:
                file.seek(self._read.get(path, 0))
                while (text := file.readline()).endswith("\n"):
                    line = json.loads(text)
                    self.lines.append(line | {"pid": int(path.name.split("-")[0])})
                    self._read[path] = file.tell()
        return max((line["done"] for line in self.lines), default=0)

    def newest(self) -> int:
        """Steps of the newest committed checkpoint."""
        names = committed(self.run_folder)
        return int(names[-1].removeprefix("step-")) if names else 0

    def find(self, target: str, seconds: float = 30.0) -> psutil.Process | None:
        """The process of a target; None where there is none within some seconds."""
        assert self.job is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.ended() is None:
            with contextlib.suppress(psutil.Error, AssertionError):
                if target in ("job", "driver"):
                    return psutil.Process(self.job.process.pid)
                assert self.around.ray is not None
                processes = self.around.ray.processes()
                if target in ("GCS", "raylet"):
                    part = {"GCS": "gcs_server", "raylet": "raylet/raylet"}[target]
                    return next(each for each in processes if part in each.cmdline()[0])
                if target.startswith("rank"):
                    found = self._rank(int(target.split()[1]), named(processes, WORKER))
                else:
                    found = next(iter(named(processes, RAY_NAMES[target])[-1:]), None)
                if found is not None:
                    return found
            time.sleep(0.05)
        return None

    def _rank(self, rank: int, workers: list[psutil.Process]) -> psutil.Process | None:
        """By the trace, else any of two that have just started."""
        _ = self.done
        traced = [line["pid"] for line in self.lines if line["rank"] == rank][-1:]
        known = [process for process in workers if process.pid in traced]
        return known[0] if known else (workers[-2:][rank] if len(workers[-2:]) > rank else None)


class Operator:
    """Strikes a training, and gives its command again where it has ended."""

    def __init__(self, training: Training, say: Callable[[str], None]) -> None:
        self.training, self.say = training, say
        self.struck: list[Struck] = []
        self._open: list[Struck] = []
        self._ballast: Path | None = None

    def run(self, faults: list[Fault]) -> None:
        """All faults in order, then on to the end."""
        training = self.training
        training.start()
        for fault in faults:
            if fault.instant == "recovery":
                end = time.monotonic() + fault.delay
                self._tend(lambda end=end: time.monotonic() > end)
            else:
                self._recover()
                self._tend(lambda fault=fault: training.done >= fault.after_step)
                if fault.instant == "checkpoint":
                    self._until_write()
                time.sleep(fault.delay)
            if training.ended() == 0:
                break
            done = Struck(fault, training.form, done=training.done, newest=training.newest(), at=time.monotonic())
            self.struck.append(done)
            self._open.append(done)
            done.missed = not self._strike(fault)
            done.newest = max(done.newest, training.newest())  # an order is obeyed a step later
            self.say(f"{training.form} {fault.number}: {fault.kind} of {fault.target} at step {done.done}"
                     + (" (missed)" if done.missed else ""))  # fmt: skip
        self._recover()
        self._tend(lambda: training.ended() == 0, patience=3 * PATIENCE_SECONDS)

    def _tend(self, until: Callable[[], object], patience: float = PATIENCE_SECONDS) -> bool:
        """Wait for something; meanwhile give the command again where it has ended badly. False where it never came."""
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
        """Until a checkpoint is newer than the newest when the open faults struck."""
        if not self._open:
            return
        training, newest = self.training, max(each.newest for each in self._open)
        came = self._tend(lambda: training.newest() > newest or training.ended() == 0)
        for each in self._open:
            if each is self._open[-1] and came:
                each.seconds = time.monotonic() - each.at
            each.stuck = not came
        if not came:
            self.say(f"NOT GONE ON: {self._open[-1]}")
            assert training.job is not None
            with contextlib.suppress(psutil.Error):
                training.job.kill()
        self._open.clear()

    def _until_write(self) -> None:
        """Until a checkpoint is being written."""
        training, seen = self.training, len(self.training.around.s3.proxy.seen)

        def writing() -> bool:
            if training.form == "ray-s3":
                new = training.around.s3.proxy.seen[seen:]
                return any(each.method == "PUT" and "/checkpoints/step-" in each.path for each in new)
            folders = Path(training.run_folder, "checkpoints").glob("step-*")
            return any(not (folder / "COMMIT").exists() for folder in folders)

        end = time.monotonic() + 30
        while not writing() and training.ended() is None and time.monotonic() < end:
            time.sleep(0.002)

    # What strikes. Each returns whether there was anything to strike.

    def _strike(self, fault: Fault) -> bool:
        kind = fault.kind
        if kind == "SIGKILL of Ray" and fault.target == "all of Ray":
            assert self.training.around.ray is not None
            for process in self.training.around.ray.processes():
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
            "dead-locked collective": "deadlock-step",
        }
        if kind in orders:
            order, place = orders[kind].split("-")
            rank = int(fault.target.split()[1]) if fault.target.startswith("rank") else 0
            path = self.training.trace_folder / "orders" / f"{rank}-{place}"
            path.write_text(order)
            return self._tend(lambda: not path.exists(), 120)
        process = self.training.find(fault.target)
        if process is None:
            return False
        try:
            self._strike_process(fault, process)
        except psutil.NoSuchProcess:
            return False
        return True

    def _strike_process(self, fault: Fault, process: psutil.Process) -> None:
        if fault.kind.startswith("SIGKILL"):
            process.kill()
        elif fault.kind == "SIGTERM":
            process.terminate()
        elif fault.kind == "SIGSTOP, SIGCONT":
            process.suspend()
            time.sleep(0.5 + 4 * fault.draw)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        elif fault.kind == "SIGSTOP for ever":
            process.suspend()
            if fault.target == "job":  # nobody watches a single process but the people who have started it
                time.sleep(3)
                process.kill()
        elif fault.kind == "out of memory":
            hard = process.rlimit(resource.RLIMIT_AS)[1]
            process.rlimit(resource.RLIMIT_AS, (process.memory_info().vms // 2, hard))  # nothing more is granted
        elif fault.kind == "file size limit":
            hard = process.rlimit(resource.RLIMIT_FSIZE)[1]
            process.rlimit(resource.RLIMIT_FSIZE, (int(1 + 50_000 * fault.draw), hard))
        else:
            raise AssertionError(fault.kind)

    def _damage(self, fault: Fault) -> bool:
        """Between two runs: the newest checkpoint's file changed or cut."""
        training, rng = self.training, random.Random(fault.draw)
        assert training.job is not None
        old = [psutil.Process(training.job.process.pid)] if training.ended() is None else []
        left = (
            named(training.around.ray.processes(), WORKER) if training.around.ray and training.form != "plain" else []
        )
        for process in old:
            kill(process)
        training.job.process.wait(30)
        gone(left, 60)
        names = committed(training.run_folder)
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
        """Not a byte left where the run writes, until something has failed."""
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
        proxy.plan.kinds = random.Random(fault.draw).choice((("reset",), ("silence",), ("internal_error", "slow_down")))
        proxy.plan.max_in_a_row, proxy.plan.silence_seconds, proxy.plan.share = None, 10.0, 1.0
        time.sleep(0.5 + longest * fault.draw)
        proxy.plan.share = 0.0
        return True

    def _cut_network(self, fault: Fault) -> bool:
        return self._cut(self.training.around.s3.proxy, fault, 12.0)

    def _cut_tracking(self, fault: Fault) -> bool:
        return self._cut(self.training.around.tracking, fault, 6.0)

    def _kill_tracking(self, fault: Fault) -> bool:
        self.training.around.mlflow.kill()
        time.sleep(4 * fault.draw)
        self.training.around.mlflow.start()
        return True

    def _jump(self, fault: Fault) -> bool:
        """The command is killed and given again, and its clock jumps once it computes."""
        training = self.training
        assert training.job is not None
        training.clock.write_text("+0")
        training.clock_jumps = True
        training.job.kill()
        training.start()
        done, newest = training.done, training.newest()
        found = self._tend(lambda: training.done > max(done, newest), 120)
        training.clock_jumps = False
        training.clock.write_text(f"{round((fault.draw - 0.5) * 20_000):+d}")
        time.sleep(1.2)
        return found


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int = 256) -> Iterator[bool]:
    """A file system of its own at `folder`; False where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


def lost_steps(training: Training, struck: list[Struck]) -> None:
    """Note in each fault how many steps the first worker computed again after it."""
    _ = training.done
    first = sorted((line for line in training.lines if line["rank"] == 0), key=lambda line: line["time"])
    before, pid = 0, None
    for line in first:
        if pid is not None and line["pid"] != pid:
            causes = [each for each in struck if each.at <= line["time"]]
            if causes:
                causes[-1].lost = max(causes[-1].lost, before - (line["done"] - 1))
        before, pid = max(before, line["done"]), line["pid"]


def faults_of_samples(training: Training, images: int) -> list[str]:
    """Epochs in which an image did not come exactly once, by the steps that the final weights are made of."""
    _ = training.done
    taken: dict[tuple[int, int, int], list[int]] = {}
    wrong = []
    for line in training.lines:
        place = line["epoch"], line["step"], line["rank"]
        if taken.setdefault(place, line["images"]) != line["images"]:
            wrong.append(f"epoch {place[0]}, step {place[1]}, rank {place[2]} came with other images the second time")
    by_epoch = collections.defaultdict(list)
    for (epoch, _, _), found in taken.items():
        by_epoch[epoch] += found
    for epoch in range(1, training.epochs + 1):
        counts = collections.Counter(by_epoch[epoch])
        if len(counts) != images or set(counts.values()) != {1}:
            wrong.append(
                f"epoch {epoch}: {len(counts)} of {images} images, most {max(counts.values(), default=0)} times"
            )
    return wrong


def orphans(training: Training) -> list[str]:
    """What a killed write has left in the run's storage."""
    found = []
    names = {name.split("/")[0] for name in storage.list_files(storage.join(training.run_folder, "checkpoints"))}
    for name in sorted(names):
        try:
            read_checkpoint(training.run_folder, name)
        except Exception as error:
            found.append(str(error))
    if len(names) > 4:
        found.append(f"{len(names)} checkpoints are kept")
    if not storage.is_remote(training.run_folder):
        found += [str(path) for path in Path(training.run_folder).rglob("*.paml-tmp")]
    return found


def left_processes(mark: str, seconds: float = 30.0) -> list[str]:
    """Processes whose environment names our folder."""
    end = time.monotonic() + seconds
    while True:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get("PAML_CHAOS") == mark:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.5)


def verdict(training: Training, whole: dict, images: int) -> dict[str, list[str]]:
    """What is wrong at the end, by what was promised; all lists empty where nothing is."""
    replay(training.run_folder, training.around.mlflow.uri)
    return {
        "weights differ": differing(whole, final_tensors(training.run_folder)),  # pyright: ignore[reportArgumentType]
        "images not exactly once": faults_of_samples(training, images),
        "journal and MLflow differ": differences(training.run_folder, training.around.mlflow.uri),
        "orphans": orphans(training),
        "ended": [] if training.ended() == 0 else [f"status {training.ended()}"],
    }
