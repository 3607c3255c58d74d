"""The journal of a run: immutable JSON segments under `<run>/journal/`, on local disk or S3.

Each call of `Journal` writes one segment, `<time in ns, 20 digits>-<writer>-<n>.json`, atomically, so several
writers (the driver, rank 0 of the workers) need no lock: a reader sees a segment whole or not at all. A CRC
in the segment finds bytes that changed later.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from paml import storage
from paml.errors import PamlError
from paml.reading import MISSHAPEN, parse_object

SCHEMA_VERSION = 1
STATUSES = ("RUNNING", "FINISHED", "FAILED", "KILLED")
END_STATUSES = STATUSES[1:]

CHARTS = "paml:charts"
"""Where a link of a note leads to: in MLflow's view of the run, the charts of the runs below it."""
CHARTS_LINK = f"[Their charts]({CHARTS}), one over the other."
_NOTE_TAG = "mlflow.note.content"
_SEGMENT = re.compile(r"\d{20}-[\w.]+-\d+\.json")
_KEY = re.compile(r"[\w. :/-]{1,250}", re.ASCII)
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


_SHAPES: dict[str, Any] = {
    "run": {"experiment": str, "name": str},
    "metric": float,
    "param": str,
    "tag": str,
    "dataset": {"digest": str, "source": str, "context": str, "profile": dict},
    "artifact": {"file": str, "sha256": str},
    "model": {"file": str, "files": dict},
    "status": str,
}
"""Kind of an event -> the type of its value, or the types of what its value names."""


class JournalError(PamlError, ValueError):
    """A segment of the journal that cannot be read, or an event that no journal can hold."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened in a run."""

    kind: str
    """run, metric, param, tag, dataset, artifact, model or status."""
    time_ms: int
    """When it happened, in milliseconds since 1970 (UTC)."""
    key: str = ""
    """Name of the metric, parameter, tag, dataset or model; path of the artifact; of a run, its identity."""
    value: Any = None
    """float of a metric, str of a parameter, tag and status, else a dict."""
    step: int = 0
    """Step of a metric."""


