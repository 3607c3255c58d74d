"""Attacks other than pickles: archives, images, links, formulas, YAML, and files that refer to other files."""

import bz2
import contextlib
import csv
import gzip
import io
import json
import os
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from paml.checksum import CHECKSUM_PLACEHOLDER, write_checksum
from paml.data.decode import decode_into, decode_rgb
from paml.errors import CheckpointError, DataError, PamlError
from paml.labels import LabelError, LabelTable, table_from_triples
from paml.labels.edit import export_classes, export_csv
from paml.runs.journal import JournalReader
from paml.settings import UsageError, read_settings
from paml.shards import Manifest, ShardReader, ShardSettings, write_shards
from paml.shards.images import UndecodableError, image_size, prepare_image
from paml.shards.index import index_shards
from paml.shards.manifest import write_rejects
from paml.sources.fetch import read_object
from paml.sources.folder import bucket_parts, folder_parts
from paml.sources.parts import MAX_IMAGE_BYTES, read_parts
from paml.sources.tars import open_tar, tar_parts, walk_tar
from paml.sources.voc import VocSettings, read_voc
from paml.spreadsheet import unescape_formula
from paml.storage import StorageError
from paml.training.checkpoint import read_checkpoint
from paml.training.settings import TrainSettings
from tests.helpers.prepared import jpeg_image, tiny_settings

