"""Label Studio's exports, as its export page and its storages write them."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.errors import DataError, SettingsError
from paml.sources.label_studio import LabelStudioSettings, detect_label_studio, read_label_studio
from tests.sources.test_full_sets import labels_of

Results = list[dict[str, Any]]


def choices(*names: str, control: str = "choice", kind: str = "choices") -> Results:
    return [{"value": {kind: list(names)}, "id": "x", "from_name": control, "to_name": "image", "type": kind}]


def annotation(results: Results, **fields: Any) -> dict[str, Any]:
    more = {"completed_by": 1, "was_cancelled": False, "ground_truth": False, "created_at": "2024-01-01T00:00:00Z"}
    return {"id": 1, "result": results, **more, **fields}


def task(image: str, *annotations: dict[str, Any], **fields: Any) -> dict[str, Any]:
    more = {"file_upload": None, "drafts": [], "predictions": [], "meta": {}, "project": 1}
    return {"id": 1, "annotations": list(annotations), **more, "data": {"image": image}, **fields}


def write(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def read(tmp_path: Path, *tasks: Any, images: str | None = None, **settings: Any):
    path = write(tmp_path / "project-1.json", list(tasks))
    assert detect_label_studio(path)
    return read_label_studio(path, images, LabelStudioSettings(**settings))


def test_choices_and_regions(tmp_path: Path) -> None:
    """Regions of any shape say that a class is present; numbers and texts are counted."""
    car = {"x": 1, "y": 2, "width": 3, "height": 4, "rotation": 0}
    regions = [
        {
            "value": {**car, "rectanglelabels": ["car"]},
            "from_name": "box",
            "to_name": "image",
            "type": "rectanglelabels",
        },
        {
            "value": {**car, "rectanglelabels": ["car"]},
            "from_name": "box",
            "to_name": "image",
            "type": "rectanglelabels",
        },
        {"value": {"format": "rle", "rle": [1], "brushlabels": ["road"]}, "from_name": "brush", "type": "brushlabels"},
        {"value": {**car}, "from_name": "shape", "type": "rectangle"},
        {"value": {**car, "labels": ["sign"]}, "from_name": "kind", "type": "labels"},
        {"value": {"text": ["blurry"]}, "from_name": "note", "type": "textarea"},
        {"type": "relation", "from_id": "a", "to_id": "b"},
    ]
    records = read(
        tmp_path,
        task("a.jpg", annotation(choices("cat", " dog "))),
        task("sub/b.jpg", annotation(regions)),
        task("c.jpg", annotation([])),
    )
    assert labels_of(records) == {
        "a.jpg": {"cat": "1", "dog": "1"},
        "sub/b.jpg": {"car": "1", "road": "1", "sign": "1"},
        "c.jpg": {},
    }
    assert records.row is not None
    assert records.row.tolist() == [1, 1, 2, 2, 2]
    assert not records.complete
    (note,) = records.notes
    assert all(f"{kind} (1)" in note for kind in ("rectangle", "textarea", "relation"))
    assert labels_of(read(tmp_path, task("b.jpg", annotation(regions)), controls=("box", "kind"))) == {
        "b.jpg": {"car": "1", "sign": "1"}
    }


def test_what_is_no_label_is_counted(tmp_path: Path) -> None:
    records = read(
        tmp_path,
        task("a.jpg", annotation(choices("cat")), annotation(choices("dog"), was_cancelled=True)),
        task("b.jpg", predictions=[{"result": choices("cat")}, {"result": []}], drafts=[{"result": choices("cat")}]),
    )
    assert labels_of(records) == {"a.jpg": {"cat": "1"}, "b.jpg": {}}
    notes = "\n".join(records.notes)
    assert "1 of 2 images have no annotation" in notes
    assert "1 cancelled" in notes
    assert "2 predictions" in notes
    assert "1 drafts" in notes
    with pytest.raises(DataError, match=r"none of the 1 tasks .* has an annotation"):
        read(tmp_path, task("b.jpg", predictions=[{"result": choices("cat")}]))


def test_several_annotations(tmp_path: Path) -> None:
    """By the time of the change, whatever the order in the file; two tasks of one image count as one."""
    tasks = (
        task(
            "a.jpg",
            annotation(choices("cat", "dog"), updated_at="2024-03-01T00:00:00Z"),
            annotation(choices("cat", "fox"), updated_at="2024-02-01T00:00:00Z"),
        ),
        task("b.jpg", annotation(choices("cat"))),
        task("b.jpg", annotation(choices("dog"))),
    )
    assert labels_of(read(tmp_path, *tasks)) == {"a.jpg": {"cat": "1", "dog": "1"}, "b.jpg": {"dog": "1"}}
    assert labels_of(read(tmp_path, *tasks, annotators="union")) == {
        "a.jpg": {"cat": "1", "dog": "1", "fox": "1"},
        "b.jpg": {"cat": "1", "dog": "1"},
    }
    records = read(tmp_path, *tasks, annotators="agree")
    assert labels_of(records) == {"a.jpg": {"cat": "1", "dog": "", "fox": ""}, "b.jpg": {"cat": "", "dog": ""}}
    assert "2 images have several annotations" in records.notes[0]
    with pytest.raises(SettingsError, match=r"label_studio.annotators is 'first'"):
        LabelStudioSettings(annotators="first")


def test_yes_and_no_are_states(tmp_path: Path) -> None:
    """A control with these choices alone is a class; yes next to other choices is one of them."""
    first = choices("Yes", control="helmet") + choices("no", control="vest") + choices("yes", "maybe", control="other")
    second = choices("no", control="helmet") + choices("unknown", control="vest")
    records = read(tmp_path, task("a.jpg", annotation(first)), task("b.jpg", annotation(second)))
    assert labels_of(records) == {
        "a.jpg": {"helmet": "1", "vest": "0", "yes": "1", "maybe": "1"},
        "b.jpg": {"helmet": "0", "vest": ""},
    }
    assert "helmet, vest" in records.notes[0]
    split = [task("a.jpg", annotation(choices("yes", control="c")), annotation(choices("no", control="c")))]
    assert labels_of(read(tmp_path, *split, annotators="agree")) == {"a.jpg": {"c": ""}}


def test_taxonomy(tmp_path: Path) -> None:
    paths = [["animal", "cat"], ["animal", "jaguar"], ["car", "jaguar"], ["thing"]]
    result = [{"value": {"taxonomy": paths}, "from_name": "tree", "to_name": "image", "type": "taxonomy"}]
    records = read(tmp_path, task("a.jpg", annotation(result)))
    assert labels_of(records) == {"a.jpg": dict.fromkeys(("cat", "animal/jaguar", "car/jaguar", "thing"), "1")}
    assert "jaguar" in records.notes[0]


RESOLVED = base64.b64encode(b"s3://bucket/deep/r.jpg").decode()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("a.jpg", "a.jpg"),
        ("sub/a b%20c.jpg", "sub/a b%20c.jpg"),
        ("/data/upload/12/0f3c9a1b-cat_1.jpg", "cat_1.jpg"),
        ("/data/upload/0f3c9a1b-cat.jpg", "cat.jpg"),
        ("/data/upload/3/cafe-cat.jpg", "cafe-cat.jpg"),
        ("http://localhost:8080/data/upload/3/0f3c9a1b-a%20b.png", "a b.png"),
        ("/data/local-files/?d=set/one/a%20b.jpg", "set/one/a b.jpg"),
        ("http://host/data/local-files/?d=set%5Ca.jpg", "set\\a.jpg"),
        ("https://host/x/y/a%C3%A9.jpg?sig=1#f", "x/y/aé.jpg"),
        ("s3://bucket/deep/a%20b.jpg", "deep/a%20b.jpg"),
        ("gs://bucket/a.JPEG", "a.JPEG"),
        ("azure-blob://container/a.webp", "a.webp"),
        (f"/tasks/5/presign/?fileuri={RESOLVED}", "deep/r.jpg"),
        (f"https://host/tasks/5/resolve/?fileuri={RESOLVED.rstrip('=')}", "deep/r.jpg"),
    ],
)
def test_names_of_images(tmp_path: Path, value: str, name: str) -> None:
    assert read(tmp_path, task(value, annotation(choices("cat")))).images == [name]


def test_an_upload_keeps_its_prefix_if_the_file_has_it(tmp_path: Path) -> None:
    tasks = [task(f"/data/upload/1/{n}1234567-{n}.jpg", annotation(choices("cat"))) for n in "ab"]
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a1234567-a.jpg").touch()
    (tmp_path / "images/b.jpg").touch()
    records = read(tmp_path, *tasks, images=str(tmp_path / "images"))
    assert records.images == ["a1234567-a.jpg", "b.jpg"]
    assert "b1234567-b.jpg is b.jpg" in records.notes[0]
    assert read(tmp_path, *tasks).images == ["a.jpg", "b.jpg"]
    same = [task(f"/data/upload/1/{n}1234567-x.jpg", annotation(choices(n))) for n in "ab"]
    assert labels_of(read(tmp_path, *same)) == {"a1234567-x.jpg": {"a": "1"}, "b1234567-x.jpg": {"b": "1"}}


def test_one_name_of_two_images_is_refused(tmp_path: Path) -> None:
    tasks = [task(f"https://{host}/a.jpg", annotation(choices("cat"))) for host in ("one", "two")]
    with pytest.raises(DataError, match=r"'a.jpg'.*https://one/a.jpg"):
        read(tmp_path, *tasks)


def test_the_field_of_the_image(tmp_path: Path) -> None:
    def both(n: int) -> dict[str, Any]:
        data = {"left": f"l{n}.jpg", "right": f"r{n}.jpg", "site": "x"}
        return {**task("", annotation(choices("cat"))), "data": data}

    with pytest.raises(DataError, match="left, right"):
        read(tmp_path, both(1), both(2))
    assert read(tmp_path, both(1), both(2), image_key="right").images == ["r1.jpg", "r2.jpg"]
    with pytest.raises(DataError, match=r"'photo'.*left, right, site"):
        read(tmp_path, both(1), image_key="photo")
    records = read(tmp_path, task("a.jpg", annotation(choices("cat"))), {**both(1), "data": {"site": "x"}}, "text")
    assert [number for number, _ in records.bad_rows] == [3, 2]
    with pytest.raises(DataError, match=r"no task whose data names an image .*site"):
        read(tmp_path, {**both(1), "data": {"site": "x"}})
    with pytest.raises(DataError, match="data:image"):
        read(tmp_path, task("data:image/png;base64,AAAA", annotation(choices("cat"))), image_key="image")
    with pytest.raises(DataError, match="'other'"):
        read(tmp_path, both(1), image_key="left", controls=("other",))


def test_json_min(tmp_path: Path) -> None:
    """The answers are between the task's id and the annotator; other texts of the data are not classes."""
    end = {"annotator": 1, "annotation_id": 7, "created_at": "2024", "updated_at": "2024", "lead_time": 1.5}
    region = {"x": 1, "y": 1, "width": 1, "height": 1, "rectanglelabels": ["car"], "original_width": 9}
    records = read(
        tmp_path,
        {"image": "/data/upload/1/01234567-a.jpg", "site": "north", "id": 1, "choice": "cat", **end},
        {"image": "b.jpg", "site": "north", "id": 2, "choice": {"choices": ["cat", "dog"]}, "box": [region] * 2, **end},
        {"image": "c.jpg", "site": "north", "id": 3, "tree": [{"taxonomy": [["x", "y"]]}], "n": [{"number": 3}], **end},
        {"image": "d.jpg", "site": "north", "id": 4, **end, "annotation_id": None},
    )
    assert labels_of(records) == {
        "a.jpg": {"cat": "1"},
        "b.jpg": {"cat": "1", "dog": "1", "car": "1"},
        "c.jpg": {"y": "1"},
        "d.jpg": {},
    }
    assert any("number (1)" in note for note in records.notes)


