"""Label Studio's exports: JSON (tasks with annotations), JSON_MIN (a record per annotation) and the JSON files, one per
annotation, of a target storage.

Formats: https://labelstud.io/guide/task_format and https://labelstud.io/guide/export. The CSV export is a table. An
export has what annotators chose, so labels are positive; a control whose only choices are yes and no is itself a class.
"""

import base64
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa

from paml import storage
from paml.errors import DataError, check_setting
from paml.parsing import parse_errors_as, parse_json
from paml.sources.folder import is_image
from paml.sources.full import list_inputs, list_some, sniff
from paml.sources.matching import normalize_name
from paml.sources.records import Records
from paml.sources.table_settings import TableSettings

ANNOTATORS = ("last", "union", "agree")
_LISTS = re.compile(rb'"(?:annotations|completions|result)"\s*:\s*\[')
_FIELDS = re.compile(rb'"(?:completed_by|was_cancelled|from_name|to_name)"\s*:|"data"\s*:\s*\{')
_MIN_FIELDS = (re.compile(rb'"annotation_id"\s*:'), re.compile(rb'"annotator"\s*:'))
_UPLOAD = re.compile(r"(?:^|/)data/upload/(?:\d+/)?(?P<prefix>[0-9a-f]{8}-)?(?P<name>[^/]+)$")
_LOCAL_FILE = re.compile(r"/data/local-files/?\?(?:[^#]*&)?d=([^&#]*)")
_RESOLVED = re.compile(r"/(?:presign|resolve)/?\?(?:[^#]*&)?fileuri=([^&#]*)")
_HINT = "export it again as JSON"
_WORDS = TableSettings()
_TRIED = 20
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class LabelStudioSettings:
    """The source `label_studio`."""

    image_key: str | None = None
    """The field of a task's data that names the image; null: the one whose values look like images."""
    controls: tuple[str, ...] = ()
    """The controls that hold classes, by their names in the labeling interface (`<Choices name=...>`); empty: all."""
    annotators: str = "last"
    """Which annotations count if an image has several: the `last` one; all (`union`); or what all of them say
    (`agree`), where a class that only some chose is unobserved."""

    def __post_init__(self) -> None:
        allowed = f"one of {', '.join(ANNOTATORS)}"
        check_setting(self.annotators in ANNOTATORS, "label_studio.annotators", self.annotators, allowed)


class Answer(NamedTuple):
    """One choice of an annotation. The path has several names if the control is a taxonomy."""

    control: str
    kind: str
    path: tuple[str, ...]


class Annotation(NamedTuple):
    """One annotation of an image."""

    time: str
    """When it was changed, as ISO 8601; "" if that is unknown."""
    row: int
    """The number of the task, from 1."""
    answers: list[Answer]


class Task(NamedTuple):
    """An image and its annotations."""

    row: int
    """Its number in the export, from 1."""
    data: Mapping[str, Any]
    """What was imported. For JSON_MIN the answers too."""
    annotations: list[Any]
    """As in the export."""
    predictions: int
    drafts: int


@dataclass
class Counts:
    """What was left out, for the notes."""

    bad_rows: list[tuple[int, str]] = field(default_factory=list)
    cancelled: int = 0
    predictions: int = 0
    drafts: int = 0
    others: Counter[str] = field(default_factory=Counter)
    """Results that are not classes, by their type."""


def detect_label_studio(labels: str) -> str | None:
    """Whether a JSON file, or files in a folder, are Label Studio's."""
    if _looks_like_tasks(labels):
        return "a Label Studio JSON file"
    found = [name for name in _candidates(list_some(labels))[:_TRIED] if _looks_like_tasks(storage.join(labels, name))]
    if not found:
        return None
    return f"Label Studio's {found[0]}" if len(found) == 1 else f"{len(found)} Label Studio files, such as {found[0]}"


