"""The journal of a run: immutable JSON segments in `<run>/journal/`, on local disk or S3.

Each call of `Journal` writes one segment atomically, `<time in ns, 20 digits>-<writer>-<n>.json`. Several writers (the
driver, rank 0 of the workers) therefore need no lock. A CRC-32 in the segment detects damage.
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
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from paml import storage
from paml.errors import PamlError
from paml.parsing import PARSE_ERRORS, parse_json_object
from paml.settings import flatten

SCHEMA_VERSION = 1
STATUSES = ("RUNNING", "FINISHED", "FAILED", "KILLED")
END_STATUSES = STATUSES[1:]

NOTE_TAG = "paml.note"
"""Tag of the Markdown shown at the top of a run's page."""
PARENT_TAG = "paml.parent"
"""Tag of a run that belongs to a comparison or sweep: the identity of that parent's journal."""
FINAL_MODEL = "final_model"
CHARTS = "paml:charts"
"""A link target in a note. Trackers replace it by the address of the charts of the child runs."""
CHARTS_LINK = f"[Charts of all runs]({CHARTS})"
_SEGMENT = re.compile(r"\d{20}-[\w.]+-\d+\.json")

_NAME, _IDENTIFIER, _PATH = r"[\w. :/-]{1,250}", r"[\w.-]{1,250}", r"[^\0]+"
_ALLOWED = {
    _NAME: "1 to 250 letters, digits and '_', '-', '.', ' ', ':', '/'",
    _IDENTIFIER: "1 to 250 letters, digits and '_', '-', '.'",
    _PATH: "a relative path",
}
_KINDS: dict[str, tuple[str, type, dict[str, type]]] = {
    "run": (_IDENTIFIER, dict, {"experiment": str, "name": str}),
    "metric": (_NAME, float, {}),
    "param": (_NAME, str, {}),
    "tag": (_NAME, str, {}),
    "dataset": (_NAME, dict, {"digest": str, "source": str, "context": str, "profile": dict}),
    "artifact": (_PATH, dict, {"file": str, "sha256": str}),
    "model": (_IDENTIFIER, dict, {"file": str, "files": dict}),
    "status": ("", str, {}),
}
"""Kind of an event -> pattern of its key, type of its value, and the types of the entries of a dict."""


class JournalError(PamlError, ValueError):
    """A journal segment that cannot be read, or an invalid event."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One entry of a journal. Raises JournalError for values that a reader could not rely on."""

    kind: str
    """run, metric, param, tag, dataset, artifact, model or status."""
    time_ms: int
    """Milliseconds since 1970 (UTC)."""
    key: str = ""
    """Name of the metric, parameter, tag, dataset or model; path of the artifact; identity of the run."""
    value: Any = None
    """float for a metric, str for a parameter, tag or status, otherwise a dict."""
    step: int = 0
    """Step of a metric, usually the epoch."""

    def __post_init__(self) -> None:
        if type(self.time_ms) is not int or type(self.step) is not int or not isinstance(self.key, str):
            raise JournalError(f"an event {self.kind!r} has a time, step or key of a wrong type")
        if self.kind not in _KINDS:
            raise JournalError(f"an event is of kind {self.kind!r}; it must be one of {', '.join(_KINDS)}")
        (pattern, kind, entries), value = _KINDS[self.kind], self.value
        if not isinstance(value, kind) or not all(
            isinstance(value.get(name), entry) for name, entry in entries.items()
        ):
            raise JournalError(f"an event {self.kind!r} has a value of a wrong type")
        if self.kind == "status":
            if value not in STATUSES:
                raise JournalError(f"status is {value!r}; it must be one of {', '.join(STATUSES)}")
            return
        files = [value["file"], *value.get("files", ())] if "file" in entries else []
        for path, allowed in ((self.key, pattern), *((file, _PATH) for file in files)):
            inside = all(part not in ("", ".", "..") for part in path.split("/"))
            if not inside or not re.fullmatch(allowed, path, re.ASCII):
                raise JournalError(
                    f"the name {path!r} of an event {self.kind!r} is not allowed: use {_ALLOWED[allowed]}, without an "
                    "empty part, '.' or '..' between slashes"
                )