def test_a_target_storage(tmp_path: Path) -> None:
    """A file per annotation, with its task inside and often without a suffix."""
    for number, (image, cls) in enumerate([("a.jpg", "cat"), ("b.jpg", "dog")]):
        inside = {"id": number, "data": {"image": image}}
        write(tmp_path / f"storage/{number}", {**annotation(choices(cls)), "task": inside})
    assert detect_label_studio(str(tmp_path / "storage"))
    records = read_label_studio(str(tmp_path / "storage"), None, LabelStudioSettings())
    assert labels_of(records) == {"a.jpg": {"cat": "1"}, "b.jpg": {"dog": "1"}}


def test_an_export_in_a_bucket(tmp_path: Path, s3: str) -> None:
    from paml import storage

    content = json.dumps([task("s3://x/a.jpg", annotation(choices("cat")))]).encode()
    storage.write_bytes(f"{s3}/export/tasks.json", content)
    assert detect_label_studio(f"{s3}/export")
    records = read_label_studio(f"{s3}/export", None, LabelStudioSettings())
    assert labels_of(records) == {"a.jpg": {"cat": "1"}}


def test_other_files(tmp_path: Path) -> None:
    for text in ("", "[]", '{"images": [], "annotations": [], "categories": []}', '{"samples": []}', "[1]", "[[["):
        path = tmp_path / "other.json"
        path.write_text(text)
        assert detect_label_studio(str(path)) is None
        with pytest.raises(DataError, match=r"other\.json"):
            read_label_studio(str(path), None, LabelStudioSettings())
    assert detect_label_studio(str(tmp_path / "none")) is None
    with pytest.raises(DataError, match="none"):
        read_label_studio(str(tmp_path / "none"), None, LabelStudioSettings())


@settings(max_examples=50, deadline=None)
@given(groups=st.lists(st.lists(st.sets(st.sampled_from("abcd")), min_size=1, max_size=4), min_size=1, max_size=4))
def test_agreement_of_annotators(tmp_path_factory: pytest.TempPathFactory, groups: list[list[set[str]]]) -> None:
    """Classes by their sets: what all say, what some say, and the answer of the last."""
    tasks = [
        task(f"{n}.jpg", *(annotation(choices(*sorted(chosen))) for chosen in group)) for n, group in enumerate(groups)
    ]
    folder = tmp_path_factory.mktemp("tasks")
    agree, union, last = (labels_of(read(folder, *tasks, annotators=rule)) for rule in ("agree", "union", "last"))
    for n, group in enumerate(groups):
        everyone, anyone = set.intersection(*group), set.union(*group)
        assert agree[f"{n}.jpg"] == {**dict.fromkeys(anyone, ""), **dict.fromkeys(everyone, "1")}
        assert union[f"{n}.jpg"] == dict.fromkeys(anyone, "1")
        assert last[f"{n}.jpg"] == dict.fromkeys(group[-1], "1")