def read_label_studio(labels: str, images: str | None, settings: LabelStudioSettings) -> Records:
    """The classes that were chosen for each image, or whose regions it has. Tasks without an annotation are images
    without labels; cancelled annotations and predictions are left out.

    An image is named as `image_names` says. Raises DataError for another format, no annotation, or an unclear image.
    """
    counts = Counts()
    annotations: dict[str, list[Annotation]] = {}
    with parse_errors_as(labels, _HINT):
        tasks = list(read_tasks(labels, counts))
        key = settings.image_key or _find_image_key(labels, tasks)
        for task in tasks:
            value = task.data.get(key)
            if not isinstance(value, str) or value.startswith("data:") or not _name_of(value)[0]:
                fields = ", ".join(map(str, task.data))[:80] or "none"
                text = f"task {task.row} has no file name in {key!r} but {str(value)[:80]!r}; its fields are {fields!r}"
                counts.bad_rows.append((task.row, text))
                continue
            counts.predictions += task.predictions
            counts.drafts += task.drafts
            annotations.setdefault(value, []).extend(read_annotations(task, counts))
        if not any(annotations.values()):
            raise DataError(_nothing(labels, tasks, counts))
        names, renamed = image_names(list(annotations), images, labels)
        answers = [answer for group in annotations.values() for each in group for answer in each.answers]
        controls = _choose_controls(labels, answers, settings.controls)
        class_of, notes = _classes(answers, controls)
        image, cls, state, row = [], [], [], []
        for number, group in enumerate(annotations.values()):
            for name, value, task_row in _resolve(group, class_of, settings.annotators):
                image.append(number)
                cls.append(name)
                state.append(value)
                row.append(task_row)
        classes = pa.array(cls, pa.string()).dictionary_encode()
        pa.array([key, *names, *controls, *counts.others], pa.string())  # JSON can have text that is not valid Unicode
    kinds = {answer.control: answer.kind for answer in answers if answer.control in controls}
    listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "without a label"
    return Records(
        path=labels,
        understood=f"Label Studio export, {len(names):,} images in {key!r}, {listed}",
        images=names,
        image=np.array(image, np.int64),
        cls=classes,
        state=pa.array(state, pa.string()).dictionary_encode(),
        row=np.array(row, np.int64),
        unlabeled=np.array([not group for group in annotations.values()], bool),
        bad_rows=counts.bad_rows,
        notes=[*notes, *renamed, *_notes(counts, annotations, settings.annotators)],
    )


# --- files and tasks -----------------------------------------------------------------------------------------------


def _looks_like_tasks(path: str) -> bool:
    start = sniff(path).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start.startswith((b"[", b"{")):
        return False
    return bool(_LISTS.search(start) and _FIELDS.search(start)) or all(mark.search(start) for mark in _MIN_FIELDS)


def _candidates(names: Sequence[str]) -> list[str]:
    """The files of a folder that can be exports; a target storage writes names without a suffix."""
    return [name for name in names if "/" not in name and posixpath.splitext(name)[1] in ("", ".json")]


def read_tasks(labels: str, counts: Counts) -> Iterator[Task]:
    """The tasks of a file, or of all files in a folder. Raises DataError."""
    files = [labels]
    if not storage.exists(labels):
        files = [storage.join(labels, name) for name in _candidates(list_inputs(labels))]
        if not files:
            raise DataError(f"there is no {labels!r}, or it has no JSON file: set labels to a Label Studio export")
    row = 0
    for path in files:
        with parse_errors_as(path, _HINT):
            content = parse_json(storage.read_bytes(path).removeprefix(b"\xef\xbb\xbf"))
            for item in content if isinstance(content, list) else [content]:
                row += 1
                if (task := _task(item, row)) is not None:
                    yield task
                else:
                    counts.bad_rows.append((row, f"{path}: item {row} is not a task: {str(item)[:80]!r}"))


def _task(item: Any, row: int) -> Task | None:
    """A task of a JSON export, a record of JSON_MIN, or an annotation with its task inside; None for anything else."""
    if not isinstance(item, dict):
        return None
    if isinstance(item.get("data"), dict):
        annotations = item.get("annotations", item.get("completions")) or []
        return Task(row, item["data"], annotations, len(item.get("predictions") or ()), len(item.get("drafts") or ()))
    task = item.get("task")
    if isinstance(task, dict) and isinstance(task.get("data"), dict) and "result" in item:
        return Task(row, task["data"], [item], 0, 0)
    return _min_record(item, row) if "annotation_id" in item else None


def _min_record(item: dict[str, Any], row: int) -> Task:
    """A record of JSON_MIN: the task's data, its id, the answers by control, then `annotator` and more."""
    keys = list(item)
    first = keys.index("id") + 1 if "id" in item else 0
    last = keys.index("annotator") if "annotator" in item else len(keys)
    results: list[Any] = []
    for control in keys[first:last]:
        for value in item[control] if isinstance(item[control], list) else [item[control]]:
            if not isinstance(value, str):
                results.append({"from_name": control, "value": value})
            elif not _is_image_value(value):  # the data has an own field `id`, before that of the image
                results.append({"from_name": control, "value": {"choices": [value]}})
    annotated = item["annotation_id"] is not None
    return Task(row, item, [{**item, "result": results}] if annotated else [], 0, 0)


