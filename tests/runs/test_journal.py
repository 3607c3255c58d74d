import json
import math
import re
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.runs.journal import Event, Journal, JournalError, JournalReader, _decode, _encode, read_journal

KEYS = st.from_regex(r"\A[a-z_.:][a-z0-9_.: -]{0,20}[a-z]\Z")


@given(
    st.lists(
        st.builds(
            Event,
            kind=st.just("metric"),
            time_ms=st.integers(0, 2**45),
            key=KEYS,
            value=st.floats(),
            step=st.integers(-(2**62), 2**62),
        )
    ),
    st.lists(st.builds(Event, kind=st.just("tag"), time_ms=st.integers(0, 2**45), key=KEYS, value=st.text())),
)
@settings(max_examples=60, deadline=None)
def test_segments_round_trip(metrics, tags):
    assert list(map(repr, _decode(_encode(metrics + tags)))) == list(map(repr, metrics + tags))


def test_nan_and_infinities_round_trip(run_folder):
    Journal(run_folder, "driver").metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": -0.0}, 3, 17)
    values = {event.key: event.value for event in read_journal(run_folder)}
    assert math.isnan(values["a"])
    assert (values["b"], values["c"]) == (math.inf, -math.inf)
    assert math.copysign(1, values["d"]) == -1
    (segment,) = Path(run_folder, "journal").iterdir()
    # strict JSON has no NaN
    json.loads(segment.read_text(), parse_constant=pytest.fail)


def test_the_first_value_of_a_key_and_step_counts(run_folder):
    Journal(run_folder, "rank0").metrics({"val/mAP": 0.5, "train/loss": 1.0}, 1, 1000)
    Journal(run_folder, "rank0").metrics({"val/mAP": 0.7, "train/loss": 2.0}, 2, 2000)
    Journal(run_folder, "rank0").metrics({"val/mAP": 0.9}, 2, 3000)
    events = [(event.key, event.step, event.value, event.time_ms) for event in read_journal(run_folder)]
    assert events == [
        ("val/mAP", 1, 0.5, 1000),
        ("train/loss", 1, 1.0, 1000),
        ("val/mAP", 2, 0.7, 2000),
        ("train/loss", 2, 2.0, 2000),
    ]


def test_a_clock_set_back_does_not_change_the_first_value(run_folder, monkeypatch):
    Journal(run_folder, "rank0").metrics({"val/mAP": 0.5}, 1)
    earlier = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: earlier)
    Journal(run_folder, "rank0").metrics({"val/mAP": 0.6}, 1)
    assert [event.value for event in read_journal(run_folder)] == [0.5]


def test_concurrent_writers_lose_nothing(run_folder):
    def write(index):
        journal = Journal(run_folder, f"rank{index % 2}")
        for step in range(40):
            journal.metrics({f"m{index}": step}, step)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(4)]
    reader, seen = JournalReader(run_folder), []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen += reader.poll()
    seen += reader.poll()
    expected = sorted((f"m{index}", step) for index in range(4) for step in range(40))
    assert sorted((event.key, event.step) for event in seen) == expected
    assert sorted((event.key, event.step) for event in read_journal(run_folder)) == expected
    for index in range(4):
        assert [event.step for event in read_journal(run_folder) if event.key == f"m{index}"] == list(range(40))


def test_the_order_of_events_does_not_depend_on_the_clock(run_folder, monkeypatch):
    now, jumps = time.time_ns(), [0, 7200, -7200, 60]
    for seconds, status in zip(jumps, ["KILLED", "FAILED", "RUNNING", "FINISHED"], strict=True):
        monkeypatch.setattr(time, "time_ns", lambda seconds=seconds: now + seconds * 10**9)
        monkeypatch.setattr(time, "time", lambda seconds=seconds: now / 1e9 + seconds)
        Journal(run_folder, "driver").status(status)
        Journal(run_folder, "driver").tags({"position": status})
    statuses = [event.value for event in read_journal(run_folder) if event.kind == "status"]
    assert statuses == ["KILLED", "FAILED", "RUNNING", "FINISHED"]
    assert [(event.key, event.value) for event in read_journal(run_folder)][-1] == ("position", "FINISHED")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other version"])
