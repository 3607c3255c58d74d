"""`paml prepare`: sources, plan, interruption, failed parts, and data with label files."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from paml.distributed.prepare import with_absolute_paths
from paml.errors import DataError, LabelError, SettingsError
from paml.labels import LabelTable
from paml.preparation.plan import plan
from paml.preparation.prepare import prepare
from paml.preparation.settings import OpenImagesSettings, PrepareSettings
from paml.shards import Manifest, ShardSettings, verify_shards
from tests.helpers.jobs import PREPARE, Job, environment, write_scenes
from tests.shards.images import encoded, gradient

SPLITS = ("train", "validation", "test")
SMALL = ShardSettings(size=32, samples_per_shard=20)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=60, others=20)


def settings_of(scenes: Path, out: Path, **changes: object) -> PrepareSettings:
    given: dict[str, object] = {
        "out": str(out),
        "labels": str(scenes / "2017_11"),
        "images": str(scenes / "images"),
        "shards": SMALL,
        "workers": 2,
    }
    return PrepareSettings(**{**given, **changes})  # pyright: ignore[reportArgumentType]


def options_of(scenes: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--out", str(out), "--labels", str(scenes / "2017_11"), "--images", str(scenes / "images")),
        *("--shards.size", "32", "--shards.samples_per_shard", "20", "--workers", "2", *more),
    ]


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shard_bytes(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in all_bytes(out / "shards").items() if not name.endswith("coverage.parquet")}


def test_folder_bucket_and_tars_yield_the_same_shards(scenes: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    prepare(settings_of(scenes, tmp_path / "folder"), lines.append)
    tars = tmp_path / "tars"
    tars.mkdir()
    for split in SPLITS:
        images = sorted((scenes / "images" / split).iterdir())
        for number in range(2):
            with tarfile.open(tars / f"{split}_{number}.tar.gz", "w:gz") as tar:
                for image in images[number::2]:
                    tar.add(image, f"{split}_{number}/{image.name}")
    prepare(settings_of(scenes, tmp_path / "tar", images=str(tars)), lines.append)
    prepare(settings_of(scenes, tmp_path / "bucket", images_from="bucket"), lines.append)
    assert shard_bytes(tmp_path / "folder") == shard_bytes(tmp_path / "tar") == shard_bytes(tmp_path / "bucket")
    assert Manifest.open(tmp_path / "tar" / "shards" / "train").num_samples == 60


def test_file_names_of_later_releases(scenes: Path, tmp_path: Path) -> None:
    v3, v7 = scenes / "2017_11", tmp_path / "v7"
    v7.mkdir()
    for name in ("classes-trainable.txt", "class-descriptions.csv"):
        shutil.copy(v3 / name, v7 / f"oidv7-{name}")
    for split, short in (("train", "train"), ("validation", "val"), ("test", "test")):
        shutil.copy(v3 / split / "annotations-human.csv", v7 / f"oidv7-{short}-annotations-human-imagelabels.csv")
    for out, release in (("a", v3), ("b", v7)):
        prepare(settings_of(scenes, tmp_path / out, labels=str(release)), lambda line: None)
    for split in SPLITS:
        old, new = (LabelTable.open(str(tmp_path / out / "labels" / f"{split}.arrow")) for out in "ab")
        assert (new.digest, new.names) == (old.digest, old.names)
    (v7 / "oidv7-val-annotations-human-imagelabels.csv").unlink()
    with pytest.raises(DataError, match=r"no oidv7-val-annotations-human-imagelabels\.csv for 'validation'"):
        prepare(settings_of(scenes, tmp_path / "c", labels=str(v7)), lambda line: None)


def test_missing_images_are_reported(scenes: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for split in SPLITS:
        (images / split).mkdir(parents=True)
        for image in sorted((scenes / "images" / split).iterdir())[::2]:
            (images / split / image.name).write_bytes(image.read_bytes())
    lines: list[str] = []
    out = tmp_path / "out"
    report = prepare(settings_of(scenes, out, images=str(images), only_labeled=True), lines.append)
    assert any(line.startswith("WARNING: 50.0% of the labeled images are missing") for line in lines)
    assert (report.splits["train"].shards.rejected, report.splits["train"].shards.missing) == (30, 30)
    assert sum(line.startswith("  rejected: ") for line in lines) == 9
    coverage = pq.read_table(out / "shards" / "train" / "coverage.parquet")
    totals = json.loads(coverage.schema.metadata[b"paml"])
    assert (totals["images_found"], totals["images_missing"]) == (30, 30)
    table, manifest = LabelTable.open(str(out / "labels" / "train.arrow")), Manifest.open(out / "shards" / "train")
    labels = table.lookup(table.rows_of(manifest.keys()))
    found = sum(coverage["positives_found"].to_pylist()) + sum(coverage["negatives_found"].to_pylist())
    assert found == len(labels.cls)


def test_plan_writes_nothing(scenes: Path, tmp_path: Path) -> None:
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
    cost = re.search(r"([\d,.]+) US dollars", done.stdout)
    assert cost is not None
    assert float(cost[1].replace(",", "")) > 0


def test_plan_accounts_for_missing_images(scenes: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for split in SPLITS:
        (images / split).mkdir(parents=True)
        for image in sorted((scenes / "images" / split).iterdir())[::2]:
            (images / split / image.name).write_bytes(image.read_bytes())
    lines: list[str] = []
    (train,) = plan(settings_of(scenes, tmp_path / "out", images=str(images), images_from="bucket", splits=("train",)),
        cpus=4, log=lines.append)  # fmt: skip
    sizes = [image.stat().st_size for image in (images / "train").iterdir()]
    assert (train.requested, train.images, train.usable, train.sampled) == (60, 30.0, 30, 60)
    assert train.bytes_in == pytest.approx(sum(sizes))
    prepare(settings_of(scenes, tmp_path / "made", images=str(images), splits=("train",)), lines.append)
    assert train.bytes_out == pytest.approx(
        Manifest.open(tmp_path / "made" / "shards" / "train").report["bytes"], rel=0.5
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_stopped_command_resumes(scenes: Path, tmp_path: Path) -> None:
    many = tmp_path / "images"
    for split in SPLITS:
        (many / split).mkdir(parents=True)
    images = [encoded(gradient(number, 800, 600)) for number in range(5)]
    labeled = [image.name for image in (scenes / "images" / "train").iterdir()]
    for number, name in enumerate([*labeled, *(f"{number:016x}.jpg" for number in range(540))]):
        (many / "train" / name).write_bytes(images[number % 5])
    for image in (scenes / "images" / "validation").iterdir():
        (many / "validation" / image.name).write_bytes(encoded(gradient(1)))
    options = options_of(scenes, tmp_path / "out", "--images", str(many), "--splits", "[train,validation]")
    options[options.index("--shards.samples_per_shard") + 1] = "200"
    partial = tmp_path / "out" / "shards" / "train" / ".partial"
    with Job([sys.executable, PREPARE, *options], tmp_path / "first.log", env=environment()) as job:
        job.until(lambda: (partial / "plan.json").exists(), "the first shards")
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(30) == 128 + signal.SIGTERM
        assert "stopped; repeat the command to continue" in job.output
        assert "Traceback" not in job.output
    assert not (tmp_path / "out" / "shards" / "train" / "manifest.arrow").exists()
    with Job([sys.executable, PREPARE, *options], tmp_path / "second.log", env=environment()) as job:
        assert job.wait(120) == 0, job.output
    options[1] = str(tmp_path / "whole")
    with Job([sys.executable, PREPARE, *options], tmp_path / "third.log", env=environment()) as job:
        assert job.wait(120) == 0, job.output
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")
    assert verify_shards(tmp_path / "out" / "shards" / "train").ok


def test_failed_parts_are_listed_after_the_rest_is_done(scenes: Path, tmp_path: Path) -> None:
    """A folder in place of an image is a storage error, not a missing image."""
    images = tmp_path / "images"
    shutil.copytree(scenes / "images", images)
    image = sorted((images / "train").iterdir())[7]
    image.rename(tmp_path / "backup.jpg")
    image.mkdir()
    command = [sys.executable, PREPARE, *options_of(scenes, tmp_path / "out", "--images", str(images))]
    command += ["--images_from", "bucket", "--retries", "0"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr[done.stderr.index("error: ") :]
    assert last.startswith("error: 1 of 1 tasks failed")
    assert "files-000000" in last
    assert str(image) in last
    assert "Traceback" not in done.stderr
    for split in ("validation", "test"):
        assert Manifest.open(tmp_path / "out" / "shards" / split).num_samples == 20
    image.rmdir()
    (tmp_path / "backup.jpg").rename(image)
    assert subprocess.run(command, env=environment(), capture_output=True, timeout=120).returncode == 0
    assert Manifest.open(tmp_path / "out" / "shards" / "train").num_samples == 60


def write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        (folder / f"image {number}.png").write_bytes(encoded(gradient(number), "PNG"))


def write_labels(path: Path, numbers: Iterable[int]) -> None:
    lines = [f"image {n}.png,{'cat;dog' if n % 2 else 'dog'}" for n in numbers]
    path.write_text("\n".join(["image,labels", *lines]) + "\n")


def test_images_and_a_label_file_per_split(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 12)
    rows = {"train": range(8), "test": range(8, 12)}
    for split, numbers in rows.items():
        write_labels(tmp_path / f"{split}.csv", numbers)
    settings = PrepareSettings(
        out=str(tmp_path / "out"),
        images=str(tmp_path / "images"),
        splits=("train", "test"),
        labels=str(tmp_path / "{split}.csv"),
        unlisted=dict.fromkeys(("train", "test"), "negative"),
        shards=SMALL,
        workers=1,
    )
    report = prepare(settings, lambda line: None)
    for split, numbers in rows.items():
        table = LabelTable.open(str(tmp_path / "out" / "labels" / f"{split}.arrow"))
        manifest = Manifest.open(tmp_path / "out" / "shards" / split)
        assert table.classes == ("cat", "dog")
        assert set(manifest.keys().to_pylist()) == {f"image {n}" for n in numbers} == set(table.keys())
        assert report.splits[split].shards.written == len(numbers)
        assert report.splits[split].table.digest == table.digest
        assert report.splits[split].coverage.found_fraction == 1
    assert "train: 8 images, 16 labels, 0 images rejected" in str(report)


def test_one_label_file_is_divided_into_splits(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 40)
    write_labels(tmp_path / "labels.csv", range(40))
    settings = PrepareSettings(
        out=str(tmp_path / "out"),
        images=str(tmp_path / "images"),
        labels=str(tmp_path / "labels.csv"),
        split="0.5,0.25,0.25",
        unlisted=dict.fromkeys(SPLITS, "negative"),
        shards=SMALL,
        workers=1,
    )
    report = prepare(settings, lambda line: None)
    keys = [set(Manifest.open(tmp_path / "out" / "shards" / split).keys().to_pylist()) for split in SPLITS]
    assert set.union(*keys) == {f"image {n}" for n in range(40)}
    assert sum(map(len, keys)) == 40
    assert all(len(split) >= 4 for split in keys)
    assert {report.splits[split].table.classes for split in SPLITS} == {("cat", "dog")}
    with pytest.raises(DataError, match="'test'"):
        prepare(dataclasses.replace(settings, split="0.5,0.5,0"), lambda line: None)
    with pytest.raises(DataError, match=r"missing.csv"):
        prepare(dataclasses.replace(settings, labels=str(tmp_path / "missing.csv")), lambda line: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "two-positives"}, "protocol is 'two-positives'"),
        ({"openimages": OpenImagesSettings(flickr=True), "images_from": "tars"}, "images_from tars"),
        ({"images_from": "none", "verdicts": ("a.csv",)}, "verdicts"),
        ({"split_names": {"train": "x", "test": "x"}}, "split_names"),
        ({"split": "0.5,0.5"}, "split is '0.5,0.5'"),
        ({"split": "0.5,0.5,0.1"}, "add up to 1"),
        ({"unlisted": {"train": "absent"}}, "unlisted is .*absent"),
        ({"splits": ("train", "val")}, "splits is .*val"),
        ({"images_from": "disk"}, "'disk'; it must be one of auto, folder, bucket, tars"),
        ({"splits": ()}, "splits is \\(\\)"),
        ({"retries": -1}, "retries is -1"),
    ],
)
def test_contradicting_settings(changes: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        PrepareSettings(**changes)


@pytest.mark.parametrize("changes", [{}, {"labels": "labels-{split}.csv"}])
def test_missing_input_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((DataError, LabelError)):
        prepare(PrepareSettings(**changes), lambda line: None)
    assert not any(tmp_path.iterdir())


def test_relative_paths() -> None:
    settings = PrepareSettings(
        out="s3://bucket/out", labels="a/2017_11", images="/images",
        openimages=OpenImagesSettings(download_from="https://some.where/x"),
        verdicts=("mine.csv", "/other.csv", "s3://bucket/third.csv"),
    )  # fmt: skip
    moved = with_absolute_paths(settings, "/base")
    assert (moved.out, moved.labels, moved.openimages.download_from, moved.images, moved.full_labels) == (
        "s3://bucket/out",
        "/base/a/2017_11",
        "https://some.where/x",
        "/images",
        None,
    )
    assert moved.verdicts == ("/base/mine.csv", "/other.csv", "s3://bucket/third.csv")