def _find_image_key(labels: str, tasks: Sequence[Task]) -> str:
    """The field of the tasks' data that names images. Raises DataError if there is none, or several."""
    count = Counter(
        key for task in tasks for key, value in task.data.items() if isinstance(value, str) and _is_image_value(value)
    )
    names = dict.fromkeys(str(key) for task in tasks for key in task.data)
    pa.array(names, pa.string())  # JSON can have text that is not valid Unicode
    if not count:
        fields = ", ".join(list(names)[:_SHOWN]) or "none"
        raise DataError(
            f"{labels!r} has no task whose data names an image (fields: {fields}): set label_studio.image_key"
        )
    best = [key for key, number in count.items() if number == max(count.values())]
    if len(best) > 1:
        raise DataError(
            f"the data of {labels!r} has several fields with images, {', '.join(best)}: choose with "
            "label_studio.image_key"
        )
    return best[0]


def _is_image_value(value: str) -> bool:
    name, _ = _name_of(value)
    return is_image(name) or bool(_UPLOAD.search(value) or _LOCAL_FILE.search(value) or _RESOLVED.search(value))


def read_annotations(task: Task, counts: Counts) -> Iterator[Annotation]:
    """The annotations of a task that were not cancelled."""
    for annotation in task.annotations:
        if annotation.get("was_cancelled") or annotation.get("skipped"):
            counts.cancelled += 1
            continue
        answers = []
        for result in annotation.get("result") or ():
            answers += _answers(result, task.row, counts)
        yield Annotation(str(annotation.get("updated_at") or annotation.get("created_at") or ""), task.row, answers)


def _answers(result: Any, row: int, counts: Counts) -> Iterator[Answer]:
    value = result.get("value")
    value = value if isinstance(value, dict) else {}
    kind = next((key for key in (result.get("type"), *value) if _is_kind(key) and key in value), None)
    if kind is None:
        counts.others[str(result.get("type") or ", ".join(map(str, value)) or "no value")] += 1
        return
    for choice in [value[kind]] if isinstance(value[kind], str) else value[kind] or ():
        path = tuple(choice) if isinstance(choice, list) else (choice,)
        if path and all(isinstance(name, str) and name.strip() for name in path):
            yield Answer(str(result.get("from_name") or kind), kind, tuple(name.strip() for name in path))
        else:
            counts.bad_rows.append((row, f"task {row} has a class that is not text: {str(choice)[:80]!r}"))


def _is_kind(key: Any) -> bool:
    return isinstance(key, str) and (key in ("choices", "taxonomy") or key.endswith("labels"))


# --- names of images -----------------------------------------------------------------------------------------------


def image_names(values: Sequence[str], images: str | None, labels: str) -> tuple[list[str], list[str]]:
    """(the name of each image, notes), given what its task says.

    The file name of an upload, without the prefix of 8 digits that Label Studio adds, unless the folder `images` has
    the file with it, or two uploads have one name. The path below its root of a local file. The path of a URL, without
    host or bucket. Raises DataError for one name of two images.
    """
    parsed = [_name_of(value) for value in values]
    prefixed = {prefix + name for name, prefix in parsed if prefix}
    stored = set() if images is None or not prefixed else set(map(posixpath.basename, storage.list_files(images)))
    repeated = Counter(name for name, _ in parsed)
    names, renamed = [], []
    for name, prefix in parsed:
        if prefix and prefix + name not in stored and repeated[name] == 1:
            renamed.append((name, prefix + name))
        elif prefix:
            name = prefix + name
        names.append(name)
    value_of: dict[str, str] = {}
    for name, value in zip(names, values, strict=True):
        if (first := value_of.setdefault(normalize_name(name), value)) != value:
            raise DataError(f"{labels!r} has one name, {name!r}, for the images {first!r} and {value!r}: rename one")
    if not renamed:
        return names, []
    name, original = renamed[0]
    return names, [f"{len(renamed):,} uploads are named without Label Studio's prefix: {original} is {name}"]


def _name_of(value: str) -> tuple[str, str]:
    """(the image's name, the prefix of an upload or "")."""
    value = value.strip()
    if match := _RESOLVED.search(value):
        text = unquote(match[1])
        try:
            value = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_").decode()
        except ValueError:
            return value, ""
    if match := _LOCAL_FILE.search(value):
        return unquote(match[1]), ""
    scheme, found, rest = value.partition("://")
    if found and scheme in ("http", "https"):
        try:
            path = unquote(urlsplit(value).path)
        except ValueError:
            return value, ""
    elif found:
        path = rest.partition("/")[2]
    else:
        path = value
    if match := _UPLOAD.search(path):
        return unquote(match["name"]), match["prefix"] or ""
    return path.lstrip("/") if found else path, ""


# --- classes and states --------------------------------------------------------------------------------------------


