"""Shards written by Ray tasks equal those of one process, also if workers are killed."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paml import storage
from paml.shards import ShardSettings, verify_shards, write_parts, write_shards
from paml.sources.folder import folder_parts
from paml.tasks import LocalTaskRunner, PartsFailed
from tests.faults.conftest import PATIENCE
from tests.helpers.fault_proxy import faulty_s3
from tests.helpers.parts import ExclusivePart, FailingPart, GeneratedPart, KillingPart, generated_parts

SMALL = ShardSettings(size=32, samples_per_shard=20)
COUNT = 120


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    os.environ.update({"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"})
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of one process."""
    folder = tmp_path_factory.mktemp("reference")
    pairs = [pair for part in generated_parts(COUNT, 1) for pair in part]
    write_shards(pairs, folder, SMALL, expected_count=COUNT, workers=1)
    return folder


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_shards_equal_those_of_one_process(ray: Any, reference: Path, tmp_path: Path) -> None:
    from paml.distributed.ray_tasks import RayTaskRunner

    reports: list[tuple[str, int, int]] = []
    report = write_parts(
        generated_parts(COUNT, 5)[::-1],
        tmp_path / "many",
        SMALL,
        tasks=RayTaskRunner(),
        spill_bytes=10_000,
        group_bytes=30_000,
        progress=lambda *what: reports.append(what),
    )
    assert (report.written, report.rejected, report.shards) == (COUNT, 0, 6)
    assert all_bytes(tmp_path / "many") == all_bytes(reference)
    assert reports[-1] == ("shards", 6, 6)
    assert ("images", COUNT, COUNT) in reports
    write_parts(generated_parts(COUNT, 2), tmp_path / "wide", SMALL, tasks=RayTaskRunner(cpus_per_task=2))
    assert all_bytes(tmp_path / "wide") == all_bytes(reference)


def test_a_killed_worker_is_replaced(ray: Any, reference: Path, tmp_path: Path) -> None:
    from paml.distributed.ray_tasks import RayTaskRunner

    marks = tmp_path / "marks"
    marks.mkdir()
    parts: list[GeneratedPart] = generated_parts(COUNT, 3)
    last = parts[-1]
    parts[-1] = KillingPart(last.name, last.first, last.end, folder=str(marks), at=last.end - 3, times=2)
    write_parts(parts, tmp_path / "out", SMALL, tasks=RayTaskRunner(retries=2), spill_bytes=10_000)
    assert len(list(marks.iterdir())) == 2
    assert all_bytes(tmp_path / "out") == all_bytes(reference)


def test_a_failing_part_is_named_and_the_others_finish(ray: Any, reference: Path, tmp_path: Path) -> None:
    from paml.distributed.ray_tasks import RayTaskRunner

    marks = tmp_path / "marks"
    marks.mkdir()
    good = generated_parts(COUNT, 4)
    bad: list[GeneratedPart] = list(good)
    bad[1] = FailingPart("broken disk", good[1].first, good[1].end, at=good[1].first + 2)
    bad[2] = KillingPart("deadly", good[2].first, good[2].end, folder=str(marks), at=good[2].first, times=99)
    with pytest.raises(PartsFailed) as failed:
        write_parts(bad, tmp_path / "out", SMALL, tasks=RayTaskRunner(retries=1))
    reasons = {failure.name: str(failure) for failure in failed.value.failures}
    assert reasons.keys() == {"broken disk", "deadly"}
    assert "the disk of this part is broken (2 attempts)" in reasons["broken disk"]
    assert "died" in reasons["deadly"]
    assert len(list(marks.iterdir())) == 2
    # The finished parts are not read again: these would fail.
    finished = [FailingPart(part.name, part.first, part.end, at=part.first) for part in (good[0], good[3])]
    write_parts(
        [*good[1:3], *finished], tmp_path / "out", SMALL, expected_count=COUNT, tasks=LocalTaskRunner(2, retries=0)
    )
    assert all_bytes(tmp_path / "out") == all_bytes(reference)
    assert verify_shards(tmp_path / "out").ok


@pytest.mark.slow
def test_max_concurrent_limits_the_readers_of_a_source(ray: Any, tmp_path: Path) -> None:
    from paml.distributed.ray_tasks import RayTaskRunner

    def parts(max_concurrent: int, hold_seconds: float) -> list[ExclusivePart]:
        options: dict[str, Any] = {
            "folder": str(tmp_path),
            "max_concurrent": max_concurrent,
            "hold_seconds": hold_seconds,
        }
        return [ExclusivePart(f"shy-{i}", 10 * i, 10 * i + 10, **options) for i in range(4)]

    tasks = RayTaskRunner(cpus_per_task=1, retries=0)
    assert write_parts(parts(1, 0.3), tmp_path / "out", SMALL, tasks=tasks).written == 40
    with pytest.raises(PartsFailed, match="being read"):
        write_parts(parts(4, 60.0), tmp_path / "crowd", SMALL, tasks=tasks)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_shards_in_a_bucket_equal_those_of_one_process(
    share: float, ray: Any, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a fifth of all requests fail, and a worker is killed."""
    from paml.distributed.ray_tasks import RayTaskRunner

    marks = tmp_path / "marks"
    marks.mkdir()
    images = [pair for part in generated_parts(80, 1) for pair in part]
    last = KillingPart("the last", 80, COUNT, folder=str(marks), at=110)
    with faulty_s3(fraction=share, silence_seconds=5.0, slow_seconds=0.3, seed=3) as s3:
        for name, value in (s3.environment | PATIENCE | {"PAML_CACHE": str(tmp_path / "cache")}).items():
            monkeypatch.setenv(name, value)
        bucket = s3.make_bucket("b" + os.urandom(6).hex())
        with s3.proxy.calm():
            for key, data in images:
                storage.write_bytes(f"{bucket}/images/{key}.jpg", data)
        s3.proxy.seen.clear()
        parts = [*folder_parts(f"{bucket}/images", 30), last]
        write_parts(
            parts, f"{bucket}/out", SMALL, tasks=RayTaskRunner(cpus_per_task=1), spill_bytes=10_000, group_bytes=30_000
        )
        assert s3.proxy.requests > 150
        assert share * 0.6 <= s3.proxy.broken / s3.proxy.requests <= share * 1.4
        with s3.proxy.calm():
            names = storage.list_files(f"{bucket}/out")
            assert {name: storage.read_bytes(f"{bucket}/out/{name}") for name in names} == all_bytes(reference)
    assert len(list(marks.iterdir())) == 1