VICTIM = "the victim's own words"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file that no test may read, write or remove."""
    path = tmp_path / "victim"
    path.write_text(VICTIM)
    return path


def within(seconds: float, work: Callable[[], object]) -> None:
    """Run the work, which must end in a result or a clear error within a time limit."""
    start = time.process_time()
    with contextlib.suppress(PamlError, LabelError):
        work()
    assert time.process_time() - start < seconds


# Archives


def header(name: str, size: int, kind: bytes = b"0", link: str = "") -> bytes:
    """A tar header with a valid checksum and the stated size, in base 256 if octal digits do not suffice."""
    field = b"%011o\0" % size if 0 <= size < 8**11 else b"\x80" + (size % (1 << 88)).to_bytes(11, "big")
    if size < 0:
        field = b"\xff" + (size % (1 << 88)).to_bytes(11, "big")
    text = name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0" + b" " * 8
    text += kind + link.encode().ljust(100, b"\0") + b"ustar\x0000" + b"\0" * 247
    return text[:148] + b"%06o\0 " % sum(text) + text[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def test_links_devices_and_paths_outside_of_an_archive_are_never_followed(tmp_path: Path, victim: Path) -> None:
    good = jpeg_image("test", 0)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.type, info.linkname = kind, str(victim)
            tar.addfile(info)
        for name in ("../../up.jpg", "/abs.jpg", "good.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(good)
            tar.addfile(info, io.BytesIO(good))
    before = set(tmp_path.rglob("*"))
    assert list(read_parts(tar_parts(tmp_path / "x.tar"))) == [("up", good), ("abs", good), ("good", good)]
    manifest = index_shards(tmp_path / "x.tar", tmp_path / "out")
    assert [ShardReader(manifest).read(n) for n in range(3)] == [good] * 3
    assert {p for p in tmp_path.rglob("*") if tmp_path / "out" not in (p, *p.parents)} == before
    assert victim.read_text() == VICTIM


BOMBS: dict[str, Callable[[], bytes]] = {
    "a size below 0": lambda: header("a.jpg", -1024) + bytes(2048),
    "a size of 2^80": lambda: header("a.jpg", 1 << 80) + bytes(2048),
    "a size that is not there": lambda: header("a.jpg", 1 << 33) + bytes(2048),
    "holes of a terabyte": lambda: sparse(1 << 40),
    "a name of a gigabyte": lambda: header("././@LongLink", 1 << 30, b"L") + bytes(4096),
    "fields of a gigabyte": lambda: header("pax", 1 << 30, b"x") + bytes(4096),
    "a number of many digits": lambda: (
        header("pax", 16000, b"x") + padded(b"1" * 16000) + header("a.jpg", 0) + bytes(1024)
    ),
    "headers that lead to headers": lambda: b"".join(
        header("././@LongLink", 5, b"L") + padded(b"a.jpg") for _ in range(3000)
    ),
    "a field with a size below 0": lambda: pax(b"size=-5\n") + header("a.jpg", 0) + bytes(1024),
    "a field of holes": lambda: pax(b"GNU.sparse.realsize=99999999999\n", b"GNU.sparse.map=0,x\n")
    + header("a.jpg", 0)
    + bytes(1024),
    "gzip, 1 GB of zeros": lambda: gzip.compress(header("a.txt", 1 << 30) + bytes(1 << 30), 1),
    "gzip, an image of 200 MB of zeros": lambda: gzip.compress(header("a.jpg", 200 << 20) + bytes(200 << 20), 1),
    "bzip2, changed": lambda: bz2.compress(header("a.jpg", 512) + bytes(2048))[:40] + b"changed" * 9,
}  # fmt: skip


def sparse(size: int) -> bytes:
    text = bytearray(header("a.jpg", 0, b"S"))
    text[386:398], text[398:410] = b"%011o\0" % 0, b"%011o\0" % 0
    text[483:495] = b"\x80" + size.to_bytes(11, "big")
    text[148:156] = b" " * 8
    text[148:156] = b"%06o\0 " % sum(text)
    return bytes(text) + bytes(1024)


def pax(*fields: bytes) -> bytes:
    text = b"".join(b"%d %s" % (len(field) + 3 + (len(field) + 3 > 9) * 1, field) for field in fields)
    return header("pax", len(text), b"x") + padded(text)


@pytest.mark.parametrize("kind", BOMBS)
def test_an_archive_with_false_sizes_is_rejected(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.tar.gz" if kind.startswith(("gzip", "bzip2")) else "x.tar")
    path.write_bytes(BOMBS[kind]())
    start = time.process_time()
    found = list(read_parts(tar_parts(path)))
    assert time.process_time() - start < 10
    assert isinstance(found[-1][1], DataError), found
    assert sum(len(payload) for _, payload in found if isinstance(payload, bytes)) <= MAX_IMAGE_BYTES
    if path.suffix == ".tar":
        with pytest.raises(DataError, match="no image"):
            index_shards(path, tmp_path / "out")


def test_an_oversized_member_is_skipped_and_the_rest_is_read(tmp_path: Path) -> None:
    path, good = tmp_path / "x.tar", jpeg_image("test", 0)
    with path.open("wb") as file:
        file.write(header("big.jpg", MAX_IMAGE_BYTES + 512))
        file.seek(MAX_IMAGE_BYTES + 512, os.SEEK_CUR)
        file.write(header("good.jpg", len(good)) + padded(good) + bytes(1024))
    (big, why), rest = read_parts(tar_parts(path))
    assert (big, rest) == ("big", ("good", good))
    assert "268,435,456" in str(why)
    assert len(index_shards(path, tmp_path / "out")) == 1


def test_a_compressed_archive_with_the_name_of_a_shard_is_refused(tmp_path: Path) -> None:
    sound = header("a.jpg", 4) + padded(b"data") + bytes(1024)
    (tmp_path / "x.tar").write_bytes(gzip.compress(sound))
    with open_tar(str(tmp_path / "x.tar")) as file, pytest.raises(DataError, match="compressed"):
        list(walk_tar(file, "x.tar", unpack=False))
    assert list(read_parts(tar_parts(tmp_path / "x.tar"))) == [("a", b"data")]


# Images


def jpeg_of(width: int, height: int, scans: int = 0) -> bytes:
    """A small JPEG whose header claims another size, with additional scans."""
    data = bytearray(jpeg_image("test", 0))
    at = data.index(b"\xff\xc0") if b"\xff\xc0" in data else data.index(b"\xff\xc2")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    scan = bytes(data[data.index(b"\xff\xda") : -2])
    return bytes(data[:-2]) + scan[:40] * scans + b"\xff\xd9"


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    extra = b"".join(chunk(kind, body) for kind, body in chunks)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + extra
        + chunk(b"IDAT", zlib.compress(bytes(64)))
        + chunk(b"IEND", b"")
    )


def bomb() -> bytes:
    """A PNG chunk that decompresses to a gigabyte of zeros."""
    return b"x\0\0" + zlib.compress(bytes(1 << 30), 1)


def tiff_of(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "TIFF")
    data = out.getvalue()
    for tag, value in ((256, width), (257, height)):
        for kind in (3, 4):
            old = struct.pack("<HHI", tag, kind, 1)
            if old in data:
                at = data.index(old)
                data = data[:at] + struct.pack("<HHII", tag, 4, 1, value) + data[at + 12 :]
    return data


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/x) (w) file closefile\nshowpage\n%%EOF\n"
PICTURES: dict[str, Callable[[], bytes]] = {
    "JPEG of 65500 x 65500": lambda: jpeg_of(65500, 65500),
    "JPEG of 20000 x 20000": lambda: jpeg_of(20000, 20000),
    "JPEG of 5000 scans": lambda: jpeg_of(8000, 8000, 5000),
    "PNG of 2^31 - 1 x 2^31 - 1": lambda: png_of(2**31 - 1, 2**31 - 1),
    "PNG of 20000 x 20000": lambda: png_of(20000, 20000),
    "PNG whose color profile unpacks to 1 GB": lambda: png_of(9, 9, (b"iCCP", bomb())),
    "PNG whose text unpacks to 1 GB": lambda: png_of(9, 9, (b"zTXt", bomb())),
    "TIFF of 60000 x 60000": lambda: tiff_of(60000, 60000),
    "BMP of 60000 x 60000": lambda: (
        b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 60000, 60000, 1, 24, 0, 9, 0, 0, 0, 0)
    ),
    "PPM of 99999 x 99999": lambda: b"P6 99999 99999 255\n" + bytes(99),
    "GIF of 65535 x 65535": lambda: b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x01\0\0;",
    "EPS, which Pillow has a program draw": lambda: EPS,
    "a stub of HDF5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(99),
}  # fmt: skip


@pytest.mark.parametrize("kind", PICTURES)
def test_a_small_file_cannot_exhaust_memory_or_start_a_program(kind: str) -> None:
    data = PICTURES[kind]()
    out = np.empty((32, 32, 3), np.uint8)
    settings = ShardSettings()
    for decode in (
        lambda: decode_rgb(data),
        lambda: decode_into(data, out),
        lambda: prepare_image(data, ShardSettings(size=32, max_pixels=settings.max_pixels)),
    ):
        start = time.process_time()
        with pytest.raises(UndecodableError) if "unpacks" not in kind else suppressed():
            decode()
        assert time.process_time() - start < 5
    within(5, lambda: image_size(data))


class suppressed:
    """Accept a result or a clear error: Pillow ignores an invalid color profile."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, UndecodableError)


