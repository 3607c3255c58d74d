"""What people give by mistake, through the real jobs: each ends in one message that says what to do."""

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from paml.labels import LabelTable
from paml.shards.manifest import Manifest
from paml.sources.digit_scenes import MIDS
from tests.helpers.jobs import ROOT, environment, newest_step, prepare_scenes, tiny_options, write_scenes

Run = Callable[..., tuple[int, str]]


def load(name: str) -> ModuleType:
    """A job as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "jobs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], record_property: Callable) -> Run:
    """Runs jobs/<name>.py in this process; gives its exit status and all that it said."""

    def run_job(name: str, *options: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", *map(str, options)])
        capsys.readouterr()
        try:
            status = load(name).main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        said = "".join(capsys.readouterr())
        assert "Traceback" not in said
        record_property("message", said.strip().splitlines()[-1] if said.strip() else "")
        return status, said

    return run_job


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("bad") / "scenes", train=30, others=8)


@pytest.fixture(scope="module")
def data(scenes: Path) -> Path:
    return prepare_scenes(scenes, scenes.parent / "data")


@pytest.fixture
def copy(scenes: Path, tmp_path: Path) -> Path:
    """Scenes that a test may spoil."""
    return Path(shutil.copytree(scenes, tmp_path / "scenes"))


@pytest.fixture
def prepared(data: Path, tmp_path: Path) -> Path:
    """A prepared folder that a test may spoil."""
    return Path(shutil.copytree(data, tmp_path / "data"))


def preparing(scenes: Path, out: Path, *more: object) -> list[object]:
    """Options of the preparing job, train split alone."""
    return [
        "--release", scenes / "2017_11", "--images", scenes / "images", "--out", out, "--splits", '["train"]',
        "--shards.size", 32, "--shards.samples_per_shard", 15, "--workers", 1, *more,
    ]  # fmt: skip


def annotations(scenes: Path) -> Path:
    return scenes / "2017_11" / "train" / "annotations-human.csv"


def small(data: Path, runs: Path, **options: object) -> list[str]:
    """Options of a run of one epoch of 3 steps in this process."""
    return tiny_options(data, runs, "run", **({"epochs": 1, "batch_size": 10} | options))


# Annotation files


def test_wrong_header(run: Run, copy: Path, tmp_path: Path):
    file = annotations(copy)
    file.write_text(file.read_text().replace("ImageID,Source,LabelName,Confidence", "image,label,state", 1))
    status, said = run("prepare_openimages", *preparing(copy, tmp_path / "out"))
    assert status == 1
    assert f"error: annotation file '{file}' has a wrong header" in said
    assert "expected 'ImageID,Source,LabelName,Confidence'" in said
    assert "found 'image,label,state'" in said


def test_empty_annotations(run: Run, copy: Path, tmp_path: Path):
    annotations(copy).write_text("")
    status, said = run("prepare_openimages", *preparing(copy, tmp_path / "out"))
    assert status == 1
    assert str(annotations(copy)) in said
    assert "empty" in said


def test_unknown_class_is_counted_and_kept_aside(run: Run, copy: Path, tmp_path: Path, record_property: Callable):
    with annotations(copy).open("a") as file:
        file.write("00000000000000aa,verification,/m/unheard,1\n")
    status, said = run("prepare_openimages", *preparing(copy, tmp_path / "out"))
    assert status == 0
    (line,) = [line for line in said.splitlines() if "unknown class" in line]
    record_property("message", line)
    assert "unknown class 1," in line
    assert list((tmp_path / "out" / "labels").glob("*rejects*"))


def test_pair_both_positive_and_negative(run: Run, copy: Path, tmp_path: Path, record_property: Callable):
    with annotations(copy).open() as file:
        key, _, mid, state = list(csv.reader(file))[1]
    with annotations(copy).open("a") as file:
        file.write(f"{key},verification,{mid},{1 - int(state)}\n")
    status, said = run("prepare_openimages", *preparing(copy, tmp_path / "out"))
    assert status == 0
    (line,) = [line for line in said.splitlines() if "contradiction" in line]
    record_property("message", line)
    assert "contradiction 0" not in line

    status, said = run("prepare_openimages", *preparing(copy, tmp_path / "strict", "--labels.conflict", "error"))
    assert status == 1
    assert mid in said


# Images and shards


def test_truncated_photo_is_named(run: Run, copy: Path, tmp_path: Path, record_property: Callable):
    photo = sorted((copy / "images" / "train").iterdir())[3]
    photo.write_bytes(photo.read_bytes()[:200])
    status, said = run("prepare_openimages", *preparing(copy, tmp_path / "out"))
    assert status == 0
    assert "1 rejected" in said
    (line,) = [line for line in said.splitlines() if "  rejected: " in line]
    record_property("message", line)
    assert photo.stem in line
    assert photo.stem in (tmp_path / "out" / "shards" / "train" / "rejects.csv").read_text()


def test_cut_source_tar_is_named(run: Run, copy: Path, tmp_path: Path, record_property: Callable):
    photos = copy / "images" / "train"
    tar = tmp_path / "tars" / "train_0.tar"
    tar.parent.mkdir()
    subprocess.run(["tar", "cf", str(tar), "-C", str(photos.parent), "train"], check=True)
    tar.write_bytes(tar.read_bytes()[:15_000])
    status, said = run("prepare_openimages", *preparing(copy, tmp_path / "out", "--images", tar.parent))
    (line,) = [line for line in said.splitlines() if "  rejected: " in line]
    record_property("message", line)
    assert status == 0
    assert str(tar) in line
    assert "cut" in line


def test_no_images(run: Run, copy: Path, tmp_path: Path):
    status, said = run("prepare_openimages", *preparing(copy, tmp_path / "out", "--images", tmp_path))
    assert status == 1
    assert "no images of split 'train'" in said


def test_flipped_byte_in_a_shard(run: Run, prepared: Path, tmp_path: Path):
    manifest = Manifest.open(str(prepared / "shards" / "train"))
    shard = prepared / "shards" / "train" / manifest.shards[int(manifest.shard[5])].name
    content = bytearray(shard.read_bytes())
    content[int(manifest.offset[5]) + 100] ^= 0x10
    key = manifest.key(5)
    shard.write_bytes(content)
    status, said = run("train_openimages", *small(prepared, tmp_path / "runs"))
    assert status == 1
    assert key in said
    assert "CRC-32" in said
    assert "data.max_bad_share" in said


def test_cut_shard(run: Run, prepared: Path, tmp_path: Path):
    shard = sorted((prepared / "shards" / "train").glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:9_000])
    status, said = run("train_openimages", *small(prepared, tmp_path / "runs"))
    assert status == 1
    assert shard.name in said


# Storage


def test_file_where_the_runs_should_be(run: Run, data: Path, tmp_path: Path):
    (tmp_path / "runs").write_text("")
    status, said = run("train_openimages", *small(data, tmp_path / "runs"))
    assert status == 1
    assert str(tmp_path / "runs") in said
    assert "a file" in said


def test_file_where_the_shards_should_be(run: Run, scenes: Path, tmp_path: Path):
    (tmp_path / "out").write_text("")
    status, said = run("prepare_openimages", *preparing(scenes, tmp_path / "out"))
    assert status == 1
    assert str(tmp_path / "out") in said


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small file system of its own; needs root."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted: list[Path] = []

    def small_disk(size: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(place)
        return place

    yield small_disk
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_disk_full_while_training(run: Run, data: Path, mount: Callable[..., Path]):
    disk = mount("3m")
    status, said = run("train_openimages", *small(data, disk / "runs"))
    assert status == 1
    assert str(disk) in said
    assert "full" in said or "space" in said


def test_disk_full_while_preparing(run: Run, scenes: Path, mount: Callable[..., Path]):
    disk = mount("40k")
    status, said = run("prepare_openimages", *preparing(scenes, disk / "out"))
    assert status == 1
    assert str(disk) in said
    assert "full" in said or "space" in said


def test_read_only_storage(run: Run, data: Path, mount: Callable[..., Path]):
    disk = mount("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    status, said = run("train_openimages", *small(data, disk / "runs"))
    assert status == 1
    assert str(disk) in said
    assert "read-only" in said.lower()


# Settings


def test_unknown_setting(run: Run, data: Path, tmp_path: Path):
    status, said = run("train_openimages", *small(data, tmp_path / "runs"), "--loss.alhpa", 1)
    assert status == 2
    assert "alhpa" in said


def test_value_out_of_range(run: Run, data: Path, tmp_path: Path):
    status, said = run("train_openimages", *small(data, tmp_path / "runs"), "--boost.train", 0.5)
    assert status == 2
    assert "0.5" in said
    assert "at least 1" in said


def test_label_setting_out_of_range(run: Run, scenes: Path, tmp_path: Path):
    status, said = run("prepare_openimages", *preparing(scenes, tmp_path / "out", "--labels.threads", -1))
    assert status == 2
    assert "labels.threads is -1" in said


def test_a_recipe_replaces_the_default_one(run: Run, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 7\n")
    status, said = run("train_openimages", "--config", recipe, "--print_config")
    assert status == 0
    assert "epochs: 7" in said
    assert "eval_also: []" in said
    assert "every_steps: null" in said


def test_unknown_setting_in_a_recipe(run: Run, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lost: {name: an}\n")
    status, said = run("train_openimages", "--config", recipe)
    assert status == 2
    assert "lost" in said


def test_no_data_at_all_names_the_two_commands(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable
):
    monkeypatch.chdir(tmp_path)
    status, said = run("train_openimages", "--workers.num_workers", 0)
    record_property("message", said)
    assert status == 1
    assert "data/openimages_v3" in said
    assert "https://storage.googleapis.com/openimages/2017_11/" in said
    assert "python jobs/prepare_openimages.py --config jobs/recipes/openimages_v3_data.yaml" in said
    assert (ROOT / "jobs" / "recipes" / "openimages_v3_data.yaml").exists()
    assert not (tmp_path / "runs").exists()


# Runs


def test_runs_that_cannot_be_begun_or_resumed(run: Run, prepared: Path, tmp_path: Path):
    runs = tmp_path / "runs"
    status, said = run("train_openimages", *small(prepared, runs), "--run.resume", "true")
    assert status == 1
    assert "there is no run" in said

    for _ in range(2):  # begun, and taken up at its end
        assert run("train_openimages", *small(prepared, runs), "--run.resume", "auto")[0] == 0
    status, said = run("train_openimages", *small(prepared, runs))
    assert status == 1
    assert f"a run {runs / 'run'} exists" in said
    assert "--run.resume true" in said

    status, said = run("train_openimages", *small(prepared, runs, optimiser__learning_rate=0.5), "--run.resume", "true")
    assert status == 1
    assert "optimiser.learning_rate: 0.001 then, 0.5 now" in said


def test_more_classes_than_the_head(run: Run, prepared: Path, tmp_path: Path):
    scenes, runs = Path(shutil.copytree(prepared.parents[0] / "data", tmp_path / "again")), tmp_path / "runs"
    assert run("train_openimages", *small(prepared, runs))[0] == 0
    for split in ("train", "validation", "test"):
        more_classes(scenes / "labels" / f"{split}.arrow")
    status, said = run("train_openimages", *small(scenes, runs), "--run.resume", "true")
    assert status == 1
    assert f"{len(MIDS) + 1} classes" in said
    assert str(len(MIDS)) in said
    assert newest_step(runs / "run") == 3


def more_classes(path: Path) -> None:
    """Write the table anew with one class more at the end."""
    import numpy as np

    from paml.labels import table_from_triples

    table = LabelTable.open(str(path))
    rows = np.arange(table.num_images)
    found = table.lookup(rows)
    keys = table.keys(rows)
    path.unlink()
    table_from_triples(
        keys, [*table.classes, "/m/more"], [*table.names, "more"], found.image, found.cls, found.state, str(path)
    )


def test_exit_status_and_message_of_the_process(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "train_openimages.py"), "--data.root", str(tmp_path / "nothing")],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert str(tmp_path / "nothing") in done.stderr
    assert "Traceback" not in done.stderr
