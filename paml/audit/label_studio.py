"""Label issues as tasks for Label Studio, and its annotations back as verdicts.

One task is one question: is this class in this image? Formats: https://labelstud.io/guide/predictions (tasks with
predictions) and https://labelstud.io/guide/export (JSON and JSON_MIN).
"""

import json
import string
from typing import Any, NamedTuple
from urllib.parse import quote

import pyarrow.parquet as pq

from paml import storage
from paml.audit.issues import KIND_TITLES
from paml.errors import DataError, SettingsError
from paml.labels.edit import check_outputs
from paml.labels.rejects import HEADER
from paml.parsing import parse_errors_as
from paml.sources.label_studio import Counts, read_annotations, read_tasks
from paml.spreadsheet import format_csv

TASKS, INTERFACE = "label_studio.json", "label_studio.xml"
"""The files to import into a project, and to paste into its labeling interface."""
_CONTROL = "verdict"
_CONFIDENCE = {"yes": "1", "no": "0"}
LABELING_INTERFACE = f"""\
<View>
  <Header value="$question"/>
  <Image name="image" value="$image" zoom="true"/>
  <Choices name="{_CONTROL}" toName="image" choice="single" required="true" showInLine="true">
    <Choice value="yes" hotkey="y"/>
    <Choice value="no" hotkey="n"/>
  </Choices>
  <Text name="details" value="$details"/>
</View>
"""


class VerdictCounts(NamedTuple):
    """What an export of Label Studio has."""

    tasks: int
    verdicts: int
    open: int
    """Tasks without a verdict: skipped, or not annotated yet."""


def write_tasks(issues: str, image: str, out: str) -> int:
    """Write a task for each row of `issues` (an audit's issues.parquet), and the labeling interface, to the folder
    `out`. Returns the number of tasks.

    image: the address of an image with {key} in it, as Label Studio can open it: https://host/{key}.jpg,
    s3://bucket/{key}.jpg, or /data/local-files/?d=images/{key}.jpg. The prediction of a task is the answer that the
    table does not have, with its probability as score. Raises SettingsError for another `image`, DataError for another
    file.
    """
    fields = [field for _, field, _, _ in _parse_template(image) if field is not None]
    if fields != ["key"]:
        raise SettingsError(
            f"the image address is {image!r}: it must have {{key}} once, as in https://host/{{key}}.jpg"
        )
    is_url = image.startswith(("http://", "https://", "/data/"))
    paths = [storage.join(out, name) for name in (TASKS, INTERFACE)]
    check_outputs(paths, [issues])
    tasks = []
    with parse_errors_as(issues, "name the issues.parquet of an audit"), storage.open_input(issues) as file:
        table = pq.read_table(file)
        about = json.loads((table.schema.metadata or {})[b"paml"])
        model = f"{about['run']}@{about['checkpoints'][-1]}:alpha={about['alpha']:g}"
        for row in table.to_pylist():
            address = image.replace("{key}", quote(row["key"]) if is_url else row["key"])
            tasks.append(_task(row, address, model))
    storage.write_bytes(paths[0], json.dumps(tasks, indent=1, ensure_ascii=False).encode())
    storage.write_bytes(paths[1], LABELING_INTERFACE.encode())
    return len(tasks)


def _parse_template(image: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(image))
    except ValueError:
        return []


def _task(row: dict[str, Any], image: str, model: str) -> dict[str, Any]:
    answer = "no" if row["state"] == "positive" else "yes"
    probability = row["probability"]
    state = "not labeled" if row["state"] == "unobserved" else f"labeled {row['state']}"
    data = {
        "image": image,
        "question": f"Is there this class in the image: {row['name']}?",
        "details": f"{KIND_TITLES[row['kind']]}, rank {row['rank']}; {state}; probability {probability:.2f}",
        **{name: row[name] for name in ("key", "mid", "name", "kind", "rank")},
    }
    result = {"from_name": _CONTROL, "to_name": "image", "type": "choices", "value": {"choices": [answer]}}
    score = probability if answer == "yes" else 1 - probability
    return {"data": data, "predictions": [{"model_version": model, "score": score, "result": [result]}]}


def read_verdicts(export: str, out: str) -> VerdictCounts:
    """Write the verdicts of an export (JSON or JSON_MIN) of these tasks as `annotations-human.csv`, which
    `apply_verdicts` and `paml prepare --verdicts` take.

    Cancelled annotations and predictions are no verdicts. Different answers of several annotators are all written:
    such a pair keeps the table's label. Raises DataError for a task of another project, or no verdict.
    """
    check_outputs([out], [export])
    counts, tasks, unanswered = Counts(), 0, 0
    rows: dict[tuple[str, str, str, str], None] = {}
    with parse_errors_as(export, "export the project of the audit's tasks again, as JSON"):
        for task in read_tasks(export, counts):
            key, mid = task.data.get("key"), task.data.get("mid")
            if not isinstance(key, str) or not isinstance(mid, str):
                raise DataError(
                    f"task {task.row} of {export!r} has no key and mid in its data: use an export of the tasks that "
                    "were written for the audit"
                )
            answers = [a for each in read_annotations(task, counts) for a in each.answers if a.control == _CONTROL]
            for answer in answers:
                if (confidence := _CONFIDENCE.get(answer.path[-1])) is None:
                    raise DataError(f"task {task.row} of {export!r} has the verdict {answer.path[-1]!r}: use yes or no")
                rows[key, "verification", mid, confidence] = None
            tasks += 1
            unanswered += not answers
    if not rows:
        raise DataError(f"none of the {tasks:,} tasks of {export!r} has a verdict: annotate some, then export again")
    storage.write_bytes(out, format_csv([HEADER, *rows]).encode())
    return VerdictCounts(tasks, len(rows), unanswered)
