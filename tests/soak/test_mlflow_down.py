"""Seconds an epoch takes while the MLflow server answers, while it is down, and where nothing follows the run."""

import itertools
import socket
import statistics
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from paml.tracking import read_journal
from tests.helpers.jobs import environment, prepare_scenes, tiny_options, train_job, write_scenes
from tests.tracking.conftest import MlflowServer

PHASES, EPOCHS = 8, 5  # the server answers and is down by turns, so many epochs each time


class Door:
    """A port before the server's that can be shut: connections are then refused, as where the server is dead."""

    def __init__(self, port: int) -> None:
        self._behind = port
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []

    def open(self) -> None:
        """Let connections through from now on."""
        listener = socket.create_server(("127.0.0.1", self.port))
        self._listener = listener
        threading.Thread(target=self._listen, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        """Refuse new connections and cut those that stand."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def _listen(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._behind))
            except OSError:
                return
            self._open += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    found = MlflowServer(tmp_path)
    found.start()
    yield found
    found.kill()


def epoch_ends(run: Path) -> list[float]:
    """When each epoch's figures were written, seconds."""
    events = [event for event in read_journal(str(run)) if event.kind == "metric" and event.key == "train/loss"]
    return [event.time_ms / 1e3 for event in sorted(events, key=lambda event: event.step)]


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_epochs_take_no_longer_while_the_server_is_down(server: MlflowServer, tmp_path: Path):
    data = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data")
    runs, door = tmp_path / "runs", Door(server.port)
    env = environment(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{door.port}")
    seconds: dict[str, list[float]] = {"answers": [], "is down": [], "is not there": []}
    alone = {"epochs": PHASES * EPOCHS // 4 + 1}

    def run_alone(name: str) -> None:
        assert train_job(tiny_options(data, runs, name, **alone), tmp_path / f"{name}.log").wait() == 0
        seconds["is not there"] += [b - a for a, b in itertools.pairwise(epoch_ends(runs / name))]

    run_alone("before")
    door.open()
    options = tiny_options(data, runs, "followed", run__mlflow="true", epochs=PHASES * EPOCHS + 1)
    job = train_job(options, tmp_path / "job.log", env=env)
    shut = False
    for phase in range(PHASES):
        job.until(lambda phase=phase: len(epoch_ends(runs / "followed")) > phase * EPOCHS, f"phase {phase}")
        if shut != bool(phase % 2):
            shut = not shut
            (door.shut if shut else door.open)()
    assert job.wait() == 0, job.output
    door.shut()
    run_alone("after")
    ends = epoch_ends(runs / "followed")
    for place, (a, b) in enumerate(itertools.pairwise(ends)):
        if place % EPOCHS:  # the epoch in which the door moves belongs to neither
            seconds["is down" if place // EPOCHS % 2 else "answers"].append(b - a)

    median = {name: statistics.median(found) for name, found in seconds.items()}
    for name, found in seconds.items():
        print(f"the server {name:<12} {len(found):>3} epochs, median {median[name]:.3f} s, worst {max(found):.3f} s")
    print(f"down / answers {median['is down'] / median['answers']:.3f}", end=", ")
    print(f"down / not there {median['is down'] / median['is not there']:.3f}")
    assert median["is down"] <= 1.05 * median["answers"]