class Journal:
    """Writes events of a run. Safe to use from several threads, and beside other writers.

    Raises `paml.storage.StorageError` where the run's storage cannot be written.
    """

    def __init__(self, run_folder: str, writer: str):
        if not re.fullmatch(r"\w+", writer, re.ASCII):
            raise JournalError(f"journal writer {writer!r}: use letters, digits and _ only, such as 'rank0'")
        self.run_folder = str(run_folder)
        self.writer = f"{writer}.{secrets.token_hex(3)}"
        self._folder = storage.join(self.run_folder, "journal")
        self._lock = threading.Lock()
        self._count = 0
        # A restarted run may go on where the clock is behind: its events must still sort after the earlier.
        names = [name for name in storage.list_files(self._folder) if _SEGMENT.fullmatch(name)]
        self._last_ns = max((int(name[:20]) for name in names), default=0)

    def run(
        self, *, experiment: str, name: str, tags: Mapping[str, str] | None = None, note: str | None = None
    ) -> None:
        """Opens the run, or goes on with it: names it for MLflow and sets its status to RUNNING.

        `note` is Markdown shown at the head of the run's page. The driver calls this before any worker
        starts. The first call gives the run its names; later ones only set tags and status.
        """
        now = _now_ms()
        identity = {"experiment": experiment, "name": name}
        events = [
            Event(kind="run", time_ms=now, key=secrets.token_hex(16), value=identity),
            Event(kind="status", time_ms=now, value="RUNNING"),
        ]
        texts = dict(tags or {}) | ({_NOTE_TAG: note} if note is not None else {})
        self._write(events + [_text("tag", key, value, now) for key, value in texts.items()])

    def metrics(self, values: Mapping[str, float], step: int, time_ms: int | None = None) -> None:
        """Figures of one step. NaN and infinities are kept. A (key, step) that stands already keeps its
        first value: a replayed epoch changes nothing."""
        now = _now_ms() if time_ms is None else time_ms
        self.metric_rows((key, value, step, now) for key, value in values.items())

    def metric_rows(self, rows: Iterable[tuple[str, float, int, int]]) -> None:
        """Figures of several steps in one segment; rows of (key, value, step, time in ms)."""
        self._write(
            [
                Event(kind="metric", time_ms=int(at), key=_checked(key), value=float(value), step=int(step))
                for key, value, step, at in rows
            ]
        )

    def params(self, values: Mapping[str, Any], time_ms: int | None = None) -> None:
        """Parameters; nested mappings are flattened with dots. The first value of a key stands; another
        value given later (a resumed run with more workers) becomes the tag `resumed.<key>`."""
        now = _now_ms() if time_ms is None else time_ms
        self._write([_text("param", key, value, now) for key, value in flatten(values)])

    def settings(self, values: Mapping[str, Any]) -> None:
        """All settings of the run: whole as artifact `settings.yaml`, flat as parameters."""
        import yaml

        text = yaml.safe_dump(plain(values), sort_keys=False, allow_unicode=True)
        self.artifact_bytes(text.encode(), "settings.yaml")
        self.params(values)

    def tags(self, values: Mapping[str, Any]) -> None:
        """Tags; the last value of a key stands."""
        now = _now_ms()
        self._write([_text("tag", key, value, now) for key, value in values.items()])

    def note(self, text: str) -> None:
        """Markdown shown at the head of the run's page, in the stead of what stood there."""
        self.tags({_NOTE_TAG: text})

    def dataset(
        self,
        *,
        name: str,
        digest: str,
        source: str,
        context: str = "training",
        profile: Mapping[str, Any] | None = None,
    ) -> None:
        """Data that the run used: its digest, where it lies, and counts (`profile`)."""
        value = {"digest": digest, "source": source, "context": context, "profile": plain(profile or {})}
        self._write([Event(kind="dataset", time_ms=_now_ms(), key=_checked(name), value=value)])

    def artifact(self, path: str, artifact_path: str | None = None) -> None:
        """A file of the run. One outside the run folder is first copied to `<run>/artifacts/`.

        `artifact_path` is the file's whole path among the artifacts (default: its name). Logging the same
        path again replaces the file.
        """
        path = str(path)
        artifact_path = _artifact_path(artifact_path or path.replace("\\", "/").rsplit("/", 1)[-1])
        data = storage.read_bytes(path)
        inside = self.run_folder.rstrip("/") + "/"
        if path.startswith(inside):
            self._artifact(path[len(inside) :], artifact_path, data)
        else:
            self.artifact_bytes(data, artifact_path)

    def artifact_bytes(self, data: bytes, artifact_path: str) -> None:
        """As `artifact`, from memory."""
        artifact_path = _artifact_path(artifact_path)
        storage.write_bytes(storage.join(self.run_folder, "artifacts", artifact_path), data)
        self._artifact(f"artifacts/{artifact_path}", artifact_path, data)

    def _artifact(self, file: str, artifact_path: str, data: bytes) -> None:
        value = {"file": file, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self._write([Event(kind="artifact", time_ms=_now_ms(), key=artifact_path, value=value)])

    def model(self, folder: str, name: str = "final_model") -> None:
        """An MLflow model in a local folder (see `paml.tracking.model`); copied to `<run>/models/<name>/`."""
        _model_name(name)
        files = {}
        for file in storage.list_files(folder):
            data = storage.read_bytes(storage.join(folder, file))
            files[file] = hashlib.sha256(data).hexdigest()
            storage.write_bytes(storage.join(self.run_folder, "models", name, file), data)
        if "MLmodel" not in files:
            raise JournalError(f"{folder} is not an MLflow model: it holds no file MLmodel")
        self._write(
            [
                Event(
                    kind="model",
                    time_ms=_now_ms(),
                    key=name,
                    value={"file": f"models/{name}", "files": files},
                )
            ]
        )

    def status(self, status: str, time_ms: int | None = None) -> None:
        """RUNNING, FINISHED, FAILED or KILLED. The last one stands."""
        if status not in STATUSES:
            raise JournalError(f"status {status!r}: allowed are {', '.join(STATUSES)}")
        self._write([Event(kind="status", time_ms=_now_ms() if time_ms is None else time_ms, value=status)])

    def _write(self, events: list[Event]) -> None:
        if not events:
            return
        body = _encode(events)
        with self._lock:
            self._last_ns = max(time.time_ns(), self._last_ns + 1)
            self._count += 1
            name = f"{self._last_ns:020d}-{self.writer}-{self._count}.json"
        storage.write_bytes(storage.join(self._folder, name), body)


class JournalReader:
    """Follows a journal: each `poll` reads the segments that are new and merges them with the earlier."""

    def __init__(self, run_folder: str):
        self.run_folder = str(run_folder)
        self.unreadable: dict[str, str] = {}
        """Path of a segment -> what is wrong with it."""
        self._folder = storage.join(self.run_folder, "journal")
        self._read: set[str] = set()
        self._metrics: set[tuple[str, int]] = set()
        self._params: dict[str, str] = {}
        self._identity: Event | None = None

    @property
    def identity(self) -> Event | None:
        """The event that opened the run, or None where no driver has opened it."""
        return self._identity

    def poll(self) -> list[Event]:
        """New events in the order of their segments, repeated metrics and parameters taken out.

        Raises `paml.storage.StorageError` where the storage cannot be read; nothing is lost then, the next
        poll reads the same segments.
        """
        names = [name for name in storage.list_files(self._folder) if _SEGMENT.fullmatch(name)]
        new = sorted(set(names) - self._read)
        events: list[Event] = []
        for name, data in zip(new, self._contents(new), strict=True):
            self._read.add(name)
            try:
                segment = _decode(data)
            except MISSHAPEN as error:
                self.unreadable[storage.join(self._folder, name)] = str(error) or type(error).__name__
                continue
            events.extend(merged for event in segment if (merged := self._merge(event)) is not None)
        return events

    def _contents(self, names: list[str]) -> list[bytes]:
        def read(name: str) -> bytes:
            return storage.read_bytes(storage.join(self._folder, name))

        if len(names) < 8 or not storage.is_remote(self._folder):
            return [read(name) for name in names]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(read, names))

    def _merge(self, event: Event) -> Event | None:
        if event.kind == "metric":
            if (event.key, event.step) in self._metrics:
                return None
            self._metrics.add((event.key, event.step))
        elif event.kind == "param":
            if event.key in self._params:
                if self._params[event.key] == event.value:
                    return None
                key = f"resumed.{event.key}"[:250]
                return Event(kind="tag", time_ms=event.time_ms, key=key, value=event.value)
            self._params[event.key] = event.value
        elif event.kind == "run":
            if self._identity is not None:
                return None
            self._identity = event
        return event


