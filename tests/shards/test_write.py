import csv
import io
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset import compat

from paml.errors import DataError, SettingsError
from paml.shards import Manifest, ShardReader, ShardSettings, verify_shards, write_parts, write_shards
from paml.shards.encode import member_key
from paml.shards.images import prepare_image
from paml.shards.spill import read_spill
from paml.sources.folder import folder_parts
from paml.sources.parts import Part, read_parts
from paml.storage import StorageError
from paml.tasks import LocalTaskRunner, PartsFailed
from tests.shards.images import decoded, encoded, flip_byte, gradient, source

SMALL = ShardSettings(size=32, samples_per_shard=10)


def part_of(name: str, pairs: list[tuple[str, Any]], after: int | None = None) -> Part:
    """A part that raises after some images, or never."""
    return Part(name, partial(iter, pairs) if after is None else partial(interrupted_after, pairs, after), len(pairs))


def parts_of(images: list[tuple[str, Any]], count: int) -> list[Part]:
    return [part_of(f"part {i}", images[i::count]) for i in range(count)]


def all_bytes(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rejects(folder: str | Path) -> dict[str, str]:
    with open(Path(folder) / "rejects.csv", newline="") as file:
        return {row["key"]: row["reason"] for row in csv.DictReader(file)}


def tar_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_bytes_do_not_depend_on_order_or_workers(tmp_path: Path) -> None:
    images = source(60)
    one = write_shards(images, tmp_path / "one", SMALL, workers=1)
    shuffled = random.Random(5).sample(images, len(images))
    many = write_shards(iter(shuffled), tmp_path / "many", SMALL, expected_count=60, workers=4)
    assert tar_bytes(tmp_path / "one") == tar_bytes(tmp_path / "many")
    assert one.digest == many.digest
    assert (one.written, one.rejected, one.duplicates, one.shards) == (60, 0, 0, 6)
    other_seed = write_shards(
        images, tmp_path / "seed", ShardSettings(size=32, samples_per_shard=10, seed=1), workers=1
    )
    assert other_seed.digest != one.digest
    assert [p for p in os.listdir(tmp_path / "one") if not p.endswith((".tar", ".arrow", ".csv"))] == []


def test_bytes_do_not_depend_on_parts_spills_or_groups(tmp_path: Path) -> None:
    """Also with duplicate keys and broken copies: which copy is used must not depend on the order of reading."""
    images: list[tuple[str, Any]] = [
        *source(60),
        *((key, encoded(gradient(i, 80, 60), quality=90)) for i, (key, _) in enumerate(source(20))),
        *((key, data[:100]) for key, data in source(10)),
        ("lost", b"not an image"),
        ("lost", b""),
        ("absent", FileNotFoundError("not there")),
    ]
    wanted = [f"{i:016x}" for i in range(50)] + ["lost", "absent"]
    kinds = [
        (parts_of(images, 1), {}),
        (parts_of(images, 7), {"spill_bytes": 5_000, "group_bytes": 1}),
        (parts_of(images, 3)[::-1], {"tasks": LocalTaskRunner(4), "group_bytes": 20_000}),
        (parts_of(random.Random(3).sample(images, len(images)), 5), {"spill_bytes": 1}),
    ]
    outputs = []
    for number, (parts, options) in enumerate(kinds):
        out = tmp_path / str(number)
        report = write_parts(parts, out, SMALL, expected_count=50, wanted_keys=wanted, **options)
        assert (report.written, report.rejected, report.missing, report.duplicates, report.unwanted) == (
            50,
            2,
            1,
            31,
            10,
        )
        outputs.append(all_bytes(out))
    assert rejects(tmp_path / "0")["lost"] == "empty file"
    assert rejects(tmp_path / "0")["absent"] == "requested, but in no source"
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]
    manifest = Manifest.open(tmp_path / "0")
    reader = ShardReader(manifest)
    row = manifest.keys().to_pylist().index(f"{3:016x}")
    larger = encoded(gradient(3, 80, 60), quality=90)
    assert len(larger) > len(source(4)[3][1])
    assert bytes(reader.read(row)) == prepare_image(larger, ShardSettings(size=32)).data


