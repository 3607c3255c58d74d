"""Mistakes of users, through the commands: each ends in one message that names the value and the fix."""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paml.cli import main
from paml.labels import LabelTable
from paml.shards.manifest import Manifest
from paml.sources.digit_scenes import MIDS
from tests.helpers.jobs import PAML, TRAIN, environment, newest_step, prepare_scenes, tiny_options, write_scenes

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], record_property: Callable) -> Run:
    """Runs a command of paml in this process; returns its exit status and its output."""

    def run_command(name: str, *options: object) -> tuple[int, str]:
        capsys.readouterr()
        try:
            status = main([name, *map(str, options)])
        except SystemExit as stop:
            status = int(stop.code or 0)
        output = "".join(capsys.readouterr())
        assert "Traceback" not in output
        record_property("message", output.strip().splitlines()[-1] if output.strip() else "")
        return status, output

    return run_command


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("bad") / "scenes", train=30, others=8)


@pytest.fixture(scope="module")
def data(scenes: Path) -> Path:
    return prepare_scenes(scenes, scenes.parent / "data")


@pytest.fixture
def copy(scenes: Path, tmp_path: Path) -> Path:
    """Scenes that a test may change."""
    return Path(shutil.copytree(scenes, tmp_path / "scenes"))


@pytest.fixture
def prepared(data: Path, tmp_path: Path) -> Path:
    """A prepared folder that a test may change."""
    return Path(shutil.copytree(data, tmp_path / "data"))


def prepare_options(scenes: Path, out: Path, *more: object) -> list[object]:
    """Options of `paml prepare` for the train split only."""
    return [
        "--labels", scenes / "2017_11", "--images", scenes / "images", "--out", out, "--splits", '["train"]',
        "--shards.size", 32, "--shards.samples_per_shard", 15, "--workers", 1, *more,
    ]  # fmt: skip


def annotations(scenes: Path) -> Path:
    return scenes / "2017_11" / "train" / "annotations-human.csv"


def train_options(data: Path, runs: Path, **options: object) -> list[str]:
    """Options of `paml train` for one epoch of 3 steps."""
    defaults = {"epochs": 1, "batch_size": 10, "loss__reject_rate_step": 0.01}
    return tiny_options(data, runs, "run", **(defaults | options))


# Annotation files


def test_wrong_header(run: Run, copy: Path, tmp_path: Path):
    file = annotations(copy)
    file.write_text(file.read_text().replace("ImageID,Source,LabelName,Confidence", "image,label,state", 1))
    status, output = run("prepare", *prepare_options(copy, tmp_path / "out"))
    assert status == 1
    assert str(file) in output
    assert "ImageID,Source,LabelName,Confidence" in output
    assert "image,label,state" in output


def test_empty_annotations(run: Run, copy: Path, tmp_path: Path):
    annotations(copy).write_text("")
    status, output = run("prepare", *prepare_options(copy, tmp_path / "out"))
    assert status == 1
    assert str(annotations(copy)) in output
    assert "empty" in output


def test_unknown_class_is_counted_and_written_to_the_rejects(
    run: Run, copy: Path, tmp_path: Path, record_property: Callable
):
    with annotations(copy).open("a") as file:
        file.write("00000000000000aa,verification,/m/unheard,1\n")
    status, output = run("prepare", *prepare_options(copy, tmp_path / "out"))
    assert status == 0
    (line,) = [line for line in output.splitlines() if "unknown class" in line]
    record_property("message", line)
    assert "unknown class 1" in line
    assert list((tmp_path / "out" / "labels").glob("*rejects*"))


def test_pair_both_positive_and_negative(run: Run, copy: Path, tmp_path: Path, record_property: Callable):
    with annotations(copy).open() as file:
        key, _, mid, state = list(csv.reader(file))[1]
    with annotations(copy).open("a") as file:
        file.write(f"{key},verification,{mid},{1 - int(state)}\n")
    status, output = run("prepare", *prepare_options(copy, tmp_path / "out"))
    assert status == 0
    (line,) = [line for line in output.splitlines() if "contradiction" in line]
    record_property("message", line)
    assert "contradiction 0" not in line

    status, output = run("prepare", *prepare_options(copy, tmp_path / "strict", "--label_table.conflict", "error"))
    assert status == 1
    assert mid in output


