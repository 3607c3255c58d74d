"""The fuzzed parsers: how to make inputs, and how to run the parser on them.

`feed` takes a list of `batch` inputs and returns (results, refused); any exception not in `DOCUMENTED` is a finding.
Parsers with expensive calls get many records in one file.
"""

import functools
import gzip
import hashlib
import io
import json
import os
import random
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save

from paml.data.decode import decode_into, decode_rgb
from paml.errors import PamlError
from paml.explain.boxes import read_boxes
from paml.inference.predictor import ModelInfo
from paml.labels import LabelError, LabelSettings, LabelTable, build_label_table, table_from_triples
from paml.labels.class_list import read_classes, read_descriptions
from paml.labels.rejects import HEADER
from paml.labels.verdicts import apply_verdicts
from paml.losses.prior import read_prior, write_prior
from paml.metrics.calibration import Calibration
from paml.metrics.pairs import Pairs, read_pairs, write_pairs
from paml.models.backbones import load_weights
from paml.parsing import read_json
from paml.preparation.tables import SplitRecords, find_classes, make_keys, write_table
from paml.runs.folder import read_result, settings_of_run
from paml.runs.journal import Journal, JournalReader
from paml.settings import flatten, settings_from_values
from paml.shards import Manifest, ShardReader, ShardSettings, write_shards
from paml.shards.images import image_size, prepare_image
from paml.shards.index import index_shards
from paml.shards.reader import CorruptSampleError
from paml.shards.spill import DamagedSpillError, SpillHeader, read_records, read_spill, write_spill
from paml.sources.coco import CocoSettings, detect_coco
from paml.sources.coco import read_coco as read_coco_records
from paml.sources.fiftyone import FiftyOneSettings, detect_fiftyone, read_fiftyone
from paml.sources.hf import HFSettings, detect_hf, read_hf
from paml.sources.label_studio import LabelStudioSettings, detect_label_studio, read_label_studio
from paml.sources.table import TableSettings, detect_table
from paml.sources.table import read_table as read_own_table
from paml.sources.tars import BadMember, TarDamage, open_tar, walk_tar
from paml.sources.voc import VocSettings
from paml.sources.voc import read_voc as read_voc_records
from paml.sources.webdataset import WebDatasetSettings, detect_webdataset, read_webdataset
from paml.storage import StorageError
from paml.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from paml.training.settings import TrainSettings
from tests.security.mutate import changed, changed_png, changed_tar, chooser, json_bytes, with_checksum

DOCUMENTED = (PamlError, LabelError, StorageError, CorruptSampleError, DamagedSpillError)
"""Errors that a parser may raise for unusable content."""
MIDS = [f"/m/{number:02d}" for number in range(12)]
KEYS = [f"{number:016x}" for number in range(40)]
ONE_THREAD = LabelSettings(threads=1)


class Target(NamedTuple):
    """A parser."""

    make: Callable[[random.Random], bytes]
    feed: Callable[[list[bytes], Path], tuple[int, int]]
    batch: int = 1
    share: int = 1
    """Inputs out of 1.1 million."""


def one(read: Callable[[bytes, Path], Any]) -> Callable[[list[bytes], Path], tuple[int, int]]:
    """`feed` for a parser of one input."""

    def feed(inputs: list[bytes], folder: Path) -> tuple[int, int]:
        for data in inputs:
            try:
                read(data, folder)
            except DOCUMENTED:
                return 0, 1
        return 1, 0

    return feed