def test_tar_files_equal_those_of_webdatasets_writer(tmp_path: Path) -> None:
    from webdataset.writer import TarWriter

    images = [*source(25), ("a.b/c d", encoded(gradient(99))), ("käse" * 60, encoded(gradient(98), "PNG"))]
    write_shards(images, tmp_path, ShardSettings(resize="original", samples_per_shard=9))
    manifest, reader = Manifest.open(tmp_path), ShardReader(Manifest.open(tmp_path))
    for shard in range(len(manifest.shards)):
        expected = io.BytesIO()
        options: dict[str, Any] = {"user": "paml", "group": "paml", "mtime": 0, "format": "PAX_FORMAT"}
        with TarWriter(expected, encoder=False, compress=False, **options) as writer:
            for row in range(*manifest.rows_of_shard(shard).indices(manifest.num_samples)):
                kind = "png" if manifest.key(row).startswith("k") else "jpg"
                writer.write({"__key__": member_key(manifest.key(row)), kind: bytes(reader.read(row))})
        assert Path(manifest.shard_path(shard)).read_bytes() == expected.getvalue()


def test_failing_part_is_named_and_the_others_are_saved(tmp_path: Path) -> None:
    images = source(40)
    parts = parts_of(images, 4)
    parts[2] = part_of("the bad one", images[2::4], 3)
    with pytest.raises(PartsFailed, match=r"(?s)1 of 4 parts.*the bad one: Interrupted \(2 attempts\)") as failed:
        write_parts(parts, tmp_path / "out", SMALL, tasks=LocalTaskRunner(2, retries=1))
    assert [failure.name for failure in failed.value.failures] == ["the bad one"]
    assert not (tmp_path / "out" / "manifest.arrow").exists()
    unreadable = [part_of(part.name, [(key, b"") for key, _ in images[i::4]]) for i, part in enumerate(parts)]
    unreadable[2] = part_of("the bad one", [(key, b"") for key, _ in images[2::4][:3]] + images[2::4][3:])
    report = write_parts(unreadable, tmp_path / "out", SMALL)
    assert (report.written, report.rejected) == (40, 0)
    assert report.digest == write_shards(images, tmp_path / "whole", SMALL).digest


def test_two_parts_with_one_name_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'twice'"):
        write_parts([part_of("twice", source(2)), part_of("twice", source(2))], tmp_path, SMALL)


def test_stock_webdataset_reads_the_shards(tmp_path: Path) -> None:
    images = [*source(30), ("a.b/c d", encoded(gradient(99))), ("käse" * 60, encoded(gradient(98)))]
    write_shards(images, tmp_path, SMALL)
    manifest = Manifest.open(tmp_path)
    urls = [manifest.shard_path(i) for i in range(len(manifest.shards))]
    samples = list(cast(Any, compat.WebDataset(urls, shardshuffle=False).decode("rgb8")))
    assert [s["__key__"] for s in samples] == [member_key(key) for key in manifest.keys().to_pylist()]
    assert {"a%2Eb%2Fc d", "käse" * 60} <= {s["__key__"] for s in samples}
    assert {s["jpg"].shape for s in samples} == {(32, 32, 3)}
    reader = ShardReader(manifest)
    for index, sample in enumerate(samples):
        assert np.array_equal(sample["jpg"], np.asarray(decoded(reader.read(index))))


def test_tar_members_are_deterministic_and_at_the_offsets_of_the_manifest(tmp_path: Path) -> None:
    write_shards(source(30), tmp_path, SMALL)
    manifest = Manifest.open(tmp_path)
    row = 0
    for shard, info in enumerate(manifest.shards):
        with tarfile.open(manifest.shard_path(shard)) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "paml", 0o444)
                assert (member.name, member.offset_data, member.size) == (
                    manifest.key(row) + ".jpg",
                    manifest.offset[row],
                    manifest.size[row],
                )
                assert manifest.shard[row] == shard
                row += 1
        assert info.count == len(range(*manifest.rows_of_shard(shard).indices(row)))
    assert row == manifest.num_samples == 30
    assert set(manifest.keys().to_pylist()) == {key for key, _ in source(30)}