def test_large_valid_metadata_costs_no_more_than_reading_it() -> None:
    exif = b"\xff\xe1" + struct.pack(">H", 65535) + b"Exif\0\0" + bytes(65527)
    profile = b"".join(
        b"\xff\xe2" + struct.pack(">H", 65519) + b"ICC_PROFILE\0" + bytes([n, 255]) + bytes(65503)
        for n in range(1, 256)
    )
    data = b"\xff\xd8" + exif + profile + jpeg_image("test", 0)[2:]
    within(5, lambda: decode_rgb(data))
    within(5, lambda: prepare_image(data, ShardSettings(size=32, max_pixels=1 << 20)))
    assert decode_rgb(data).shape == (32, 32, 3)


def test_an_image_file_without_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("/dev/zero", tmp_path / "zero.jpg")
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    (tmp_path / "good.jpg").write_bytes(jpeg_image("test", 0))
    report = write_shards(list(read_parts(folder_parts(tmp_path))), tmp_path / "out", ShardSettings(size=16), workers=1)
    assert (report.written, report.rejected) == (1, 3)
    for name in ("pipe.jpg", "zero.jpg", "large.jpg"):
        assert isinstance(read_object(str(tmp_path / name)), DataError)


def test_a_folder_that_links_to_itself_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.jpg").write_bytes(b"x")
    for name in ("loop", "again"):
        os.symlink(tmp_path / "in", tmp_path / "in" / "a" / name)
    assert [key for key, _ in read_parts(folder_parts(tmp_path / "in"))] == ["x"]