def in_file(read: Callable[[str], Any], name: str) -> Callable[[list[bytes], Path], tuple[int, int]]:
    """`feed` for a parser of a file, given by its path."""

    def give(data: bytes, folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        read(str(path))

    return one(give)


def encoded_image(size: int, kind: str, seed: int = 0, **options: Any) -> bytes:
    """A small noise image as compressed bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)
    mode = options.pop("mode", "RGB")
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


@functools.cache
def images() -> tuple[bytes, ...]:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "text"
    return (
        encoded_image(24, "JPEG", 1),
        encoded_image(24, "JPEG", 2, progressive=True),
        encoded_image(16, "JPEG", 3, mode="L"),
        encoded_image(16, "JPEG", 4, mode="CMYK"),
        encoded_image(24, "JPEG", 5, exif=exif.tobytes(), icc_profile=b"\0" * 300),
        encoded_image(16, "PNG", 6),
        encoded_image(16, "PNG", 7, mode="P"),
        encoded_image(16, "PNG", 8, mode="LA"),
        encoded_image(16, "WEBP", 9, lossless=True),
        encoded_image(24, "WEBP", 10, quality=50),
        encoded_image(16, "GIF", 11),
        encoded_image(16, "BMP", 12),
        encoded_image(16, "TIFF", 13, compression="tiff_lzw"),
        encoded_image(16, "TIFF", 14),
        encoded_image(12, "PPM", 15),
    )


def make_image(rng: random.Random) -> bytes:
    chosen = rng.choice(images())
    if chosen.startswith(b"\x89PNG") and rng.random() < 0.6:
        return changed_png(rng, chosen)
    return changed(rng, chosen, images())


def read_image_bytes(data: bytes, folder: Path) -> None:
    refused: Exception | None = None
    out = np.empty((20, 20, 3), np.uint8)
    for read in (
        lambda: decode_rgb(data),
        lambda: decode_into(data, out),
        lambda: image_size(data),
        lambda: prepare_image(data, ShardSettings(size=16, max_pixels=1 << 22)),
    ):
        try:
            read()
        except DOCUMENTED as error:
            refused = error
    if refused is not None:
        raise refused


@functools.cache
def tars() -> tuple[bytes, ...]:
    made = []
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as tar:
            for number, data in enumerate(images()[:4]):
                name = f"{'d/' * 60 if number == 1 and form != tarfile.USTAR_FORMAT else ''}{number:06d}.jpg"
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
                info = tarfile.TarInfo("000009.jpg")
                info.type, info.linkname = kind, "/etc/passwd"
                tar.addfile(info)
        made.append(out.getvalue())
    return tuple(made)


def make_tar(rng: random.Random) -> bytes:
    data = changed_tar(rng, rng.choice(tars()), tars())
    if rng.random() < 0.1:
        data = gzip.compress(data, 1)
        return changed(rng, data) if rng.random() < 0.5 else data
    return data


def read_tar(data: bytes, folder: Path) -> None:
    path = folder / "x.tar"
    path.write_bytes(data)
    refused: Exception | None = None
    with open_tar(str(path)) as file:
        try:
            for member in walk_tar(file, str(path)):
                try:
                    if len(member.read()) != member.size:
                        raise AssertionError("a member is not as long as its header says")
                except BadMember as error:
                    refused = error
        except TarDamage as error:
            refused = error
    if refused is not None:
        raise refused


def index(data: bytes, folder: Path) -> None:
    (folder / "in").mkdir(exist_ok=True)
    (folder / "in" / "x.tar").write_bytes(data)
    manifest = index_shards(folder / "in", folder / "out")
    reader = ShardReader(manifest)
    for number in range(len(manifest)):
        reader.read(number)


RECORDS = tuple(f"{KEYS[number % 40]},verification,{MIDS[number % 12]},{number % 2}".encode() for number in range(60))


def make_record(rng: random.Random, as_it_is: float = 0.2) -> bytes:
    """A line of an annotation file; most are changed."""
    line = b"%s,%s,%s,%s" % (
        rng.choice(KEYS).encode() if rng.random() < 0.6 else b"%016x" % rng.getrandbits(64),
        rng.choice((b"verification", b"crowd", b"machine", b"")),
        rng.choice(MIDS).encode(),
        rng.choice((b"0", b"1", b"1.0", b"0.5", b"")),
    )
    return as_line(changed(rng, line, RECORDS, 2)) if rng.random() > as_it_is else line


def as_line(data: bytes) -> bytes:
    """One line of UTF-8: other encodings and line ends are tested by file inputs."""
    return data.decode("utf-8", "replace").translate({10: 32, 13: 32, 0: 32}).encode()


def feed_annotations(inputs: list[bytes], folder: Path) -> tuple[int, int]:
    path, classes = folder / "a.csv", folder / "classes.txt"
    path.write_bytes(",".join(HEADER).encode() + b"\n" + b"\n".join(inputs) + b"\n")
    classes.write_text("\n".join(MIDS))
    try:
        report = build_label_table(str(path), str(classes), str(folder / "t.arrow"), settings=ONE_THREAD)
    except DOCUMENTED:
        return 0, len(inputs)
    if report.rows != report.table.num_annotations + sum(report.rejected.values()):
        raise AssertionError("rows are not labels and rejects")
    accepted = min(report.table.num_annotations, len(inputs))
    return accepted, len(inputs) - accepted


ANNOTATION_FILES = (
    *(",".join(HEADER).encode() + end + end.join(RECORDS[:9]) + end for end in (b"\n", b"\r\n")),
    b"\xef\xbb\xbf"
    + ",".join(HEADER).encode()
    + b"\n"
    + b"\n".join(b'"' + b'","'.join(r.split(b",")) + b'"' for r in RECORDS[:9]),
)


def annotation_file(data: bytes, folder: Path) -> None:
    (folder / "a.csv").write_bytes(data)
    (folder / "classes.txt").write_text("\n".join(MIDS))
    build_label_table(str(folder / "a.csv"), str(folder / "classes.txt"), str(folder / "t.arrow"), settings=ONE_THREAD)


@functools.cache
def _table(folder: str) -> LabelTable:
    image, cls = np.divmod(np.arange(len(KEYS) * 3), 3)
    return table_from_triples(KEYS, MIDS, None, image, (image + 4 * cls) % 12, cls % 2, f"{folder}/table.arrow")


def feed_verdicts(inputs: list[bytes], folder: Path) -> tuple[int, int]:
    path = folder / "v.csv"
    path.write_bytes(",".join(HEADER).encode() + b"\n" + b"\n".join(inputs) + b"\n")
    try:
        report = apply_verdicts(_table(str(folder)), [str(path)], str(folder / "new.arrow"))
    except DOCUMENTED:
        return 0, len(inputs)
    accepted = min(report.added + report.overturned + report.confirmed, len(inputs))
    return accepted, len(inputs) - accepted


def make_own(rng: random.Random) -> bytes:
    line = b"%s,%s,%s" % (
        b"%016x" % rng.getrandbits(64),
        rng.choice(MIDS).encode(),
        rng.choice((b"0", b"1", b"positive", b"Negative", b"maybe", b"")),
    )
    return as_line(changed(rng, line, RECORDS, 3)) if rng.random() < 0.98 else line


def feed_own(inputs: list[bytes], folder: Path) -> tuple[int, int]:
    path = folder / "own.csv"
    path.write_bytes(b"image,class,state\n" + b"\n".join(inputs) + b"\n")
    try:
        records = read_own_table(str(path), None, TableSettings(form="long"))
        keys = make_keys(records, "path")
        split = SplitRecords(records=records, rows=np.arange(len(keys)), keys=keys, unlisted="unobserved")
        classes = find_classes([records], None)
        report = write_table(split, classes, str(folder / "own.arrow"), ONE_THREAD, lambda line: None)
    except DOCUMENTED:
        return 0, len(inputs)
    accepted = min(report.table.num_annotations, len(inputs))
    return accepted, len(inputs) - accepted


@functools.cache
def own_parquets() -> tuple[bytes, ...]:
    made = []
    for columns in (
        {"image": [f"{key}.jpg" for key in KEYS], "class": (MIDS * 4)[:40], "state": [0, 1] * 20},
        {"image": pa.array(KEYS).dictionary_encode(), "labels": ["/m/01;/m/02", None] * 20},
        {"image": KEYS, "class": [["x"]] * 40, "state": [{"a": 1}] * 40},
        {"image": pa.array(range(40)), "class": pa.array([b"\xff\xfe"] * 40), "state": [1.0] * 40},
    ):
        out = io.BytesIO()
        pq.write_table(pa.table(columns), out, compression="zstd" if len(made) % 2 else "snappy")
        made.append(out.getvalue())
    return tuple(made)


def seeds_in(write: Callable[[Path], Path]) -> Callable[[], bytes]:
    """The bytes of a valid file, written once."""

    @functools.cache
    def data() -> bytes:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            return write(Path(folder)).read_bytes()

    return data


def _write_manifest(folder: Path) -> Path:
    source = [(key, encoded_image(16, "JPEG", number)) for number, key in enumerate(KEYS[:12])]
    write_shards(source, folder, ShardSettings(size=16, samples_per_shard=5), workers=1)
    return folder / "manifest.arrow"


manifest_bytes = seeds_in(_write_manifest)
table_bytes = seeds_in(lambda folder: Path(_table.__wrapped__(str(folder)).path))
text_table_bytes = seeds_in(
    lambda folder: Path(table_from_triples(["a", "bb", "ccc"], MIDS, None, [0, 1], [3, 4], [1, 0], f"{folder}/t").path)
)


def make_checked(*seeds: Callable[[], bytes]) -> Callable[[random.Random], bytes]:
    def make(rng: random.Random) -> bytes:
        data = changed(rng, rng.choice(seeds)(), [seed() for seed in seeds], 3)
        return with_checksum(data) if rng.random() < 0.8 else data

    return make


def read_table(path: str) -> None:
    table = LabelTable.open(path)
    rows = table.rows_of(KEYS[:5])
    table.lookup(rows[rows >= 0])
    table.keys()
    table.class_counts()


def read_manifest(data: bytes, folder: Path) -> None:
    (folder / "m").mkdir(exist_ok=True)
    (folder / "m" / "manifest.arrow").write_bytes(data)
    manifest = Manifest.open(folder / "m")
    manifest.keys().to_pylist()
    for shard in range(min(4, len(manifest.shards))):
        manifest.rows_of_shard(shard)
        manifest.shard_path(shard)


WEIGHTS = {"conv.weight": torch.ones(2, 3), "conv.bias": torch.zeros(2), "n": torch.tensor(5)}
FACTS: dict[str, Any] = {
    "settings": flatten(TrainSettings()),
    "num_classes": 12,
    "epoch": 2,
    "step": 0,
    "optimizer_step": 12,
    "scaler": {},
    "history": [{"epoch": 1, "val/mAP": 0.5}],
    "best": {"5": {"checkpoint": "step-000000012", "epoch": 1, "map": 0.5}},
    "workers": 1,
    "data": {"train": "x"},
}
_SAFE = save(WEIGHTS)


@functools.cache
def _commit() -> dict[str, Any]:
    files = {"weights.safetensors": _SAFE, "facts.json": json.dumps(FACTS).encode()}
    listed = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return {"schema_version": 1, "step": 12, "files": listed}


def changed_safetensors(rng: random.Random) -> bytes:
    """Changed JSON in the header with a valid length, or random changes."""
    if rng.random() < 0.5:
        return changed(rng, _SAFE)
    size = int.from_bytes(_SAFE[:8], "little")
    header = json_bytes(rng, json.loads(_SAFE[8 : 8 + size]))
    return len(header).to_bytes(8, "little") + header + _SAFE[8 + size :]


def make_checkpoint(rng: random.Random) -> bytes:
    """A byte that selects the file of a checkpoint, then its content."""
    which = rng.randrange(3)
    data = (
        json_bytes(rng, _commit()) if which == 0 else json_bytes(rng, FACTS) if which == 1 else changed_safetensors(rng)
    )
    return bytes([which]) + data


def read_planted_checkpoint(data: bytes, folder: Path) -> None:
    place = folder / "checkpoints" / "step-000000012"
    if not place.exists():
        write_checkpoint(str(folder), 12, Checkpoint({"weights": WEIGHTS}, FACTS))
        (folder / "good").write_bytes((place / "COMMIT").read_bytes())
    which, content = data[0] % 3, data[1:]
    files = {"weights.safetensors": _SAFE, "facts.json": json.dumps(FACTS).encode()}
    name = ("COMMIT", "facts.json", "weights.safetensors")[which]
    files[name] = content
    if which:
        listed = {name: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in files.items()}
        files["COMMIT"] = json.dumps({"schema_version": 1, "step": 12, "files": listed}).encode()
    else:
        files["COMMIT"] = content
    for file, text in files.items():
        (place / file).write_bytes(text)
    read_checkpoint(str(folder), place.name)


@functools.cache
def _network() -> torch.nn.Module:
    network = torch.nn.Module()
    network.conv = torch.nn.Conv2d(3, 2, 1)
    return network


@functools.cache
def torch_files() -> tuple[bytes, ...]:
    made = []
    state = {"conv.weight": torch.ones(2, 3, 1, 1), "conv.bias": torch.zeros(2)}
    for zipped in (True, False):
        out = io.BytesIO()
        torch.save(state, out, _use_new_zipfile_serialization=zipped)
        made.append(out.getvalue())
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(made[0])) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"cos\nsystem\n(S'true'\ntR." if name.endswith("data.pkl") else old.read(name))
    return (*made, out.getvalue())


@functools.cache
def segments() -> tuple[dict[str, Any], ...]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(folder, "w")
        journal.run(experiment="e", name="n", tags={"a": "b"}, note="text")
        journal.metrics({"x": float("nan"), "y": 1.5}, 3)
        journal.params({"a": {"b": 1}})
        journal.dataset("train", digest="d", source="s", context="training", profile={"images": 3})
        journal.artifact_bytes(b"x", "a/b.txt")
        journal.status("FINISHED")
        files = sorted(Path(folder, "journal").iterdir())
        events = [json.loads(file.read_text())["events"] for file in files]
    model = {
        "kind": "model",
        "time_ms": 1,
        "key": "final_model",
        "value": {"file": "models/m", "files": {"MLmodel": "0"}},
    }
    return (*({"schema_version": 1, "events": rows} for rows in events), {"schema_version": 1, "events": [model]})


def make_segment(rng: random.Random) -> bytes:
    text = json_bytes(rng, rng.choice(segments()))
    try:
        content = json.loads(text)
        body = json.dumps(content["events"], ensure_ascii=False, allow_nan=False).encode()
        return json.dumps({**content, "crc32": zlib.crc32(body)}, ensure_ascii=False).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return text


def read_segment(data: bytes, folder: Path) -> None:
    place = folder / "run" / "journal"
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{1:020d}-w.00-1.json").write_bytes(data)
    reader = JournalReader(str(folder / "run"))
    for event in reader.poll():
        if event.kind in ("artifact", "model") and ".." in event.value["file"].split("/"):
            raise AssertionError("a journal names a file outside of its run")
    if reader.unreadable:
        raise DamagedSpillError("journal", "unreadable")


def _calibration(folder: Path) -> Path:
    from paml.metrics.calibration import CalibrationSettings, calibrate

    rng = np.random.default_rng(0)
    cls, logit = rng.integers(0, 3, 90), rng.normal(size=90)
    calibrate(cls, logit, logit + rng.normal(size=90) > 0, 3, CalibrationSettings()).write(str(folder / "c.json"))
    return folder / "c.json"


calibration_bytes = seeds_in(_calibration)
MODEL_FACTS = {
    "model": {"backbone": "resnet18", "weights": None, "output_stride": 16},
    "alpha": 5.0,
    "classes": MIDS,
    "names": MIDS,
    "image_size": 32,
    "run": "x",
    "checkpoint": "step-000000012",
}
RESULT = {
    "best": {"5": {"epoch": 1, "checkpoint": "step-000000012", "map": 0.5}},
    "test": {},
    "history": [{"epoch": 1, "val/mAP": 0.5}],
}


def make_json(rng: random.Random) -> bytes:
    """A byte that selects a JSON file of a run or model, then its content."""
    which = rng.randrange(4)
    value = (json.loads(calibration_bytes()), MODEL_FACTS, RESULT, {"schema_version": 1, "settings": FACTS["settings"]})
    return bytes([which]) + json_bytes(rng, value[which])


def read_model_json(data: bytes, folder: Path) -> None:
    name = ("calibration.json", "model.json", "result.json", "run.json")[data[0] % 4]
    path = folder / name
    path.write_bytes(data[1:])
    if name == "calibration.json":
        Calibration.read(str(path))
    elif name == "model.json":
        ModelInfo.from_json(read_json(str(path), "copy it again"), str(path))
    elif name == "result.json":
        read_result(str(folder))
    else:
        settings_of_run(str(folder))


@functools.cache
def piece() -> bytes:
    import tempfile

    from paml.shards.images import PreparedImage
    from paml.shards.spill import key_digest, pack

    with tempfile.TemporaryDirectory() as folder:
        records = []
        for number, key in enumerate(KEYS[:4]):
            digest = key_digest(0, key)
            records.append((number, digest, pack(key, digest, 9, PreparedImage(images()[0], 24, 24, "jpg"))))
        path = f"{folder}/p.spill"
        header = SpillHeader(first=0, end=5, last=True, keys="k", unwanted=0, absent=0, rejects={"a": "b"})
        write_spill(path, records, header)
        return Path(path).read_bytes()


def make_piece(rng: random.Random) -> bytes:
    data = piece()
    if rng.random() < 0.5:
        return changed(rng, data)
    size = int.from_bytes(data[4:8], "little")
    header = json_bytes(rng, json.loads(data[12 : 12 + size]))
    return (
        data[:4]
        + len(header).to_bytes(4, "little")
        + zlib.crc32(header).to_bytes(4, "little")
        + header
        + data[12 + size :]
    )


def read_planted_piece(path: str) -> None:
    found = read_spill(path)
    list(read_records(memoryview(Path(path).read_bytes())[found.start :], path))
    found.offsets(np.arange(5))


def _pairs(folder: Path) -> Path:
    pairs = Pairs(torch.arange(9).int(), torch.rand(9), torch.arange(9) % 2 == 0, torch.arange(9))
    write_pairs(str(folder / "p.parquet"), pairs, 12, {"split": "s", "labels": "l"})
    return folder / "p.parquet"


pairs_bytes = seeds_in(_pairs)
_SETTING_NAMES = tuple(flatten(TrainSettings()))
_SETTING_VALUES = (
    "null", "true", "1", "-1", "1e-3", "[1, 2]", "{a: 1}", "!!python/object/apply:os.system ['true']", "&a [*a]", "~",
    "an",
    "ll-r", "runs/x", "s3://b/k", "{class_path: os.system, init_args: {command: 'true'}}", "@x", "2026-01-01",
    "0x10", "1_000",
)  # fmt: skip


def make_setting(rng: random.Random) -> bytes:
    value = changed(rng, rng.choice(_SETTING_VALUES).encode(), (), 2)
    return rng.choice(_SETTING_NAMES).encode() + b"=" + value


def read_setting(data: bytes, folder: Path) -> None:
    name, _, text = data.decode("utf-8", "surrogateescape").partition("=")
    settings_from_values(TrainSettings, {name: text}, "fuzzed")


COCO = {
    "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(4)],
    "annotations": [{"id": n, "image_id": n, "category_id": 1 + n % 2} for n in range(4)],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}
XML = (
    b"<annotation><object><name>cat</name><difficult>0</difficult></object>"
    b"<object><name>dog</name></object></annotation>"
)


def read_coco(data: bytes, folder: Path) -> None:
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "train2014").mkdir(exist_ok=True)
    (folder / "train2014" / "0.jpg").write_bytes(b"x")
    (folder / "annotations" / "instances_train2014.json").write_bytes(data)
    read_coco_records(str(folder), None, CocoSettings())


def read_voc(data: bytes, folder: Path) -> None:
    for name in ("ImageSets/Main", "Annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    (folder / "Annotations" / "a.xml").write_bytes(data)
    read_voc_records(str(folder), None, VocSettings())


TABLES = (
    b"image,class,state,split\na.jpg,cat,1,train\nb.jpg,dog,0,val\nc.jpg,cat,unknown,test\n",
    b"Image Index,Finding Labels\r\na.png,Effusion|Mass\r\nb.png,Mass\r\nc.png,No Finding\r\n",
    b"filename; cat; dog\na.jpg;1;0\nb.jpg;;-1\n",
    'image,labels\na,"[""cat"", ""dog""]"\nb,[]\n'.encode("utf-16"),
    gzip.compress(b"path\tlabel\nx/a.jpg\tcat\n", mtime=0),
)
TASKS = [
    {
        "id": n,
        "data": {"image": f"/data/upload/1/0123abcd-{n}.jpg"},
        "annotations": [
            {
                "was_cancelled": False,
                "result": [
                    {"from_name": "c", "to_name": "image", "type": "choices", "value": {"choices": ["cat"]}},
                    {
                        "from_name": "b",
                        "to_name": "image",
                        "type": "rectanglelabels",
                        "value": {"rectanglelabels": ["a"]},
                    },
                ],
            }
        ],
        "predictions": [],
    }
    for n in range(3)
]
SAMPLES = {
    "samples": [
        {
            "filepath": f"data/{n}.jpg",
            "tags": ["train"],
            "positive_labels": {"_cls": "Classifications", "classifications": [{"label": "cat"}]},
            "negative_labels": {"_cls": "Classifications", "classifications": [{"label": "dog"}]},
        }
        for n in range(3)
    ]
}
LVIS = COCO | {
    "images": [
        {
            "id": n,
            "coco_url": f"http://x/train2017/{n}.jpg",
            "neg_category_ids": [1],
            "not_exhaustive_category_ids": [2],
        }
        for n in range(4)
    ]
}


def read_lvis(data: bytes, folder: Path) -> None:
    (folder / "lvis.json").write_bytes(data)
    detect_coco(str(folder / "lvis.json"))
    read_coco_records(str(folder / "lvis.json"), "images", CocoSettings())


def read_any_table(data: bytes, folder: Path) -> None:
    path = str(folder / ("t.csv.gz" if data.startswith(b"\x1f\x8b") else "t.csv"))
    Path(path).write_bytes(data)
    detect_table(path)
    read_own_table(path, None, TableSettings())


def read_tasks(data: bytes, folder: Path) -> None:
    (folder / "tasks.json").write_bytes(data)
    detect_label_studio(str(folder / "tasks.json"))
    read_label_studio(str(folder / "tasks.json"), "images", LabelStudioSettings())


def read_samples(data: bytes, folder: Path) -> None:
    (folder / "metadata.json").write_bytes(b"{}")
    (folder / "samples.json").write_bytes(data)
    detect_fiftyone(str(folder))
    read_fiftyone(str(folder), "images", FiftyOneSettings())


@functools.cache
def hf_parquets() -> tuple[bytes, ...]:
    made = []
    info = {
        "info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}}
    }
    image = [{"bytes": encoded_image(16, "PNG", n), "path": f"{n}.png"} for n in range(6)]
    for columns in ({"label": [0, 1, -1] * 2}, {"tags": [["cat"], [], ["dog", "cat"]] * 2}):
        table = pa.table({"image": pa.array(image), **columns}).replace_schema_metadata(
            {"huggingface": json.dumps(info)}
        )
        out = io.BytesIO()
        pq.write_table(table, out)
        made.append(out.getvalue())
    return tuple(made)


def read_hf_file(path: str) -> None:
    detect_hf(path)
    records = read_hf(path, None, HFSettings())
    for part in records.parts or ():
        list(part)


@functools.cache
def sample_tars() -> tuple[bytes, ...]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for n in range(3):
            for suffix, data in (
                ("png", encoded_image(16, "PNG", n)),
                ("cls", b"1 2"),
                ("json", b'{"labels": ["cat"]}'),
            ):
                info = tarfile.TarInfo(f"./{n:04}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return (out.getvalue(),)


def read_samples_tar(path: str) -> None:
    detect_webdataset(path)
    records = read_webdataset(path, None, WebDatasetSettings(labels="cls"))
    for part in records.parts or ():
        list(part)


BOXES = b"ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax\n" + b"\n".join(
    b"%s,x,%s,1,0.1,0.5,0.2,0.9" % (key.encode(), MIDS[0].encode()) for key in KEYS[:5]
)
CLASS_FILES = (
    "\n".join(MIDS).encode(),
    "\n".join(f"{mid},Name {mid}" for mid in MIDS).encode(),
    ("LabelName,DisplayName\r\n" + "\r\n".join(f'{mid},"A, ""b"""' for mid in MIDS)).encode(),
)