def test_bad_and_missing_images_are_rejected_with_a_reason(tmp_path: Path) -> None:
    good = encoded(gradient(0, 200, 200), quality=95)
    damaged = bytearray(good)
    damaged[1000:3000] = bytes(2000)
    images: list[tuple[str, bytes | str]] = [
        ("whole", good),
        ("zero", b""),
        ("truncated", good[: len(good) // 2]),
        ("damaged", bytes(damaged)),
        ("text", b"not an image at all"),
        ("absent", str(tmp_path / "absent.jpg")),
        ("unwanted", good),
        ("truncated twice", good[:1000]),
        ("truncated twice", good[:2000]),
        ("repaired", good[:1000]),
        ("repaired", good),
        ("whole", encoded(gradient(1))),
        ("", good),
        ("\udcff", good),
    ]
    wanted = [key for key, _ in images if key not in ("unwanted", "", "\udcff")] + ["never seen"]
    one_shard = ShardSettings(size=32)
    report = write_shards(images, tmp_path / "out", one_shard, wanted_keys=wanted)
    reasons = rejects(tmp_path / "out")
    assert reasons["zero"] == "empty file"
    assert "remature end" in reasons["truncated"] or "truncated" in reasons["truncated"]
    assert "orrupt" in reasons["damaged"]
    assert "not an image" in reasons["text"]
    assert "unreadable" in reasons["absent"]
    assert reasons["never seen"] == "requested, but in no source"
    assert any("empty" in reason for reason in reasons.values())
    assert any("UTF-8" in reason for reason in reasons.values())
    assert len(reasons) == 9
    assert (report.written, report.rejected, report.missing, report.duplicates, report.unwanted) == (2, 9, 1, 3, 1)
    assert "9 rejected (1 of them requested but missing), see rejects.csv" in str(report)
    # of two images with one key, the larger file is used
    manifest = Manifest.open(tmp_path / "out")
    lone = write_shards([("whole", good), ("repaired", good)], tmp_path / "lone", one_shard)
    assert lone.digest == report.digest == manifest.digest


def test_no_usable_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 1 images.*rejects\.csv"):
        write_shards([("zero", b"")], tmp_path, SMALL)
    assert rejects(tmp_path) == {"zero": "empty file"}
    with pytest.raises(SettingsError, match="0 images are expected"):
        write_shards([], tmp_path / "empty", SMALL)


def test_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for i in range(5):
        (tmp_path / "images" / ("sub" if i % 2 else ".") / f"{i}.png").write_bytes(encoded(gradient(i), "PNG"))
    report = write_shards(read_parts(folder_parts(tmp_path / "images")), tmp_path / "out", SMALL, expected_count=5)
    assert report.written == 5
    assert set(Manifest.open(tmp_path / "out").keys().to_pylist()) == set("01234")


class Interrupted(Exception):
    pass


def interrupted_after(images: list[tuple[str, bytes]], count: int):
    yield from images[:count]
    raise Interrupted


def test_interrupted_run_continues_without_reading_finished_images(tmp_path: Path) -> None:
    images = source(50)
    whole = write_shards(images, tmp_path / "whole", SMALL)
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        write_shards(interrupted_after(images, 30), out, SMALL, expected_count=50, workers=1)
    # one worker encodes at most five images at a time
    again = [(key, str(tmp_path / "missing")) for key, _ in images[:24]] + images[24:]
    report = write_shards(again, out, SMALL, expected_count=10_000)
    assert (report.digest, report.written, report.rejected, report.duplicates) == (whole.digest, 50, 0, 0)
    assert not (out / ".partial").exists()


def test_a_signal_ends_the_run_after_its_images_are_saved(tmp_path: Path) -> None:
    """In a process of its own, since the signal must reach the main thread while it waits for the tasks."""
    script = """
        import os, signal, sys, time
        from paml.errors import DataError
        from paml.shards import ShardSettings, write_shards
        from tests.shards.images import source

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it

        def images():
            for i, image in enumerate(source(40)):
                if i == 30:
                    os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
                yield image

        write_shards(images(), sys.argv[1], ShardSettings(size=32), expected_count=40)
    """
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(script), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "KeyboardInterrupt" in done.stderr
    (spill,) = (out / ".partial").rglob("*.spill")
    assert read_spill(str(spill)).end >= 20


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    after=st.integers(0, 40),
    cuts=st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1), st.booleans()), max_size=3),
)
def test_damaged_spills_are_written_again(
    tmp_path_factory: pytest.TempPathFactory, after: int, cuts: list[tuple[int, float, bool]]
) -> None:
    images, tmp_path = source(40, width=8, height=8), tmp_path_factory.mktemp("damaged")
    digest = write_parts([part_of("one", images)], tmp_path / "whole", SMALL).digest
    with pytest.raises(Interrupted):
        write_parts(
            [part_of("one", images, after)],
            tmp_path / "out",
            SMALL,
            tasks=LocalTaskRunner(2, raise_first=True),
            spill_bytes=4_000,
        )
    spills = sorted((tmp_path / "out" / ".partial").glob("*.spill"))
    for number, fraction, cut in cuts if spills else []:
        path = spills[number % len(spills)]
        if cut:
            os.truncate(path, int(fraction * path.stat().st_size))
        elif path.stat().st_size:
            flip_byte(path, int(fraction * (path.stat().st_size - 1)))
    report = write_parts([part_of("one", images)], tmp_path / "out", SMALL, spill_bytes=4_000)
    assert (report.digest, report.written, report.duplicates) == (digest, 40, 0)


