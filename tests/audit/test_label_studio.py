"""An audit's issues to Label Studio and back."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pytest

from paml.audit.issues import write_parquet
from paml.audit.label_studio import read_verdicts, write_tasks
from paml.errors import DataError, LabelError, SettingsError
from paml.labels import NEGATIVE, POSITIVE, LabelTable, apply_verdicts

ISSUES = [
    # key, mid, name, kind, state, probability
    ("a b", "/m/1", "Cat & <dog>", "missing", "unobserved", 0.9),
    ("c", "/m/2", "Car", "wrong", "positive", 0.1),
    ("c", "/m/1", "Cat & <dog>", "wrong", "negative", 0.8),
    ("=1+1", "/m/1", "Cat & <dog>", "missing", "unobserved", 0.7),
]


def issues_file(folder: Path) -> str:
    names = ("key", "mid", "name", "kind", "state", "probability")
    rows = [dict(zip(names, issue, strict=True)) | {"rank": 1, "score": 2.0} for issue in ISSUES]
    path = str(folder / "issues.parquet")
    write_parquet(pa.Table.from_pylist(rows), {"run": "runs/x", "checkpoints": ["s1", "s2"], "alpha": 5.0}, path)
    return path


def tasks_of(folder: Path, image: str = "https://host/{key}.jpg") -> list[dict[str, Any]]:
    write_tasks(issues_file(folder), image, str(folder / "out"))
    return json.loads((folder / "out/label_studio.json").read_text())


def annotate(task: dict[str, Any], *answers: str | None) -> dict[str, Any]:
    """The task as an export has it; None: skipped."""
    annotations = [
        {
            "was_cancelled": answer is None,
            "result": [{**task["predictions"][0]["result"][0], "value": {"choices": [answer]}}] * (answer is not None),
        }
        for answer in answers
    ]
    return {**task, "id": 1, "annotations": annotations}


def export(folder: Path, *tasks: Any) -> str:
    path = folder / "export.json"
    path.write_text(json.dumps(tasks))
    return str(path)


def test_tasks(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path)
    assert [task["data"]["image"] for task in tasks] == [
        "https://host/a%20b.jpg",
        "https://host/c.jpg",
        "https://host/c.jpg",
        "https://host/%3D1%2B1.jpg",
    ]
    predictions = [prediction for task in tasks for prediction in task["predictions"]]
    assert [prediction["result"][0]["value"]["choices"] for prediction in predictions] == [
        ["yes"],
        ["no"],
        ["yes"],
        ["yes"],
    ]
    assert [round(prediction["score"], 9) for prediction in predictions] == [0.9, 0.9, 0.8, 0.7]
    assert {prediction["model_version"] for prediction in predictions} == {"runs/x@s2:alpha=5"}
    assert tasks_of(tmp_path, "s3://bucket/{key}.jpg")[0]["data"]["image"] == "s3://bucket/a b.jpg"


def test_the_interface_shows_what_the_tasks_have(tmp_path: Path) -> None:
    (task, *_) = tasks_of(tmp_path)
    view = ElementTree.fromstring((tmp_path / "out/label_studio.xml").read_text())
    values = {element.get("value", "") for element in view.iter() if element.get("value", "").startswith("$")}
    assert {value[1:] for value in values} <= set(task["data"])
    result = task["predictions"][0]["result"][0]
    (control,) = view.iter("Choices")
    (image,) = view.iter("Image")
    assert (control.get("name"), control.get("toName")) == (result["from_name"], result["to_name"])
    assert image.get("name") == result["to_name"]
    assert [choice.get("value") for choice in control] == ["yes", "no"]


def test_verdicts_change_the_table(tmp_path: Path) -> None:
    first, second, third, fourth = tasks_of(tmp_path)
    path = export(
        tmp_path, annotate(first, "yes", "yes"), annotate(second, "no"), annotate(third, None), annotate(fourth, "no")
    )
    out = str(tmp_path / "verdicts.csv")
    assert read_verdicts(path, out) == (4, 3, 1)
    table = LabelTable.from_arrays(
        ["a b", "c", "c", "=1+1"],
        ["/m/2", "/m/2", "/m/1", "/m/2"],
        [POSITIVE, POSITIVE, NEGATIVE, POSITIVE],
        classes=["/m/1", "/m/2"],
    )
    report = apply_verdicts(table, [out], str(tmp_path / "new.arrow"))
    assert (report.added, report.overturned, report.confirmed) == (2, 1, 0)
    assert not any(report.rejected.values())
    new = report.table
    states = new.states(["a b", "c", "=1+1"])
    assert states.tolist() == [[POSITIVE, POSITIVE], [NEGATIVE, NEGATIVE], [NEGATIVE, POSITIVE]]


def test_annotators_who_disagree_change_nothing(tmp_path: Path) -> None:
    first, second, *_ = tasks_of(tmp_path)
    out = str(tmp_path / "verdicts.csv")
    read_verdicts(export(tmp_path, annotate(first, "yes", "no"), annotate(second, "yes")), out)
    table = LabelTable.from_arrays(["a b", "c"], ["/m/2", "/m/2"], [NEGATIVE, POSITIVE], classes=["/m/1", "/m/2"])
    report = apply_verdicts(table, [out], str(tmp_path / "new.arrow"))
    assert (report.confirmed, report.rejected["contradiction"]) == (1, 2)


def test_json_min(tmp_path: Path) -> None:
    (task, *_) = tasks_of(tmp_path)
    record = {**task["data"], "id": 1, "verdict": "no", "annotator": 1, "annotation_id": 4, "created_at": "2024"}
    out = tmp_path / "verdicts.csv"
    assert read_verdicts(export(tmp_path, record), str(out)).verdicts == 1
    assert out.read_text().splitlines()[1] == "a b,verification,/m/1,0"


def test_errors(tmp_path: Path) -> None:
    (task, *_) = tasks_of(tmp_path)
    issues, out = issues_file(tmp_path), str(tmp_path / "verdicts.csv")
    for image in ("https://host/a.jpg", "{key}{key}", "{0}", "{", "{key"):
        with pytest.raises(SettingsError, match="image address"):
            write_tasks(issues, image, out)
    with pytest.raises(DataError, match=r"export\.json"):
        write_tasks(export(tmp_path, task), "{key}", out)
    with pytest.raises(DataError, match="has a verdict"):
        read_verdicts(export(tmp_path, annotate(task, None), task), out)
    with pytest.raises(DataError, match="'maybe'"):
        read_verdicts(export(tmp_path, annotate(task, "maybe")), out)
    with pytest.raises(DataError, match=r"task 1 .* no key"):
        read_verdicts(export(tmp_path, {"data": {"image": "a.jpg"}, "annotations": []}), out)
    with pytest.raises(LabelError, match=r"export\.json"):
        read_verdicts(str(tmp_path / "export.json"), str(tmp_path / "export.json"))
    assert not Path(out).exists()