# Files that refer to other files


def test_no_key_leaves_the_folder_of_the_images(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    Path(f"{victim}.jpg").write_text(VICTIM)
    keys = ["../../victim", str(victim), "a/../../../victim", "s3://b/k"]
    (part,) = bucket_parts(str(tmp_path / "images"), keys, "train")
    assert all(isinstance(payload, DataError) for _, payload in part)


def test_a_checkpoint_refers_to_no_file_outside_its_folder(tmp_path: Path, victim: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-000000001"
    folder.mkdir(parents=True)
    for name in ("../../victim", str(victim), "facts.json/../../../victim"):
        fact = {"size": len(VICTIM), "sha256": "0"}
        (folder / "COMMIT").write_text(json.dumps({"schema_version": 1, "step": 1, "files": {name: fact}}))
        with pytest.raises(CheckpointError, match="not a file name of a checkpoint"):
            read_checkpoint(str(tmp_path), folder.name)
    with pytest.raises(CheckpointError, match="is not a checkpoint name"):
        read_checkpoint(str(tmp_path), "../checkpoints/step-000000001")


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "artifact", "key": "a.txt", "value": {"file": "../victim", "size": 1, "sha256": "0"}},
        {"kind": "artifact", "key": "../a.txt", "value": {"file": "a.txt", "size": 1, "sha256": "0"}},
        {"kind": "artifact", "key": "a.txt", "value": {"file": "/etc/passwd", "size": 1, "sha256": "0"}},
        {"kind": "model", "key": "m", "value": {"file": "models/m", "files": {"../../../planted": "0"}}},
        {"kind": "model", "key": "m", "value": {"file": "models/m", "files": {"/tmp/planted": "0"}}},
        {"kind": "model", "key": "..", "value": {"file": "models/m", "files": {"MLmodel": "0"}}},
        {"kind": "run", "key": "x' OR name != '", "value": {"experiment": "e", "name": "n"}},
        {"kind": "metric", "key": "x", "value": "1; DROP", "step": 0},
        {"kind": "odd", "key": "x", "value": "y"},
    ],
)
def test_a_journal_refers_to_no_file_outside_its_run(event: dict, tmp_path: Path, victim: Path) -> None:
    run = tmp_path / "run"
    (run / "journal").mkdir(parents=True)
    body = json.dumps([{"time_ms": 1, **event}])
    segment = f'{{"schema_version": 1, "crc32": {zlib.crc32(body.encode())}, "events": {body}}}'
    name = f"{1:020d}-w.00-1.json"
    (run / "journal" / name).write_text(segment)
    reader = JournalReader(str(run))
    assert reader.poll() == []
    assert list(reader.unreadable) == [str(run / "journal" / name)]


def test_a_manifest_reads_only_regular_files_in_its_folder(tmp_path: Path, victim: Path) -> None:
    source = [("a", jpeg_image("test", 0))]
    write_shards(source, tmp_path / "shards", ShardSettings(size=16), workers=1)
    sound = Manifest.open(tmp_path / "shards")
    from paml.shards.manifest import ShardInfo, write_manifest

    info = sound.shards[0]
    os.mkfifo(tmp_path / "pipe")
    for name, error, what in (
        ("../victim", DataError, "is not a path below"),
        (str(tmp_path / "pipe"), StorageError, "cannot open the shard"),
        ("/dev/zero", StorageError, "cannot open the shard"),
    ):
        (tmp_path / "planted").mkdir(exist_ok=True)
        planted = ShardInfo(name, info.count, info.bytes, info.sha256)
        batch = sound._batch.replace_schema_metadata(None)
        with pytest.raises(error, match=what):
            ShardReader(write_manifest(str(tmp_path / "planted"), batch, [planted], settings={}, report={})).read(0)


