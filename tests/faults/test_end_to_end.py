"""Preparation and training while a fifth of all requests to S3 fail: same bytes and same batches."""

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from paml import storage
from paml.preparation.prepare import prepare
from paml.preparation.settings import PrepareSettings
from paml.shards import ShardSettings, verify_shards
from tests.faults.conftest import PATIENCE
from tests.helpers.fault_proxy import FaultyS3, faulty_s3
from tests.helpers.jobs import write_scenes
from tests.helpers.prepared import tiny_settings
from tests.helpers.runs import run, trace_steps

STEPS = 8


@pytest.fixture(scope="module")
def faulty() -> Iterator[FaultyS3]:
    with faulty_s3(fraction=0.2, max_in_a_row=None, silence_seconds=10.0, slow_seconds=0.5, seed=5) as running:
        yield running


@pytest.fixture
def bucket(faulty: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in (faulty.environment | PATIENCE | {"PAML_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    faulty.proxy.seen.clear()
    return faulty.make_bucket("b" + os.urandom(6).hex())


def put_folder(folder: Path, target: str) -> None:
    """Upload all files."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.copy(str(path), storage.join(target, path.relative_to(folder).as_posix()))


def all_bytes(folder: str) -> dict[str, bytes]:
    """Content of all files by name."""
    return {name: storage.read_bytes(storage.join(folder, name)) for name in storage.list_files(folder)}


def assert_a_fifth_failed(s3: FaultyS3, min_requests: int) -> None:
    requests, broken = s3.proxy.requests, s3.proxy.broken
    assert requests > min_requests
    assert abs(broken / requests - 0.2) < 4 * math.sqrt(0.2 * 0.8 / requests)
    assert len(s3.proxy.counts) >= min(5, broken // 3)


@pytest.mark.soak
def test_preparation_in_a_bucket_writes_the_same_bytes(faulty: FaultyS3, bucket: str, tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=120, others=20)
    local = PrepareSettings(
        out=str(tmp_path / "local"),
        labels=str(scenes / "2017_11"),
        images=str(scenes / "images"),
        shards=ShardSettings(size=32, samples_per_shard=20),
        workers=2,
    )
    prepare(local, log=lambda line: None)
    put_folder(scenes, f"{bucket}/scenes")
    for images_from, only_labeled in (("folder", False), ("bucket", True)):
        out = f"{bucket}/prepared-{images_from}"
        faulty.proxy.seen.clear()
        prepare(
            dataclasses.replace(
                local,
                out=out,
                labels=f"{bucket}/scenes/2017_11",
                images=f"{bucket}/scenes/images",
                images_from=images_from,
                only_labeled=only_labeled,
            ),
            log=lambda line: None,
        )
        assert_a_fifth_failed(faulty, 300)
        for split in ("train", "validation", "test"):
            actual, expected = all_bytes(f"{out}/shards/{split}"), all_bytes(f"{local.out}/shards/{split}")
            tars = [name for name in expected if name.endswith(".tar")]
            assert [name for name in actual if name.endswith(".tar")] == tars
            assert len(tars) >= 1
            for name in [*tars, "rejects.csv"]:
                assert actual[name] == expected[name], name
            assert verify_shards(f"{out}/shards/{split}").ok


@pytest.mark.soak
def test_training_from_a_bucket_reads_the_same_batches(
    faulty: FaultyS3, bucket: str, prepared: Path, tmp_path: Path
) -> None:
    put_folder(prepared, f"{bucket}/data")
    expected = trace_steps(0, tiny_settings(prepared, tmp_path / "none"), STEPS)
    faulty.proxy.seen.clear()
    actual = trace_steps(0, tiny_settings(Path("."), tmp_path / "none", data={"root": f"{bucket}/data"}), STEPS)
    assert_a_fifth_failed(faulty, 20)
    for name in ("places", "flips", "slots", "rejected"):
        for one, other in zip(getattr(actual, name), getattr(expected, name), strict=True):
            np.testing.assert_array_equal(one, other)
    assert actual.losses == expected.losses
    assert all(torch.equal(actual.weights[name], value) for name, value in expected.weights.items())


@pytest.mark.slow
def test_run_with_data_and_storage_in_a_bucket_equals_a_local_run(
    faulty: FaultyS3, bucket: str, prepared: Path, tmp_path: Path
) -> None:
    put_folder(prepared, f"{bucket}/data")
    expected = run(tiny_settings(prepared, tmp_path / "runs"))
    faulty.proxy.seen.clear()
    actual = run(tiny_settings(Path("."), tmp_path, data={"root": f"{bucket}/data"}, run={"storage": f"{bucket}/runs"}))
    assert expected is not None
    assert actual is not None
    assert_a_fifth_failed(faulty, 50)
    local = {name: data for name, data in all_bytes(str(tmp_path / "runs")).items() if name.endswith(".safetensors")}
    remote = {name: data for name, data in all_bytes(f"{bucket}/runs").items() if name.endswith(".safetensors")}
    assert local
    assert remote.keys() == local.keys()
    for name, data in local.items():
        assert remote[name] == data, name