def test_changed_spill_is_written_again_and_never_used(tmp_path: Path) -> None:
    images = source(40)
    digest = write_shards(images, tmp_path / "whole", SMALL).digest
    for name, again in (("list", images), ("iterator", iter(images))):
        out = tmp_path / name
        with pytest.raises(Interrupted):
            write_shards(interrupted_after(images, 35), out, SMALL, expected_count=40)
        (spill,) = (out / ".partial").glob("*.spill")
        flip_byte(spill, spill.stat().st_size - 50)
        if name == "iterator":
            with pytest.raises(DataError, match=r"checksum mismatch.*\.spill"):
                write_shards(again, out, SMALL, expected_count=40)
            again = iter(images)
        report = write_shards(again, out, SMALL, expected_count=40)
        assert (report.digest, report.written, report.duplicates) == (digest, 40, 0)


def test_interrupted_run_detects_a_changed_source(tmp_path: Path) -> None:
    images = source(40)
    with pytest.raises(Interrupted):
        write_shards(interrupted_after(images, 30), tmp_path / "out", SMALL, expected_count=40)
    reversed_images = images[::-1]
    with pytest.raises(DataError, match="has other images"):
        write_shards(iter(reversed_images), tmp_path / "out", SMALL, expected_count=40)
    report = write_shards(reversed_images, tmp_path / "out", SMALL)
    assert (report.written, report.duplicates) == (40, 0)
    assert report.digest == write_shards(images, tmp_path / "whole", SMALL).digest


def test_complete_folder_is_not_changed(tmp_path: Path) -> None:
    first = write_shards(source(20), tmp_path, SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = write_shards(interrupted_after([], 0), tmp_path, SMALL, expected_count=20)
    assert again.already_done
    assert (again.digest, again.written) == (first.digest, 20)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(SettingsError, match="other settings"):
        write_shards(source(20), tmp_path, ShardSettings(size=48))


def test_leftovers_of_a_run_killed_at_its_end_are_deleted(tmp_path: Path) -> None:
    write_shards(source(20), tmp_path, SMALL)
    before = all_bytes(tmp_path)
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "0123-00000.spill").write_bytes(b"leftover")
    (tmp_path / ".0123.paml-tmp").write_bytes(b"partial")
    assert write_shards(source(20), tmp_path, SMALL).already_done
    assert all_bytes(tmp_path) == before
    assert not (tmp_path / ".partial").exists()


def test_interrupted_run_rejects_other_settings(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        write_shards(interrupted_after(source(5), 5), tmp_path, SMALL, expected_count=20)
    with pytest.raises(SettingsError, match="other settings"):
        write_shards(source(5), tmp_path, ShardSettings(size=48))


def test_two_writers_of_one_folder_are_an_error(tmp_path: Path) -> None:
    def nested():
        with pytest.raises(StorageError, match="another run is writing"):
            write_shards(source(2), tmp_path, SMALL)
        yield from source(2)

    assert write_shards(nested(), tmp_path, SMALL, expected_count=2).written == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", 8), ("size", 448.0), ("quality", 0), ("quality", 101), ("samples_per_shard", 0), ("seed", -1)],
)
def test_settings_are_checked(field: str, value: object) -> None:
    with pytest.raises(SettingsError, match=rf"shards\.{field} is {value!r}"):
        ShardSettings(**{field: value})  # pyright: ignore[reportArgumentType]


def test_resize_is_checked() -> None:
    with pytest.raises(SettingsError, match="'crop'"):
        ShardSettings(resize="crop")  # pyright: ignore[reportArgumentType]


def test_iterator_needs_a_count(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="expected_count"):
        write_shards(iter(source(2)), tmp_path, SMALL)