def read_class_file(path: str) -> None:
    read_classes(path)
    read_descriptions(path)


def _prior(name: str) -> Callable[[], bytes]:
    def write(folder: Path) -> Path:
        write_prior(str(folder / name), MIDS, np.linspace(0.1, 0.9, 12))
        return folder / name

    return seeds_in(write)


def lazily(seeds: Callable[[], Sequence[bytes]]) -> Callable[[random.Random], bytes]:
    return lambda rng: chooser(seeds())(rng)


TARGETS: dict[str, Target] = {
    "annotation CSV, rows": Target(make_record, feed_annotations, 4096, 430000),
    "annotation CSV, files": Target(lazily(lambda: ANNOTATION_FILES), one(annotation_file), 1, 200),
    "verdict CSV, rows": Target(lambda rng: make_record(rng, 0.02), feed_verdicts, 2048, 300000),
    "own labels, CSV rows": Target(make_own, feed_own, 2048, 255000),
    "own labels, Parquet files": Target(
        lazily(own_parquets),
        in_file(lambda path: read_own_table(path, None, TableSettings()), "own.parquet"),
        1,
        500,
    ),
    "class lists": Target(lazily(lambda: CLASS_FILES), in_file(read_class_file, "classes.csv"), 1, 40000),
    "tar archives": Target(make_tar, one(read_tar), 1, 12000),
    "tar archives, indexed": Target(make_tar, one(index), 1, 300),
    "manifests": Target(make_checked(manifest_bytes), one(read_manifest), 1, 4000),
    "label tables": Target(make_checked(table_bytes, text_table_bytes), in_file(read_table, "t.arrow"), 1, 5000),
    "checkpoints": Target(make_checkpoint, one(read_planted_checkpoint), 1, 5000),
    "weights files": Target(
        lazily(torch_files), in_file(lambda path: load_weights(_network(), path), "w.pth"), 1, 2000
    ),
    "journal segments": Target(make_segment, one(read_segment), 1, 20000),
    "images": Target(make_image, one(read_image_bytes), 1, 6000),
    "run and model JSON": Target(make_json, one(read_model_json), 1, 6000),
    "writer's spills": Target(make_piece, in_file(read_planted_piece, "x.spill"), 1, 5000),
    "pairs, Parquet": Target(lazily(lambda: [pairs_bytes()]), in_file(read_pairs, "p.parquet"), 1, 2000),
    "priors, CSV": Target(
        lazily(lambda: [_prior("p.csv")()]), in_file(lambda p: read_prior(p, MIDS), "p.csv"), 1, 2000
    ),
    "priors, Parquet": Target(
        lazily(lambda: [_prior("p.parquet")()]), in_file(lambda p: read_prior(p, MIDS), "p.parquet"), 1, 1000
    ),
    "boxes, CSV": Target(lazily(lambda: [BOXES]), in_file(lambda p: read_boxes(p, KEYS, MIDS), "b.csv"), 1, 3000),
    "COCO JSON": Target(lambda rng: json_bytes(rng, COCO), one(read_coco), 1, 300),
    "LVIS JSON": Target(lambda rng: json_bytes(rng, LVIS), one(read_lvis), 1, 60000),
    "tables": Target(lazily(lambda: TABLES), one(read_any_table), 1, 60000),
    "Label Studio JSON": Target(lambda rng: json_bytes(rng, TASKS), one(read_tasks), 1, 60000),
    "FiftyOne JSON": Target(lambda rng: json_bytes(rng, SAMPLES), one(read_samples), 1, 60000),
    "Hugging Face Parquet": Target(lazily(hf_parquets), in_file(read_hf_file, "h.parquet"), 1, 40000),
    "WebDataset tars": Target(lazily(sample_tars), in_file(read_samples_tar, "train-0.tar"), 1, 40000),
    "VOC XML": Target(lazily(lambda: [XML]), one(read_voc), 1, 300),
    "settings": Target(make_setting, one(read_setting), 1, 100),
}
"""By name, in the order of the table. `share` divides a number of inputs by the cost of a call."""


def folder_for(target: str, root: str) -> Path:
    """A separate folder for a target."""
    place = Path(root, "".join(c if c.isalnum() else "-" for c in target))
    os.makedirs(place, exist_ok=True)
    return place