def _choose_controls(labels: str, answers: Sequence[Answer], wanted: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(answer.control for answer in answers))
    if missing := [name for name in wanted if name not in names]:
        raise DataError(
            f"{labels!r} has no answer of the control {missing[0]!r}: set label_studio.controls to some of "
            f"{', '.join(names[:_SHOWN])}"
        )
    return list(wanted) or names


def _classes(
    answers: Sequence[Answer], controls: Sequence[str]
) -> tuple[dict[tuple[str, tuple[str, ...]], tuple[str, str]], list[str]]:
    """((class, state) of each control and choice, notes).

    A taxonomy's class is the last name of the path, or the whole path if another path ends the same.
    """
    paths: dict[str, set[tuple[str, ...]]] = {}
    kinds = dict.fromkeys((answer.control, answer.kind, answer.path) for answer in answers)
    chosen = [key for key in kinds if key[0] in controls]
    for _, kind, path in chosen:
        if kind == "taxonomy":
            paths.setdefault(path[-1], set()).add(path)
    words: dict[str, set[str]] = {}
    for control, kind, path in chosen:
        words.setdefault(control, set()).add((_WORDS.state_of(path[-1]) or "") if kind == "choices" else kind)
    answered = [control for control, states in words.items() if max(states) != "" and states <= {"1", "0", ""}]
    class_of = {}
    for control, kind, path in chosen:
        if control in answered:
            class_of[control, path] = (control, _WORDS.state_of(path[-1]) or "")
        else:
            whole = kind == "taxonomy" and len(paths[path[-1]]) > 1
            class_of[control, path] = ("/".join(path) if whole else path[-1], "1")
    notes = []
    if answered:
        notes.append(f"controls with yes or no are classes themselves: {', '.join(answered[:_SHOWN])}")
    if paths:
        repeated = [name for name, found in paths.items() if len(found) > 1]
        text = f"; the whole path for {', '.join(repeated[:_SHOWN])}, which several paths end with" if repeated else ""
        notes.append(f"a class of a taxonomy is the last name of its path{text}")
    return class_of, notes


def _resolve(
    annotations: Sequence[Annotation],
    class_of: Mapping[tuple[str, tuple[str, ...]], tuple[str, str]],
    rule: str,
) -> list[tuple[str, str, int]]:
    """(class, state, number of the task) of one image."""
    if rule == "last" and annotations:
        annotations = [max(reversed(annotations), key=lambda each: each.time)]  # of equal times the last in the file
    counts: Counter[tuple[str, str]] = Counter()
    row_of: dict[tuple[str, str], int] = {}
    for annotation in annotations:
        pairs = {class_of[a.control, a.path]: None for a in annotation.answers if (a.control, a.path) in class_of}
        counts.update(pairs.keys())
        for pair in pairs:
            row_of.setdefault(pair, annotation.row)
    if rule != "agree":
        return [(cls, state, row) for (cls, state), row in row_of.items()]
    agreed = {cls for (cls, _), count in counts.items() if count == len(annotations)}
    resolved = {(cls, state if cls in agreed else ""): row for (cls, state), row in row_of.items()}
    return [(cls, state, row) for (cls, state), row in resolved.items()]


# --- notes ---------------------------------------------------------------------------------------------------------


def _notes(counts: Counts, annotations: Mapping[str, Sequence[Annotation]], rule: str) -> list[str]:
    notes = []
    if several := sum(len(group) > 1 for group in annotations.values()):
        notes.append(f"{several:,} images have several annotations: label_studio.annotators is {rule}")
    if without := sum(not group for group in annotations.values()):
        notes.append(f"{without:,} of {len(annotations):,} images have no annotation, so no labels")
    if counts.cancelled:
        notes.append(f"{counts.cancelled:,} cancelled annotations are left out")
    if counts.drafts:
        notes.append(f"{counts.drafts:,} drafts are left out: they were not submitted")
    if counts.predictions:
        notes.append(f"{counts.predictions:,} predictions are left out: they are not labels")
    if counts.others:
        listed = ", ".join(f"{kind} ({count:,})" for kind, count in counts.others.most_common(_SHOWN))
        notes.append(f"{counts.others.total():,} results are not classes and are left out: {listed}")
    return notes


def _nothing(labels: str, tasks: Sequence[Task], counts: Counts) -> str:
    """Why there is no label."""
    if counts.bad_rows and len(counts.bad_rows) >= len(tasks):
        return f"{labels!r} has no task with an image: {counts.bad_rows[0][1]}; set label_studio.image_key"
    return (
        f"none of the {len(tasks):,} tasks of {labels!r} has an annotation ({counts.cancelled:,} are cancelled, and "
        f"{counts.predictions:,} predictions are not labels): annotate some, then export again"
    )