def test_progress_is_reported(tmp_path: Path) -> None:
    reports = []
    write_shards(source(20), tmp_path, SMALL, progress=lambda *report: reports.append(report))
    assert ("images", 20, 20) in reports
    assert reports[-1] == ("shards", 2, 2)


WRITER = textwrap.dedent(
    """
    import sys
    from paml.shards import ShardSettings, write_shards
    from tests.shards.images import source
    print("ready", flush=True)
    settings = ShardSettings(size=32, samples_per_shard=10)
    report = write_shards(source(int(sys.argv[2]), width=256, height=256), sys.argv[1], settings, workers=2)
    print(report.digest)
    """
)


def start_writer(out: Path, count: int, before: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", before + WRITER, str(out), str(count)]
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)


@pytest.mark.slow
def test_shards_are_the_same_after_kills_at_random_moments(tmp_path: Path) -> None:
    count, rng, kills = 300, random.Random(7), 0
    whole = start_writer(tmp_path / "whole", count)
    digest = whole.communicate(timeout=120)[0].split()[-1]
    for round_ in range(4):
        out = tmp_path / f"killed{round_}"
        output = ""
        for attempt in range(12):
            writer = start_writer(out, count)
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            if attempt < 11:
                try:
                    writer.wait(rng.uniform(0.1, 1.2))
                except subprocess.TimeoutExpired:
                    writer.send_signal(signal.SIGKILL)
                    kills += 1
            output, errors = writer.communicate(timeout=120)
            if writer.returncode == 0:
                break
            assert writer.returncode == -signal.SIGKILL, errors
        assert output.split()[-1] == digest
        assert verify_shards(out).ok
    assert kills >= 4


LARGE = """
import resource, sys
from pathlib import Path
import numpy as np
from paml.shards import ShardSettings, write_parts
from paml.sources.parts import Part, read_parts
from paml.tasks import LocalTaskRunner
from tests.helpers.parts import generated_parts
from tests.shards.images import encoded
from PIL import Image

noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
photo = encoded(Image.fromarray(noise), quality=95)

def read():
    return ((f"{i:016x}", photo) for i in range(1500))

settings = ShardSettings(resize="original", samples_per_shard=20)
options = {"tasks": LocalTaskRunner(2), "spill_bytes": 4 << 20, "group_bytes": 4 << 20}
write_parts(generated_parts(40, 2), sys.argv[1] + "/warm", settings, **options)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = write_parts([Part("one photo with many keys", read, 1500)], sys.argv[1] + "/large", settings, **options)
print(report.bytes >> 20, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, cwd=root, timeout=250
    )
    assert done.returncode == 0, done.stderr
    written, grown = map(int, done.stdout.split())
    assert written > 150
    assert grown < 60


def test_file_size_limit_gives_a_clear_error(tmp_path: Path) -> None:
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({10 << 10}, {resource.RLIM_INFINITY}))\n"
    writer = start_writer(tmp_path / "out", 100, limit)
    errors = writer.communicate(timeout=120)[1]
    assert writer.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("paml.errors.StorageError")
    assert str(tmp_path / "out") in last
    assert "choose another folder" in last
    again = start_writer(tmp_path / "out", 100)
    whole = write_shards(source(100, width=256, height=256), tmp_path / "whole", SMALL)
    assert again.communicate(timeout=120)[0].split()[-1] == whole.digest


def test_full_disk_gives_a_clear_error_and_the_run_continues_when_there_is_space(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        images = source(450)
        with pytest.raises(StorageError, match="disk is full"):
            write_shards(images, disk / "out", SMALL)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        digest = write_shards(images, disk / "out", SMALL).digest
        assert digest == write_shards(images, tmp_path / "whole", SMALL).digest
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_unwritable_folder_gives_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/out.* is not writable: .*not a folder"):
        write_shards(source(2), tmp_path / "file" / "out", SMALL)
    if os.getuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o555)
        with pytest.raises(StorageError, match="is not writable: permission denied"):
            write_shards(source(2), tmp_path / "locked", SMALL)


def test_number_of_expected_images_costs_no_time(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(Interrupted):
        write_shards(interrupted_after(source(3), 3), tmp_path, ShardSettings(size=32), expected_count=9_000_000)
    assert time.monotonic() - start < 30
    (spill,) = (tmp_path / ".partial").glob("*.spill")
    assert read_spill(str(spill)).end == 3


def test_shards_import_neither_torch_nor_webdataset() -> None:
    code = "import sys, paml.shards, paml.sources.tars; print({'torch', 'webdataset', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