def test_a_table_with_a_valid_checksum_and_offsets_outside_of_it_is_refused(tmp_path: Path) -> None:
    sound = table_from_triples(
        ["a", "b", "c"], ["x", "y"], None, [0, 1, 2], [0, 1, 0], [1, 0, 1], f"{tmp_path}/t.arrow"
    )
    about = dict(sound.metadata)
    wrong = {
        "offsets beyond the labels": ([0, 1, 900, 3], [1, 2, 1], about),
        "offsets that fall": ([0, 2, 1, 3], [1, 2, 1], about),
        "a class that is not there": ([0, 1, 2, 3], [1, 2, 65000], about),
        "no classes": ([0, 1, 2, 3], [1, 2, 1], about | {"classes": [], "names": []}),
        "classes that are no text": ([0, 1, 2, 3], [1, 2, 1], about | {"classes": [1, 2], "names": [1, 2]}),
        "no digest": ([0, 1, 2, 3], [1, 2, 1], {k: v for k, v in about.items() if k != "digest"}),
    }
    for what, (offsets, codes, metadata) in wrong.items():
        lists = pa.Array.from_buffers(
            pa.list_(pa.field("item", pa.uint16())),
            3,
            [None, pa.py_buffer(np.array(offsets, np.int32))],
            children=[pa.array(codes, pa.uint16())],
        )
        schema = pa.schema([("key", pa.string()), ("labels", lists.type)])
        schema = schema.with_metadata({**CHECKSUM_PLACEHOLDER, b"paml": json.dumps(metadata).encode()})
        path = str(tmp_path / "planted.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays([pa.array(["a", "b", "c"]), lists], schema=schema))
        write_checksum(path)
        with pytest.raises(LabelError, match="damaged"):
            LabelTable.open(path)
        assert what


# Links in caches


def test_the_shard_cache_follows_no_link(tmp_path: Path, victim: Path, s3: str) -> None:
    source = [(f"{n}", jpeg_image("test", n)) for n in range(4)]
    write_shards(source, f"{s3}/shards", ShardSettings(size=16, samples_per_shard=4), workers=1)
    manifest = Manifest.open(f"{s3}/shards")
    name = manifest.shards[0].sha256
    for planted in (f"{name}.lock", f"{name}.tar", "space.lock", ""):
        cache = tmp_path / f"cache-{planted}"
        cache.mkdir()
        if planted:
            (cache / "shards").mkdir()
            os.symlink(victim, cache / "shards" / planted)
        else:
            (tmp_path / "elsewhere").mkdir()
            os.symlink(tmp_path / "elsewhere", cache / "shards")
        with pytest.raises(StorageError, match="is a link or not a regular file"):
            ShardReader(manifest, str(cache)).read(0)
        assert victim.read_text() == VICTIM
    assert not list((tmp_path / "elsewhere").iterdir())
    cache = tmp_path / "cache-part"
    (cache / "shards").mkdir(parents=True)
    os.symlink(victim, cache / "shards" / f"{name}.part")  # the target of a fetch: it is removed, not followed
    assert ShardReader(manifest, str(cache)).read(0)
    assert victim.read_text() == VICTIM


def test_the_feature_cache_follows_no_link(tmp_path: Path, victim: Path, prepared: Path) -> None:
    from paml.training.data import open_data
    from paml.training.world import World
    from tests.helpers.runs import cached, state_of

    changes = {"model": {"train_from": "stage3"}, "data": {"features_dir": str(tmp_path / "features")}}
    settings = tiny_settings(prepared, tmp_path, **changes)
    data = open_data(settings.data)
    cached(state_of(settings, data, World()), data)
    folders = sorted((tmp_path / "features").iterdir())
    for name in ("features.f16", "features.json", "lock"):
        for folder in folders:
            (folder / "features.json").unlink() if name == "lock" else None
            (folder / name).unlink()
            os.symlink(victim, folder / name)
        with pytest.raises(StorageError, match="is a link or not a regular file"):
            cached(state_of(settings, data, World()), data)
        assert victim.read_text() == VICTIM
        for folder in folders:
            (folder / name).unlink()
        if name != "lock":
            cached(state_of(settings, data, World()), data)


def test_the_shard_writers_lock_follows_no_link(tmp_path: Path, victim: Path) -> None:
    out = tmp_path / "out"
    source = [("a", jpeg_image("test", 0))]

    def stopping():
        yield from source
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_shards(stopping(), out, ShardSettings(size=16), workers=1, expected_count=2)
    (lock,) = list(out.rglob("lock"))
    lock.unlink()
    os.symlink(victim, lock)
    with pytest.raises(StorageError, match="is a link or not a regular file"):
        write_shards(source, out, ShardSettings(size=16), workers=1, expected_count=2)
    assert victim.read_text() == VICTIM


# Text


def test_xml_that_expands_or_refers_to_files_is_refused(tmp_path: Path, victim: Path) -> None:
    for name in ("ImageSets/Main", "Annotations"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
    bomb = f'<!DOCTYPE x [<!ENTITY l0 "ha">{laughs}]><annotation><object><name>&l11;</name></object></annotation>'
    outside = (
        f'<!DOCTYPE x [<!ENTITY f SYSTEM "file://{victim}">]><annotation><object><name>&f;</name></object></annotation>'
    )
    for text in (bomb, outside, '<?xml version="1.0" encoding="no-such"?><annotation/>', "<a>" * 100_000):
        (tmp_path / "Annotations" / "a.xml").write_text(text)
        with pytest.raises(DataError) as refused:
            read_voc(str(tmp_path), None, VocSettings())
        assert VICTIM not in str(refused.value)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("../../victim\n")
    with pytest.raises(DataError, match="is not a path below"):
        read_voc(str(tmp_path), None, VocSettings())


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['touch MARKER']",
        "seed: !!python/name:os.system",
        "run: !!python/object/new:os.system [touch MARKER]",
        "run: {class_path: subprocess.Popen, init_args: {args: [touch, MARKER]}}",
        "loss: {class_path: os.system, init_args: {command: 'touch MARKER'}}",
        "model: {class_path: tests.security.test_attacks.Planted}",
    ],
)
def test_a_recipe_cannot_run_code(text: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "recipe.yaml").write_text(text.replace("MARKER", str(marker)))
    with pytest.raises(UsageError):
        read_settings(TrainSettings, ["--config", str(tmp_path / "recipe.yaml")])
    assert not marker.exists()


