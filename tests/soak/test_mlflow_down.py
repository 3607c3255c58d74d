"""Duration of an epoch while the MLflow server answers, while it is down, and without a tracker."""

import itertools
import socket
import statistics
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from paml.runs.journal import read_journal
from tests.helpers.jobs import environment, prepare_scenes, tiny_options, train_job, write_scenes
from tests.tracking.conftest import MlflowServer

PHASES, EPOCHS = 8, 5  # the server alternates between up and down, for so many epochs each


class Gate:
    """A port in front of the server that can refuse connections, as if the server were dead."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._listener: socket.socket | None = None
        self._connections: list[socket.socket] = []

    def open(self) -> None:
        """Accept connections."""
        listener = socket.create_server(("127.0.0.1", self.port))
        self._listener = listener
        threading.Thread(target=self._listen, args=(listener,), daemon=True).start()

    def close(self) -> None:
        """Refuse new connections and close existing ones."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for each in self._connections:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._connections.clear()

    def _listen(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._server_port))
            except OSError:
                return
            self._connections += [near, far]
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
    running = MlflowServer(tmp_path)
    running.start()
    yield running
    running.kill()


def epoch_ends(run: Path) -> list[float]:
    """Times at which the metrics of each epoch were written, in seconds."""
    events = [event for event in read_journal(str(run)) if event.kind == "metric" and event.key == "train/loss"]
    return [event.time_ms / 1e3 for event in sorted(events, key=lambda event: event.step)]


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_epochs_take_no_longer_while_the_server_is_down(server: MlflowServer, tmp_path: Path):
    data = prepare_scenes(write_scenes(tmp_path / "scenes"), tmp_path / "data")
    runs, gate = tmp_path / "runs", Gate(server.port)
    env = environment(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{gate.port}")
    seconds: dict[str, list[float]] = {"answers": [], "is down": [], "is not used": []}
    alone = {"epochs": PHASES * EPOCHS // 4 + 1}

    def run_alone(name: str) -> None:
        assert train_job(tiny_options(data, runs, name, **alone), tmp_path / f"{name}.log").wait() == 0
        seconds["is not used"] += [b - a for a, b in itertools.pairwise(epoch_ends(runs / name))]

    run_alone("before")
    gate.open()
    options = tiny_options(data, runs, "tracked", run__trackers='["mlflow"]', epochs=PHASES * EPOCHS + 1)
    job = train_job(options, tmp_path / "job.log", env=env)
    shut = False
    for phase in range(PHASES):
        job.until(lambda phase=phase: len(epoch_ends(runs / "tracked")) > phase * EPOCHS, f"phase {phase}")
        if shut != bool(phase % 2):
            shut = not shut
            (gate.close if shut else gate.open)()
    assert job.wait() == 0, job.output
    gate.close()
    run_alone("after")
    ends = epoch_ends(runs / "tracked")
    for epoch, (a, b) in enumerate(itertools.pairwise(ends)):
        if epoch % EPOCHS:  # the epoch in which the gate changes counts for neither
            seconds["is down" if epoch // EPOCHS % 2 else "answers"].append(b - a)

    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"the server {name:<12} {len(values):>3} epochs, median {median[name]:.3f} s, worst {max(values):.3f} s")
    print(f"down / answers {median['is down'] / median['answers']:.3f}", end=", ")
    print(f"down / not used {median['is down'] / median['is not used']:.3f}")
    assert median["is down"] <= 1.05 * median["answers"]