class Journal:
    """Writes events of a run. Safe to use from several threads and together with other writers.

    Methods raise `paml.storage.StorageError` if the run folder cannot be written, JournalError for invalid names.
    """

    def __init__(self, run_folder: str, writer: str):
        """writer: name of this process in the names of segments: letters, digits and _."""
        self.run_folder = str(run_folder)
        self.writer = f"{writer}.{secrets.token_hex(3)}"
        self._folder = storage.join(self.run_folder, "journal")
        self._lock = threading.Lock()
        self._count = 0
        # A resumed run may be on a machine whose clock is behind; its events must still sort last.
        self._last_ns = max((int(name[:20]) for name in _segments(self._folder)), default=0)

    def run(
        self, *, experiment: str, name: str, tags: Mapping[str, str] | None = None, note: str | None = None
    ) -> None:
        """Start or resume the run: set its status to RUNNING and, on the first call, its experiment and name.

        `note` is the Markdown shown at the top of the run's page. The driver calls this before any worker starts.
        """
        start = _event("run", secrets.token_hex(16), {"experiment": experiment, "name": name})
        texts = dict(tags or {}) | ({NOTE_TAG: note} if note is not None else {})
        self._write([start, _event("status", value="RUNNING"), *_texts("tag", texts)])

    def metrics(self, values: Mapping[str, float], step: int, time_ms: int | None = None) -> None:
        """Metrics of one step, NaN and infinities included. The first value of a (key, step) counts, so repeating an
        epoch changes nothing."""
        now = _now_ms() if time_ms is None else time_ms
        self.metric_rows((key, value, step, now) for key, value in values.items())

    def metric_rows(self, rows: Iterable[tuple[str, float, int, int]]) -> None:
        """Metrics of several steps in one segment; rows of (key, value, step, time in ms)."""
        self._write([_event("metric", key, float(value), int(ms), int(step)) for key, value, step, ms in rows])

    def params(self, values: Mapping[str, Any]) -> None:
        """Parameters; nested mappings get dotted names. The first value of a key counts. A different later value, as of
        a run resumed with more workers, becomes the tag `resumed.<key>`."""
        self._write(_texts("param", flatten(values)))

    def settings(self, values: Mapping[str, Any]) -> None:
        """All settings of the run, as the artifact `settings.yaml` and as parameters."""
        import yaml

        text = yaml.safe_dump(plain(values), sort_keys=False, allow_unicode=True)
        self.artifact_bytes(text.encode(), "settings.yaml")
        self.params(values)

    def tags(self, values: Mapping[str, Any]) -> None:
        """Tags; the last value of a key counts."""
        self._write(_texts("tag", values))

    def note(self, text: str) -> None:
        """Replace the Markdown shown at the top of the run's page."""
        self.tags({NOTE_TAG: text})

    def dataset(self, name: str, *, digest: str, source: str, context: str, profile: Mapping[str, Any]) -> None:
        """Data used by the run: digest, location, what it is used for, and counts (`profile`)."""
        value = {"digest": digest, "source": source, "context": context, "profile": plain(profile)}
        self._write([_event("dataset", name, value)])

    def artifact(self, path: str, artifact_path: str) -> None:
        """A file, with its path among the artifacts. A later artifact with the same path replaces it.

        If the file is outside the run folder, it is first copied to `<run>/artifacts/`.
        """
        data, inside = storage.read_bytes(path), self.run_folder.rstrip("/") + "/"
        if path.startswith(inside):
            self._write([_artifact(path.removeprefix(inside), artifact_path, data)])
        else:
            self.artifact_bytes(data, artifact_path)

    def artifact_bytes(self, data: bytes, artifact_path: str) -> None:
        """An artifact from memory; see `artifact`."""
        event = _artifact(f"artifacts/{artifact_path}", artifact_path, data)
        storage.write_bytes(storage.join(self.run_folder, event.value["file"]), data)
        self._write([event])

    def model(self, folder: str) -> None:
        """The final model, packaged in a local folder (`paml.tracking.model`); it is copied to `<run>/models/`."""
        files, target = {}, f"models/{FINAL_MODEL}"
        for file in storage.list_files(folder):
            data = storage.read_bytes(storage.join(folder, file))
            files[file] = hashlib.sha256(data).hexdigest()
            storage.write_bytes(storage.join(self.run_folder, target, file), data)
        if "MLmodel" not in files:
            raise JournalError(f"{folder} is not a packaged model: the file MLmodel is missing")
        self._write([_event("model", FINAL_MODEL, {"file": target, "files": files})])

    def status(self, status: str, time_ms: int | None = None) -> None:
        """RUNNING, FINISHED, FAILED or KILLED. The last one counts."""
        self._write([_event("status", value=status, time_ms=time_ms)])

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
    """Follows a journal: each `poll` returns the events that were added since the last."""

    def __init__(self, run_folder: str):
        self.run_folder = str(run_folder)
        self.unreadable: dict[str, str] = {}
        """Path of each segment that cannot be read -> the reason."""
        self.identity: Event | None = None
        """The event that started the run; None if there is none yet."""
        self._folder = storage.join(self.run_folder, "journal")
        self._read: set[str] = set()
        self._first: dict[tuple[str, str, int], Any] = {}

    def poll(self) -> list[Event]:
        """New events in the order of their segments, without repeated metrics and parameters.

        Raises `paml.storage.StorageError` if the storage cannot be read. The next poll then reads the same segments.
        """
        new = sorted(set(_segments(self._folder)) - self._read)
        paths = [storage.join(self._folder, name) for name in new]
        with ThreadPoolExecutor(16 if storage.is_remote(self._folder) else 1) as pool:
            contents = list(pool.map(storage.read_bytes, paths))
        self._read.update(new)
        events: list[Event] = []
        for path, data in zip(paths, contents, strict=True):
            try:
                segment = _decode(data)
            except PARSE_ERRORS as error:
                self.unreadable[path] = str(error) or type(error).__name__
            else:
                events.extend(merged for event in segment if (merged := self._merge(event)) is not None)
        return events

    def identify(self) -> Event:
        """The event that started the run. Raises JournalError if no poll has returned it."""
        if self.identity is None:
            folder = self._folder
            raise JournalError(f"{self.run_folder} has no journal of a run: no readable event in {folder} starts a run")
        return self.identity

    def _merge(self, event: Event) -> Event | None:
        """The event; None if it repeats one. A parameter that changes becomes a tag."""
        if event.kind == "run":
            self.identity, previous = self.identity or event, self.identity
            return event if previous is None else None
        if event.kind not in ("metric", "param"):
            return event
        key = (event.kind, event.key, event.step)
        if key not in self._first:
            self._first[key] = event.value
            return event
        if event.kind == "metric" or self._first[key] == event.value:
            return None
        return replace(event, kind="tag", key=f"resumed.{event.key}"[:250].rstrip("/."))