def test_an_unreadable_segment_is_named_and_the_rest_is_read(run_folder, damage):
    journal = Journal(run_folder, "driver")
    journal.metrics({"a": 0.25}, 1)
    journal.metrics({"a": 0.75}, 2)
    segment = min(Path(run_folder, "journal").iterdir())
    data = segment.read_bytes()
    damaged = {
        "cut": data[:-9],
        "flipped": data.replace(b"0.25", b"0.35"),
        "empty": b"",
        "other version": data.replace(b'"schema_version": 1', b'"schema_version": 99'),
    }
    segment.write_bytes(damaged[damage])
    with pytest.raises(JournalError, match=segment.name):
        read_journal(run_folder)
    unreadable: dict[str, str] = {}
    assert [event.value for event in read_journal(run_folder, unreadable=unreadable)] == [0.75]
    assert list(unreadable) == [str(segment)]


def test_a_resumed_run_keeps_its_params_and_updates_tags(run_folder):
    first = Journal(run_folder, "driver")
    first.run(experiment="e", name="n", tags={"k": "1"})
    first.params({"loss": {"name": "ll-r", "rates": [0.1, None]}, "workers": 2})
    second = Journal(run_folder, "driver")
    second.run(experiment="e", name="other", tags={"k": "2"})
    second.params({"loss": {"name": "ll-r"}, "workers": 3})
    events = read_journal(run_folder)
    params = {event.key: event.value for event in events if event.kind == "param"}
    assert params == {"loss.name": "ll-r", "loss.rates": "[0.1, null]", "workers": "2"}
    assert {e.key: e.value for e in events if e.kind == "tag"} == {"k": "2", "resumed.workers": "3"}
    assert [event.value["name"] for event in events if event.kind == "run"] == ["n"]


@pytest.mark.parametrize("key", ["", "a//b", "../a", "/a", "a\nb", "loss%", "x" * 251])
def test_invalid_names_are_refused(run_folder, key):
    with pytest.raises(JournalError, match="not allowed"):
        Journal(run_folder, "driver").metrics({key: 1.0}, 1)
    assert read_journal(run_folder) == []


@pytest.mark.parametrize("path", ["/etc/x", "../x", "a//b"])
def test_artifact_paths_outside_of_the_run_are_refused(run_folder, path):
    with pytest.raises(JournalError, match=re.escape(repr(path))):
        Journal(run_folder, "driver").artifact_bytes(b"", path)


def test_a_file_in_the_run_folder_is_not_copied(run_folder):
    table = Path(run_folder, "scores", "table.txt")
    table.parent.mkdir(parents=True)
    table.write_text("G1 0.5")
    Journal(run_folder, "driver").artifact(str(table), "scores/epoch.txt")
    (event,) = read_journal(run_folder)
    assert event.value["file"] == "scores/table.txt"
    assert not Path(run_folder, "artifacts").exists()


def test_settings_become_a_file_and_parameters(run_folder):
    import yaml

    values = {"model": {"alpha": 5.0, "classes": ["/m/1"] * 900}, "seed": 1, "path": Path("x")}
    Journal(run_folder, "driver").settings(values)
    stored = yaml.safe_load(Path(run_folder, "artifacts", "settings.yaml").read_text())
    assert stored == {"model": {"alpha": 5.0, "classes": ["/m/1"] * 900}, "seed": 1, "path": "x"}
    params = {event.key: event.value for event in read_journal(run_folder) if event.kind == "param"}
    assert params["seed"] == "1"
    assert json.loads(params["model.classes"]) == ["/m/1"] * 900


def test_storage_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        Journal(str(tmp_path / "file" / "run"), "driver").metrics({"a": 1.0}, 1)