# Images and shards


def test_truncated_image_is_named(run: Run, copy: Path, tmp_path: Path, record_property: Callable):
    image = sorted((copy / "images" / "train").iterdir())[3]
    image.write_bytes(image.read_bytes()[:200])
    status, output = run("prepare", *prepare_options(copy, tmp_path / "out"))
    assert status == 0
    assert "1 rejected" in output
    (line,) = [line for line in output.splitlines() if "  rejected: " in line]
    record_property("message", line)
    assert image.stem in line
    assert image.stem in (tmp_path / "out" / "shards" / "train" / "rejects.csv").read_text()


def test_truncated_source_tar_is_named(run: Run, copy: Path, tmp_path: Path, record_property: Callable):
    images = copy / "images" / "train"
    tar = tmp_path / "tars" / "train_0.tar"
    tar.parent.mkdir()
    subprocess.run(["tar", "cf", str(tar), "-C", str(images.parent), "train"], check=True)
    content = tar.read_bytes()
    tar.write_bytes(content[: len(content) * 3 // 4])
    status, output = run("prepare", *prepare_options(copy, tmp_path / "out", "--images", tar.parent))
    (line,) = [line for line in output.splitlines() if "  rejected: " in line]
    record_property("message", line)
    assert status == 0
    assert str(tar) in line
    assert "cut" in line or "truncated" in line
    tar.write_bytes(content[:15_000])
    status, output = run("prepare", *prepare_options(copy, tmp_path / "out2", "--images", tar.parent))
    assert status == 1
    assert "min_found" in output.splitlines()[-1]


def test_no_images(run: Run, copy: Path, tmp_path: Path):
    status, output = run("prepare", *prepare_options(copy, tmp_path / "out", "--images", tmp_path))
    assert status == 1
    assert "'train'" in output
    assert str(tmp_path) in output


def test_flipped_byte_in_a_shard(run: Run, prepared: Path, tmp_path: Path):
    manifest = Manifest.open(str(prepared / "shards" / "train"))
    shard = prepared / "shards" / "train" / manifest.shards[int(manifest.shard[5])].name
    content = bytearray(shard.read_bytes())
    content[int(manifest.offset[5]) + 100] ^= 0x10
    key = manifest.key(5)
    shard.write_bytes(content)
    status, output = run("train", *train_options(prepared, tmp_path / "runs"))
    assert status == 1
    assert key in output
    assert "CRC-32" in output
    assert "data.max_bad_fraction" in output


def test_truncated_shard(run: Run, prepared: Path, tmp_path: Path):
    shard = sorted((prepared / "shards" / "train").glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:9_000])
    status, output = run("train", *train_options(prepared, tmp_path / "runs"))
    assert status == 1
    assert shard.name in output


# Storage


def test_a_file_in_place_of_the_runs_folder(run: Run, data: Path, tmp_path: Path):
    (tmp_path / "runs").write_text("")
    status, output = run("train", *train_options(data, tmp_path / "runs"))
    assert status == 1
    assert str(tmp_path / "runs") in output
    assert "a file" in output


def test_a_file_in_place_of_the_output_folder(run: Run, scenes: Path, tmp_path: Path):
    (tmp_path / "out").write_text("")
    status, output = run("prepare", *prepare_options(scenes, tmp_path / "out"))
    assert status == 1
    assert str(tmp_path / "out") in output


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system of a given size; needs root."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted: list[Path] = []

    def small_disk(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"mounting is not permitted: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield small_disk
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_full_while_training(run: Run, data: Path, mount: Callable[..., Path]):
    disk = mount("3m")
    status, output = run("train", *train_options(data, disk / "runs"))
    assert status == 1
    assert str(disk) in output
    assert "full" in output or "space" in output


def test_disk_full_while_preparing(run: Run, scenes: Path, mount: Callable[..., Path]):
    disk = mount("40k")
    status, output = run("prepare", *prepare_options(scenes, disk / "out"))
    assert status == 1
    assert str(disk) in output
    assert "full" in output or "space" in output


def test_read_only_storage(run: Run, data: Path, mount: Callable[..., Path]):
    disk = mount("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    status, output = run("train", *train_options(data, disk / "runs"))
    assert status == 1
    assert str(disk) in output
    assert "read-only" in output.lower()


# Settings


def test_unknown_setting(run: Run, data: Path, tmp_path: Path):
    status, output = run("train", *train_options(data, tmp_path / "runs"), "--loss.alhpa", 1)
    assert status == 2
    assert "alhpa" in output


def test_value_out_of_range(run: Run, data: Path, tmp_path: Path):
    status, output = run("train", *train_options(data, tmp_path / "runs"), "--boost.train", 0.5)
    assert status == 2
    assert "0.5" in output
    assert "boost.train" in output


def test_label_setting_out_of_range(run: Run, scenes: Path, tmp_path: Path):
    status, output = run("prepare", *prepare_options(scenes, tmp_path / "out", "--label_table.threads", -1))
    assert status == 2
    assert "threads is -1" in output
    assert "-1" in output


def test_no_recipe_is_loaded_unless_it_is_named(run: Run, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 7\n")
    status, output = run("train", "--config", recipe, "--print_config")
    assert status == 0
    assert "epochs: 7" in output
    assert "num_workers: 0" in output
    assert "eval_also: []" in output
    assert "every_steps: null" in output


def test_unknown_setting_in_a_recipe(run: Run, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lost: {name: an}\n")
    status, output = run("train", "--config", recipe)
    assert status == 2
    assert "lost" in output


# Runs


def test_runs_that_cannot_start_or_resume(run: Run, prepared: Path, tmp_path: Path):
    runs = tmp_path / "runs"
    status, output = run("train", *train_options(prepared, runs), "--run.resume", "true")
    assert status == 1
    assert str(runs / "run") in output

    for _ in range(2):  # starts, then resumes at its end
        assert run("train", *train_options(prepared, runs), "--run.resume", "auto")[0] == 0
    status, output = run("train", *train_options(prepared, runs))
    assert status == 1
    assert str(runs / "run") in output
    assert "run.resume" in output

    status, output = run("train", *train_options(prepared, runs, optimizer__learning_rate=0.5), "--run.resume", "true")
    assert status == 1
    assert "optimizer.learning_rate" in output
    assert "0.001" in output
    assert "0.5" in output


def test_more_classes_than_the_head(run: Run, prepared: Path, tmp_path: Path):
    scenes, runs = Path(shutil.copytree(prepared.parents[0] / "data", tmp_path / "again")), tmp_path / "runs"
    assert run("train", *train_options(prepared, runs))[0] == 0
    for split in ("train", "validation", "test"):
        more_classes(scenes / "labels" / f"{split}.arrow")
    status, output = run("train", *train_options(scenes, runs), "--run.resume", "true")
    assert status == 1
    assert f"{len(MIDS) + 1} classes" in output
    assert str(len(MIDS)) in output
    assert newest_step(runs / "run") == 3


def more_classes(path: Path) -> None:
    """Rewrite the table with an additional class at the end."""
    import numpy as np

    from paml.labels import table_from_triples

    table = LabelTable.open(str(path))
    rows = np.arange(table.num_images)
    labels = table.lookup(rows)
    keys = table.keys(rows)
    path.unlink()
    table_from_triples(
        keys, [*table.classes, "/m/more"], [*table.names, "more"], labels.image, labels.cls, labels.state, str(path)
    )


@pytest.mark.parametrize(
    ("command", "prog"),
    [([*PAML, "train"], "paml train"), ([sys.executable, TRAIN, "--workers.num_workers=0"], "paml train")],
)
def test_exit_status_and_message_of_the_process(command: list[str], prog: str, tmp_path: Path):
    missing = str(tmp_path / "nothing")
    command = [*command, "--data.root", missing]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{prog}: error: ")
    assert missing in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_open_images_job_states_its_settings_and_how_to_prepare_the_data(tmp_path: Path):
    command = [sys.executable, TRAIN]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    first = done.stdout.splitlines()[0]
    assert "openimages_v3" in first
    assert "--workers.num_workers=2" in first
    assert "data/openimages_v3" in done.stderr
    assert "paml prepare --config openimages_v3_data" in done.stderr
    assert not (tmp_path / "runs").exists()