# Formulas

FORMULAS = (
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "'=1",
    "=cmd|' /C calc'!A0",
    "=1\r=2",
    "＝1",
    "＋1",
    "－1",
    "＠1",
)


def test_reports_hold_no_formula_and_their_keys_can_be_read_back(tmp_path: Path) -> None:
    def rows_of(rejects: list[tuple[str, str]]) -> list[list[str]]:
        write_rejects(str(tmp_path), rejects)
        with open(tmp_path / "rejects.csv", newline="") as file:
            return list(csv.reader(file))[1:]

    rows = rows_of([(key, key) for key in FORMULAS])
    assert all(cell[0] == "'" for row in rows for cell in row)
    assert sorted(unescape_formula(key) for key, _ in rows) == sorted(FORMULAS)
    assert rows_of([("a\r=1", "x")]) == [["a\r=1", "x"]]


def test_open_images_formats_are_written_unchanged(tmp_path: Path) -> None:
    from paml.labels import build_label_table

    keys, mids = [f for f in FORMULAS if "\r" not in f and "\t" not in f], ["=x", "@y", "-z"]
    image, cls = np.divmod(np.arange(len(keys) * 3), 3)
    table = table_from_triples(keys, mids, None, image, cls, cls % 2, str(tmp_path / "t.arrow"))
    export_csv(table, str(tmp_path / "a.csv"))
    export_classes(table, str(tmp_path / "c.csv"))
    report = build_label_table(
        str(tmp_path / "a.csv"),
        str(tmp_path / "c.csv"),
        str(tmp_path / "u.arrow"),
        descriptions=str(tmp_path / "c.csv"),
    )
    assert report.table.digest == table.digest


def test_rejected_keys_that_are_formulas_are_escaped(tmp_path: Path) -> None:
    source = [("=1+1", b"not an image"), ("a", jpeg_image("test", 0))]
    write_shards(source, tmp_path / "out", ShardSettings(size=16), workers=1)
    assert (tmp_path / "out" / "rejects.csv").read_text().splitlines()[1].startswith("'=1+1,")
