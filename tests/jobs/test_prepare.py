"""The preparation as people start it: its sources, its plan, a stop, a part that fails, one's own data."""

import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from paml.distributed.prepare_run import at_absolute_paths
from paml.errors import DataError, SettingsError
from paml.labels import LabelTable
from paml.prepare import OwnSettings, PrepareSettings, prepare
from paml.prepare_plan import plan
from paml.shards import Manifest, ShardSettings, verify_shards
from tests.helpers.jobs import PREPARE, Job, environment, write_scenes
from tests.shards.images import encoded, picture

SPLITS = ("train", "validation", "test")
SMALL = ShardSettings(size=32, samples_per_shard=20)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=60, others=20)


def settings_of(scenes: Path, out: Path, **changes: object) -> PrepareSettings:
    given: dict[str, object] = {
        "out": str(out),
        "release": str(scenes / "2017_11"),
        "images": str(scenes / "images"),
        "shards": SMALL,
        "workers": 2,
    }
    return PrepareSettings(**{**given, **changes})  # pyright: ignore[reportArgumentType]


def options_of(scenes: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--out", str(out), "--release", str(scenes / "2017_11"), "--images", str(scenes / "images")),
        *("--shards.size", "32", "--shards.samples_per_shard", "20", "--workers", "2", *more),
    ]


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shard_bytes(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in all_bytes(out / "shards").items() if not name.endswith("coverage.parquet")}


def test_folder_bucket_and_tars_give_the_same_shards(scenes: Path, tmp_path: Path) -> None:
    said: list[str] = []
    prepare(settings_of(scenes, tmp_path / "folder"), said.append)
    tars = tmp_path / "tars"
    tars.mkdir()
    for split in SPLITS:
        photos = sorted((scenes / "images" / split).iterdir())
        for number in range(2):
            with tarfile.open(tars / f"{split}_{number}.tar.gz", "w:gz") as tar:
                for photo in photos[number::2]:
                    tar.add(photo, f"{split}_{number}/{photo.name}")
    prepare(settings_of(scenes, tmp_path / "tar", images=str(tars)), said.append)
    prepare(settings_of(scenes, tmp_path / "bucket", images_from="bucket"), said.append)
    assert shard_bytes(tmp_path / "folder") == shard_bytes(tmp_path / "tar") == shard_bytes(tmp_path / "bucket")
    assert Manifest.open(tmp_path / "tar" / "shards" / "train").num_samples == 60


def test_later_releases_are_found_by_their_own_names(scenes: Path, tmp_path: Path) -> None:
    v3, v7 = scenes / "2017_11", tmp_path / "v7"
    v7.mkdir()
    for name in ("classes-trainable.txt", "class-descriptions.csv"):
        shutil.copy(v3 / name, v7 / f"oidv7-{name}")
    for split, short in (("train", "train"), ("validation", "val"), ("test", "test")):
        shutil.copy(v3 / split / "annotations-human.csv", v7 / f"oidv7-{short}-annotations-human-imagelabels.csv")
    for out, release in (("a", v3), ("b", v7)):
        prepare(settings_of(scenes, tmp_path / out, release=str(release)), lambda line: None)
    for split in SPLITS:
        old, new = (LabelTable.open(str(tmp_path / out / "labels" / f"{split}.arrow")) for out in "ab")
        assert (new.digest, new.names) == (old.digest, old.names)
    (v7 / "oidv7-val-annotations-human-imagelabels.csv").unlink()
    with pytest.raises(DataError, match=r"holds no oidv7-val-annotations-human-imagelabels\.csv for 'validation'"):
        prepare(settings_of(scenes, tmp_path / "c", release=str(v7)), lambda line: None)


