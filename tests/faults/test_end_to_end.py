"""Preparation and training where a fifth of all requests to S3 fail: they finish, with the same bytes and batches."""

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from paml import storage
from paml.prepare import PrepareSettings, prepare
from paml.shards import ShardSettings, verify_shards
from tests.faults.conftest import PATIENCE
from tests.helpers.fault_proxy import FaultyS3, faulty_s3
from tests.helpers.jobs import write_scenes
from tests.helpers.prepared import tiny_settings
from tests.helpers.runs import run, trace_steps

STEPS = 8


@pytest.fixture(scope="module")
def restless() -> Iterator[FaultyS3]:
    with faulty_s3(share=0.2, max_in_a_row=None, silence_seconds=10.0, slow_seconds=0.5, seed=5) as running:
        yield running


@pytest.fixture
def bucket(restless: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in (restless.environment | PATIENCE | {"PAML_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    restless.proxy.seen.clear()
    return restless.make_bucket("b" + os.urandom(6).hex())


def put_folder(folder: Path, target: str) -> None:
    """Upload all files, through the faults."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.upload(str(path), storage.join(target, path.relative_to(folder).as_posix()))


def all_bytes(folder: str) -> dict[str, bytes]:
    """Content of all files by name."""
    return {name: storage.read_bytes(storage.join(folder, name)) for name in storage.list_files(folder)}


def assert_a_fifth_failed(s3: FaultyS3, least: int) -> None:
    requests, broken = s3.proxy.requests, s3.proxy.broken
    assert requests > least
    assert abs(broken / requests - 0.2) < 4 * math.sqrt(0.2 * 0.8 / requests)
    assert len(s3.proxy.counts) >= min(5, broken // 3)


@pytest.mark.slow
def test_preparation_from_a_bucket_into_a_bucket_has_the_same_bytes(
    restless: FaultyS3, bucket: str, tmp_path: Path
) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=120, others=20)
    sound = PrepareSettings(
        out=str(tmp_path / "sound"),
        release=str(scenes / "2017_11"),
        images=str(scenes / "images"),
        shards=ShardSettings(size=32, samples_per_shard=20),
        workers=2,
    )
    prepare(sound, say=lambda line: None)
    put_folder(scenes, f"{bucket}/scenes")
    for images_from, only_labelled in (("folder", False), ("bucket", True)):
        out = f"{bucket}/prepared-{images_from}"
        restless.proxy.seen.clear()
        prepare(
            dataclasses.replace(
                sound,
                out=out,
                release=f"{bucket}/scenes/2017_11",
                images=f"{bucket}/scenes/images",
                images_from=images_from,
                only_labelled=only_labelled,
            ),
            say=lambda line: None,
        )
        assert_a_fifth_failed(restless, 300)
        for split in ("train", "validation", "test"):
            found, expected = all_bytes(f"{out}/shards/{split}"), all_bytes(f"{sound.out}/shards/{split}")
            tars = [name for name in expected if name.endswith(".tar")]
            assert [name for name in found if name.endswith(".tar")] == tars
            assert len(tars) >= 1
            for name in [*tars, "rejects.csv"]:
                assert found[name] == expected[name], name
            assert verify_shards(f"{out}/shards/{split}").ok


@pytest.mark.slow
def test_training_from_a_bucket_sees_the_same_batches(
    restless: FaultyS3, bucket: str, prepared: Path, tmp_path: Path
) -> None:
    put_folder(prepared, f"{bucket}/data")
    expected = trace_steps(0, tiny_settings(prepared, tmp_path / "none"), STEPS)
    restless.proxy.seen.clear()
    found = trace_steps(0, tiny_settings(Path("."), tmp_path / "none", data={"root": f"{bucket}/data"}), STEPS)
    assert_a_fifth_failed(restless, 20)
    for name in ("places", "flips", "slots", "rejected"):
        for one, other in zip(getattr(found, name), getattr(expected, name), strict=True):
            np.testing.assert_array_equal(one, other)
    assert found.losses == expected.losses
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())


@pytest.mark.slow
def test_a_run_with_its_data_and_its_storage_in_a_bucket_ends_as_a_local_one(
    restless: FaultyS3, bucket: str, prepared: Path, tmp_path: Path
) -> None:
    put_folder(prepared, f"{bucket}/data")
    expected = run(tiny_settings(prepared, tmp_path / "runs"))
    restless.proxy.seen.clear()
    found = run(tiny_settings(Path("."), tmp_path, data={"root": f"{bucket}/data"}, run={"storage": f"{bucket}/runs"}))
    assert expected is not None
    assert found is not None
    assert_a_fifth_failed(restless, 50)
    local = {name: data for name, data in all_bytes(str(tmp_path / "runs")).items() if name.endswith(".safetensors")}
    remote = {name: data for name, data in all_bytes(f"{bucket}/runs").items() if name.endswith(".safetensors")}
    assert local
    assert remote.keys() == local.keys()
    for name, data in local.items():
        assert remote[name] == data, name