def read_journal(run_folder: str, *, unreadable: dict[str, str] | None = None) -> list[Event]:
    """All events of a run in the order in which they were written, also where the clock has jumped since.

    Of metrics with the same (key, step), and of parameters, the first stands; of tags, datasets, artifacts
    and models the last; every status is given.

    Raises JournalError naming each segment that cannot be read, unless a dict `unreadable` is given to
    receive them: then the readable rest is returned.
    """
    reader = JournalReader(run_folder)
    events = latest(reader.poll())
    if reader.unreadable and unreadable is None:
        raise JournalError(f"{describe_unreadable(reader.unreadable)}. The rest of the journal can be read")
    if unreadable is not None:
        unreadable.update(reader.unreadable)
    return events


def latest(events: Iterable[Event]) -> list[Event]:
    """Leaves out tags, datasets, artifacts and models that a later event of the same key replaces."""
    last: dict[tuple[object, ...], Event] = {}
    for place, event in enumerate(events):
        if event.kind in ("tag", "artifact", "model"):
            key = event.kind, event.key
        elif event.kind == "dataset":
            key = event.kind, event.key, event.value["digest"], event.value["context"]
        else:
            key = event.kind, place
        last.pop(key, None)  # so that it stands where the later event does
        last[key] = event
    return list(last.values())