def test_what_is_missing_ends_in_the_coverage_report(scenes: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for split in SPLITS:
        (images / split).mkdir(parents=True)
        for photo in sorted((scenes / "images" / split).iterdir())[::2]:
            (images / split / photo.name).write_bytes(photo.read_bytes())
    said: list[str] = []
    out = tmp_path / "out"
    prepare(settings_of(scenes, out, images=str(images), only_labelled=True), said.append)
    assert any(line.startswith("ATTENTION: 50.0% OF THE LABELLED IMAGES ARE MISSING") for line in said)
    assert any("30 rejected (30 of them wanted and not found), see rejects.csv" in line for line in said)
    assert any(line.endswith(": wanted, but in no source") for line in said)
    coverage = pq.read_table(out / "shards" / "train" / "coverage.parquet")
    totals = json.loads(coverage.schema.metadata[b"paml"])
    assert (totals["images_found"], totals["images_missing"]) == (30, 30)
    table, manifest = LabelTable.open(str(out / "labels" / "train.arrow")), Manifest.open(out / "shards" / "train")
    labels = table.lookup(table.rows_of(manifest.keys()))
    found = sum(coverage["positives_found"].to_pylist()) + sum(coverage["negatives_found"].to_pylist())
    assert found == len(labels.cls)


def test_the_plan_tells_images_and_bytes_and_writes_nothing(scenes: Path, tmp_path: Path) -> None:
    command = [sys.executable, PREPARE, *options_of(scenes, tmp_path / "out", "--plan", "true")]
    done = subprocess.run(
        [*command, "--prices.nodes", "1000", "--prices.node_hour", "1e6"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.split()[0] in (*SPLITS, "all")}
    assert [rows[name][1:3] for name in (*SPLITS, "all")] == [["60"] * 2, ["20"] * 2, ["20"] * 2, ["100"] * 2]
    assert "from a sample of 100 images (100 usable)" in done.stdout
    assert "16000 CPUs" in done.stdout
    money = re.search(r"US dollars: ([\d,.]+) once \(nodes ([\d,.]+), egress 0.00", done.stdout)
    assert money is not None
    assert float(money[1].replace(",", "")) > 0


def test_the_plan_reckons_with_what_the_bucket_lacks(scenes: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for split in SPLITS:
        (images / split).mkdir(parents=True)
        for photo in sorted((scenes / "images" / split).iterdir())[::2]:
            (images / split / photo.name).write_bytes(photo.read_bytes())
    said: list[str] = []
    (train,) = plan(settings_of(scenes, tmp_path / "out", images=str(images), images_from="bucket", splits=("train",)),
        cpus=4, say=said.append)  # fmt: skip
    sizes = [photo.stat().st_size for photo in (images / "train").iterdir()]
    assert (train.asked, train.images, train.sample.found, train.sample.asked) == (60, 30.0, 30, 60)
    assert train.bytes_in == pytest.approx(sum(sizes))
    prepare(settings_of(scenes, tmp_path / "made", images=str(images), splits=("train",)), said.append)
    assert train.bytes_out == pytest.approx(
        Manifest.open(tmp_path / "made" / "shards" / "train").report["bytes"], rel=0.5
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_stopped_job_goes_on_by_the_same_command(scenes: Path, tmp_path: Path) -> None:
    many = tmp_path / "images"
    for split in SPLITS:
        (many / split).mkdir(parents=True)
    photos = [encoded(picture(number, 800, 600)) for number in range(5)]
    for number in range(600):
        (many / "train" / f"{number:016x}.jpg").write_bytes(photos[number % 5])
    (many / "validation" / f"{1:016x}.jpg").write_bytes(encoded(picture(1)))
    options = options_of(scenes, tmp_path / "out", "--images", str(many), "--splits", "[train,validation]")
    options[options.index("--shards.samples_per_shard") + 1] = "200"
    partial = tmp_path / "out" / "shards" / "train" / ".partial"
    with Job([sys.executable, PREPARE, *options], tmp_path / "first.log", env=environment()) as job:
        job.until(lambda: (partial / "plan.json").exists(), "the first shards")
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(30) == 128 + signal.SIGTERM
        assert "stopped; the same command goes on" in job.output
        assert "Traceback" not in job.output
    assert not (tmp_path / "out" / "shards" / "train" / "manifest.arrow").exists()
    with Job([sys.executable, PREPARE, *options], tmp_path / "second.log", env=environment()) as job:
        assert job.wait(120) == 0, job.output
    options[1] = str(tmp_path / "whole")
    with Job([sys.executable, PREPARE, *options], tmp_path / "third.log", env=environment()) as job:
        assert job.wait(120) == 0, job.output
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")
    assert verify_shards(tmp_path / "out" / "shards" / "train").ok


def test_parts_that_fail_are_listed_once_all_else_is_done(scenes: Path, tmp_path: Path) -> None:
    """A folder stands where a photo should be: storage that cannot tell, not an image that is absent."""
    images = tmp_path / "images"
    shutil.copytree(scenes / "images", images)
    photo = sorted((images / "train").iterdir())[7]
    photo.rename(tmp_path / "kept.jpg")
    photo.mkdir()
    command = [sys.executable, PREPARE, *options_of(scenes, tmp_path / "out", "--images", str(images))]
    command += ["--images_from", "bucket", "--retries", "0"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr[done.stderr.index("error: ") :]
    assert last.startswith("error: 1 of 1 tasks failed")
    assert "keys-000000" in last
    assert str(photo) in last
    assert "Traceback" not in done.stderr
    for split in ("validation", "test"):
        assert Manifest.open(tmp_path / "out" / "shards" / split).num_samples == 20
    photo.rmdir()
    (tmp_path / "kept.jpg").rename(photo)
    assert subprocess.run(command, env=environment(), capture_output=True, timeout=120).returncode == 0
    assert Manifest.open(tmp_path / "out" / "shards" / "train").num_samples == 60


def test_ones_own_images_and_labels(tmp_path: Path) -> None:
    images = tmp_path / "photos"
    images.mkdir()
    for number in range(12):
        (images / f"photo {number}.png").write_bytes(encoded(picture(number), "PNG"))
    rows = {"train": range(8), "test": range(8, 12)}
    for split, numbers in rows.items():
        lines = [f"photo {n}.png,{'cat;dog' if n % 2 else 'dog'}" for n in numbers]
        (tmp_path / f"{split}.csv").write_text("\n".join(["image,labels", *lines]) + "\n")
    settings = PrepareSettings(
        out=str(tmp_path / "out"),
        images=str(images),
        splits=("train", "test"),
        own=OwnSettings(labels=str(tmp_path / "{split}.csv"), complete=True),
        shards=SMALL,
        workers=1,
    )
    prepare(settings, lambda line: None)
    for split, numbers in rows.items():
        table = LabelTable.open(str(tmp_path / "out" / "labels" / f"{split}.arrow"))
        manifest = Manifest.open(tmp_path / "out" / "shards" / split)
        assert table.classes == ("cat", "dog")
        assert set(manifest.keys().to_pylist()) == {f"photo {n}" for n in numbers} == set(table.keys())
        assert manifest.report["rejected"] == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"single_positive_seed": 1}, "needs full_labels"),
        ({"annotations": "a.csv"}, r"must contain \{split\}"),
        ({"flickr": True, "images_from": "tars"}, "tar files tell too late"),
        ({"own": OwnSettings(labels="a.csv"), "full_labels": "full"}, "leave one of them out"),
        ({"splits": ()}, "name train, validation or test"),
        ({"retries": -1}, "0 or more"),
    ],
)
def test_settings_that_contradict_are_refused(changes: dict, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        PrepareSettings(**changes)


def test_relative_paths_begin_at_the_base() -> None:
    settings = PrepareSettings(
        out="s3://bucket/out", release="a/2017_11", release_from="https://some.where/x", images="/photos",
        verdicts=("mine.csv", "/other.csv", "s3://bucket/third.csv"),
    )  # fmt: skip
    moved = at_absolute_paths(settings, "/base")
    assert (moved.out, moved.release, moved.release_from, moved.images, moved.full_labels) == (
        "s3://bucket/out",
        "/base/a/2017_11",
        "https://some.where/x",
        "/photos",
        None,
    )
    assert moved.verdicts == ("/base/mine.csv", "/other.csv", "s3://bucket/third.csv")