def read_journal(run_folder: str, *, unreadable: dict[str, str] | None = None) -> list[Event]:
    """All events of a run in the order in which they were written, even if the clock was set back in between.

    The first metric of a (key, step) and the first parameter of a key count; of tags, datasets, artifacts and models
    the last. Every status is returned.

    Raises JournalError naming the segments that cannot be read. If a dict `unreadable` is given, it receives them
    instead, and the readable events are returned.
    """
    reader = JournalReader(run_folder)
    events = latest(reader.poll())
    if reader.unreadable and unreadable is None:
        raise JournalError(f"{describe_unreadable(reader.unreadable)}: restore them from a backup, or remove them")
    if unreadable is not None:
        unreadable.update(reader.unreadable)
    return events


def journal_identity(run_folder: str) -> str:
    """The identity of a run's journal, for `PARENT_TAG`. Raises JournalError if no run has been opened."""
    reader = JournalReader(run_folder)
    reader.poll()
    return reader.identify().key


def latest(events: Iterable[Event]) -> list[Event]:
    """The events without tags, datasets, artifacts and models that a later event replaces."""
    last: dict[tuple[object, ...], Event] = {}
    for position, event in enumerate(events):
        if event.kind in ("tag", "artifact", "model"):
            key = event.kind, event.key
        elif event.kind == "dataset":
            key = event.kind, event.key, event.value["digest"], event.value["context"]
        else:
            key = event.kind, position
        last.pop(key, None)  # the later event determines the position
        last[key] = event
    return list(last.values())


def describe_unreadable(unreadable: Mapping[str, str]) -> str:
    """One line that names segments that cannot be read."""
    shown = [f"{path} ({reason})" for path, reason in list(unreadable.items())[:5]]
    more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    return f"{len(unreadable)} unreadable journal segment(s): {', '.join(shown)}{more}"


def plain(value: Any) -> Any:
    """The value as JSON and YAML values; other types become text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    return str(value)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _segments(folder: str) -> list[str]:
    return [name for name in storage.list_files(folder) if _SEGMENT.fullmatch(name)]


def _event(kind: str, key: str = "", value: Any = None, time_ms: int | None = None, step: int = 0) -> Event:
    return Event(kind=kind, time_ms=_now_ms() if time_ms is None else time_ms, key=key, value=value, step=step)


def _texts(kind: str, values: Mapping[str, Any]) -> list[Event]:
    return [
        _event(kind, key, value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False))
        for key, value in values.items()
    ]


def _artifact(file: str, artifact_path: str, data: bytes) -> Event:
    value = {"file": file, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return _event("artifact", artifact_path, value)


def _encode(events: list[Event]) -> bytes:
    rows = [dict(vars(event)) for event in events]
    for row in rows:
        if row["kind"] == "metric" and not math.isfinite(row["value"]):
            row["value"] = repr(row["value"])  # JSON has no NaN and no infinities
    body = json.dumps(rows, ensure_ascii=False, allow_nan=False)
    crc = zlib.crc32(body.encode())
    return f'{{"schema_version": {SCHEMA_VERSION}, "crc32": {crc}, "events": {body}}}'.encode()


def _decode(data: bytes) -> list[Event]:
    content = parse_json_object(data)
    if content["schema_version"] != SCHEMA_VERSION:
        raise JournalError(
            f"schema version is {content['schema_version']}, but this paml reads {SCHEMA_VERSION}: use the version of "
            "paml that wrote it"
        )
    body = json.dumps(content["events"], ensure_ascii=False, allow_nan=False)
    if zlib.crc32(body.encode()) != content["crc32"]:
        raise JournalError("the CRC-32 does not match: the file is damaged")
    rows = content["events"]
    return [Event(**row | ({"value": float(row["value"])} if row["kind"] == "metric" else {})) for row in rows]