def describe_unreadable(unreadable: Mapping[str, str]) -> str:
    """One line that names the segments that cannot be read."""
    shown = [f"{path} ({reason})" for path, reason in list(unreadable.items())[:5]]
    more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    return f"{len(unreadable)} unreadable journal segment(s): {', '.join(shown)}{more}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as (key with dots, value)."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(value: Any) -> Any:
    """Only what JSON and YAML hold: other values become text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    return str(value)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _checked(key: str) -> str:
    parts = key.split("/")
    if not _KEY.fullmatch(key) or any(part in ("", ".", "..") for part in parts):
        raise JournalError(
            f"name {key!r}: MLflow takes 1 to 250 letters, digits and '_', '-', '.', ' ', ':', '/', "
            "with no empty part, '.' or '..' between slashes"
        )
    return key


def _model_name(name: str) -> None:
    if not re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII) or name in (".", ".."):
        raise JournalError(f"model name {name!r}: use letters, digits, '_', '-' and '.' only")


def _artifact_path(path: str) -> str:
    """The path itself. Raises JournalError where it may lie outside of the folder that it is relative to."""
    if not path or "\0" in path or path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
        raise JournalError(f"artifact path {path!r}: give a relative path without empty parts, '.' or '..'")
    return path


def _text(kind: str, key: str, value: Any, time_ms: int) -> Event:
    text = value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
    return Event(kind=kind, time_ms=time_ms, key=_checked(key), value=text)


def _encode(events: list[Event]) -> bytes:
    rows = []
    for event in events:
        row = {"kind": event.kind, "time_ms": event.time_ms, "key": event.key, "value": event.value}
        if event.kind == "metric":
            row["step"] = event.step
            if not math.isfinite(event.value):
                # JSON has no such numbers.
                row["value"] = next(text for text, value in _NOT_FINITE.items() if repr(value) == repr(event.value))
        rows.append(row)
    body = json.dumps(rows, ensure_ascii=False, allow_nan=False)
    crc = zlib.crc32(body.encode())
    return f'{{"schema_version": {SCHEMA_VERSION}, "crc32": {crc}, "events": {body}}}'.encode()


def _decode(data: bytes) -> list[Event]:
    content = parse_object(data)
    if content["schema_version"] != SCHEMA_VERSION:
        raise JournalError(
            f"schema version {content['schema_version']}, this paml reads {SCHEMA_VERSION}: use the paml that wrote it"
        )
    body = json.dumps(content["events"], ensure_ascii=False, allow_nan=False)
    if zlib.crc32(body.encode()) != content["crc32"]:
        raise JournalError("its CRC-32 does not match: bytes have changed since it was written")
    events = []
    for row in content["events"]:
        if row["kind"] == "metric":
            value = row["value"]
            row["value"] = _NOT_FINITE[value] if isinstance(value, str) else float(value)
        events.append(Event(**row))
        _check(events[-1])
    return events


def _check(event: Event) -> None:
    """Raises JournalError for an event that no `Journal` writes: what follows a journal relies on these shapes."""
    if type(event.time_ms) is not int or type(event.step) is not int or not isinstance(event.key, str):
        raise JournalError(f"an event {event.kind!r} whose time, step or key is none")
    if event.kind not in _SHAPES:
        raise JournalError(f"an event of the kind {event.kind!r}: allowed are {', '.join(_SHAPES)}")
    shape, value = _SHAPES[event.kind], event.value
    sound = isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in shape.items())
    if not (sound if isinstance(shape, dict) else isinstance(value, shape)):
        raise JournalError(f"an event {event.kind!r} whose value is of another shape")
    if event.kind in ("metric", "param", "tag", "dataset"):
        _checked(event.key)
    elif event.kind == "artifact":
        _artifact_path(event.key)
        _artifact_path(value["file"])
    elif event.kind == "model":
        _model_name(event.key)
        _artifact_path(value["file"])
        for file in value["files"]:
            _artifact_path(file)
    elif event.kind == "run" and not re.fullmatch(r"[\w.-]{1,250}", event.key, re.ASCII):
        raise JournalError(f"identity {event.key!r}: letters, digits, '_', '-' and '.' only")
    elif event.kind == "status" and value not in STATUSES:
        raise JournalError(f"status {value!r}: allowed are {', '.join(STATUSES)}")
