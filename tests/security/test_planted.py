"""A pickle that creates a file when it is unpickled, planted in place of everything that paml reads.

Each case plants it, reads as paml does, and returns the outcome. A test compares the cases with docs/security.md.
"""

import ast
import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from paml.checksum import CHECKSUM_PLACEHOLDER, write_checksum
from paml.compare.grid import base_settings
from paml.compare.settings import TuneSettings
from paml.compare.sweep import Sweep, claim_sweep, read_trials
from paml.data.decode import UndecodableError, decode_rgb
from paml.data.embeddings import open_embeddings
from paml.data.settings import DataSettings
from paml.errors import PamlError
from paml.explain.boxes import read_boxes
from paml.inference.bulk import BulkJob, BulkSettings, predict_images, read_part
from paml.inference.predictor import open_predictor
from paml.labels import LabelError, LabelTable, build_label_table
from paml.labels.class_list import read_classes
from paml.labels.verdicts import apply_verdicts
from paml.losses.prior import read_prior
from paml.metrics import read_pairs
from paml.models.backbones import load_weights
from paml.runs.folder import read_result, settings_of_run
from paml.runs.journal import Journal, read_journal
from paml.runs.spec import load_model
from paml.settings import flatten
from paml.shards import CorruptSampleError, Manifest, ShardReader, ShardSettings, write_shards
from paml.shards.index import index_shards
from paml.shards.spill import DamagedSpillError, read_spill
from paml.sources.coco import CocoSettings, read_coco
from paml.sources.fiftyone import FiftyOneSettings, read_fiftyone
from paml.sources.flickr import flickr_parts
from paml.sources.hf import HFSettings, read_hf
from paml.sources.label_studio import LabelStudioSettings, read_label_studio
from paml.sources.parts import read_parts
from paml.sources.release import Archive, _is_unpacked
from paml.sources.table import TableSettings, read_table
from paml.sources.tars import tar_parts
from paml.sources.voc import VocSettings, read_voc
from paml.sources.webdataset import WebDatasetSettings, read_webdataset
from paml.tracking.mlflow_sink import read_state
from paml.training.checkpoint import list_checkpoints, newest_checkpoint, read_checkpoint
from paml.training.watched import load_maps
from paml.training.world import World
from tests.helpers.prepared import CLASSES, jpeg_image, key_of, tiny_settings
from tests.helpers.runs import cached, run, state_of
from tests.helpers.sweeps import plan, tiny_sweep

ROOT = Path(__file__).parents[2]


class Evil:
    """Creates the file `marker` when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


class Place(NamedTuple):
    """An input of paml."""

    what: str
    reader: str
    """The part of paml that reads it."""
    ends: str
    """The expected outcome."""
    plant: Callable[["Ground", bytes], str]
    """Plants the bytes, reads, and returns the outcome."""


class Ground(NamedTuple):
    """Folders to plant in."""

    folder: Path
    """Empty."""
    prepared: Path
    run: Path
    """A copy of a trained run."""
    model: Path
    """A copy of a model folder."""
    s3: str | None = None


PLACES: list[Place] = []
REMOTE = ("the shard cache", "the cache of tables and manifests")


def place(what: str, reader: str, ends: str) -> Callable[[Callable[[Ground, bytes], Any]], None]:
    """Register a function that plants and reads; the outcome is its result or the name of its exception."""

    def add(plant: Callable[[Ground, bytes], Any]) -> None:
        def outcome(ground: Ground, evil: bytes) -> str:
            try:
                return str(plant(ground, evil))
            except (PamlError, LabelError, UndecodableError, CorruptSampleError, DamagedSpillError) as error:
                kinds = [kind.__name__ for kind in type(error).__mro__]
                return next(name for name in kinds if name in (*NAMED, type(error).__name__))

        PLACES.append(Place(what, reader, ends, outcome))

    return add


NAMED = ("CheckpointError", "SettingsError", "DataError", "LabelError")


def commit(folder: Path) -> None:
    """Rewrite COMMIT for the current files."""
    old = json.loads((folder / "COMMIT").read_text())
    for name in old["files"]:
        data = (folder / name).read_bytes()
        old["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "COMMIT").write_text(json.dumps(old))


def newest(ground: Ground) -> Path:
    return ground.run / "checkpoints" / list_checkpoints(str(ground.run))[-1]


@place("checkpoint: weights, COMMIT agreeing", "read_checkpoint, load_model", "CheckpointError")
def _(ground: Ground, evil: bytes) -> None:
    (newest(ground) / "weights.safetensors").write_bytes(evil)
    commit(newest(ground))
    load_model(str(ground.run), settings_of_run(str(ground.run)), newest(ground).name)


@place("checkpoint: optimizer, COMMIT agreeing", "newest_checkpoint (resume)", "passed over and named")
def _(ground: Ground, evil: bytes) -> str:
    (newest(ground) / "optimizer.safetensors").write_bytes(evil)
    commit(newest(ground))
    bad = newest(ground).name
    found, faults = newest_checkpoint(str(ground.run))
    return "passed over and named" if found is not None and bad in faults[0] else "used"


@place("checkpoint: facts.json, COMMIT agreeing", "read_checkpoint", "CheckpointError")
def _(ground: Ground, evil: bytes) -> None:
    (newest(ground) / "facts.json").write_bytes(evil)
    commit(newest(ground))
    read_checkpoint(str(ground.run), newest(ground).name)


@place("checkpoint: COMMIT", "read_checkpoint", "CheckpointError")
def _(ground: Ground, evil: bytes) -> None:
    (newest(ground) / "COMMIT").write_bytes(evil)
    read_checkpoint(str(ground.run), newest(ground).name)


@place("checkpoint: a pickle that COMMIT lists besides", "read_checkpoint", "CheckpointError")
def _(ground: Ground, evil: bytes) -> None:
    (newest(ground) / "extra.pkl").write_bytes(evil)
    listed = json.loads((newest(ground) / "COMMIT").read_text())
    listed["files"]["extra.pkl"] = {}
    (newest(ground) / "COMMIT").write_text(json.dumps(listed))
    commit(newest(ground))
    read_checkpoint(str(ground.run), newest(ground).name)


@place("foreign weights (model.weights: .pth, .pt)", "torch.load(weights_only=True)", "SettingsError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "w.pth").write_bytes(evil)
    load_weights(torch.nn.Linear(2, 2), str(ground.folder / "w.pth"))


@place("foreign weights (model.weights: .safetensors)", "safetensors", "SettingsError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "w.safetensors").write_bytes(evil)
    load_weights(torch.nn.Linear(2, 2), str(ground.folder / "w.safetensors"))


@place("run.json", "settings_of_run", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.run / "run.json").write_bytes(evil)
    settings_of_run(str(ground.run))


@place("result.json", "Result.read", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.run / "result.json").write_bytes(evil)
    read_result(str(ground.run))


@place("maps of an epoch (maps/*.safetensors)", "load_maps", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.run / "maps" / "epoch-0001.safetensors").write_bytes(evil)
    load_maps(str(ground.run), 1)


@place("journal: a segment", "JournalReader (MLflow, tables)", "passed over and named")
def _(ground: Ground, evil: bytes) -> str:
    journal = Journal(str(ground.folder), "w")
    journal.status("FINISHED")
    (ground.folder / "journal" / f"{5:020d}-w.00-1.json").write_bytes(evil)
    unreadable: dict[str, str] = {}
    events = read_journal(str(ground.folder), unreadable=unreadable)
    return "passed over and named" if len(events) == len(unreadable) == 1 else "read"


@place("mlflow.json (what MLflow was sent)", "read_state", "as if absent")
def _(ground: Ground, evil: bytes) -> str:
    (ground.run / "mlflow.json").write_bytes(evil)
    return "as if absent" if read_state(str(ground.run)) == {} else "used"


@place("scored pairs (artifacts/*.parquet)", "read_pairs (comparison, registry)", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.run / "p.parquet").write_bytes(evil)
    read_pairs(str(ground.run / "p.parquet"))


@place("model folder: weights.safetensors", "open_predictor", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.model / "weights.safetensors").write_bytes(evil)
    open_predictor(str(ground.model))


@place("model folder: model.json", "open_predictor", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.model / "model.json").write_bytes(evil)
    open_predictor(str(ground.model))


@place("calibration.json", "Calibration.read", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.model / "calibration.json").write_bytes(evil)
    open_predictor(str(ground.model))


@place("MLflow model: python_model.pkl among its files", "open_predictor", "not read")
def _(ground: Ground, evil: bytes) -> str:
    mlflow = ground.folder / "mlflow"
    shutil.copytree(ground.model, mlflow / "artifacts" / "model")
    (mlflow / "python_model.pkl").write_bytes(evil)
    (mlflow / "MLmodel").write_text("flavors: {python_function: {python_model: python_model.pkl}}")
    return "not read" if open_predictor(str(mlflow)).info.classes == CLASSES else "read"


@place("prediction.json of bulk scores", "predict_images", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    out = ground.folder / "scores"
    out.mkdir()
    (out / "prediction.json").write_bytes(evil)
    predict_images(str(ground.model), str(ground.prepared / "shards" / "test"), str(out), BulkSettings(top=2))


@place("scores/*.parquet of bulk scores", "read_part", "made anew")
def _(ground: Ground, evil: bytes) -> str:
    (ground.folder / "scores").mkdir()
    (ground.folder / "scores" / "a.parquet").write_bytes(evil)
    job = BulkJob("m", str(ground.folder), BulkSettings(), "d", "cpu", "mark")
    return "made anew" if read_part(job, "a") is None else "used"


@place("shard: an image is a pickle (indexed)", "index_shards", "rejected and counted")
def _(ground: Ground, evil: bytes) -> str:
    with tarfile.open(ground.folder / "x.tar", "w") as tar:
        for name, data in (("a.jpg", evil), ("b.jpg", jpeg_image("test", 0)), ("b.pyd", evil), ("b.pickle", evil)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    manifest = index_shards(ground.folder / "x.tar", ground.folder / "out")
    ShardReader(manifest).read(0)
    return "rejected and counted" if manifest.report["rejected"] == 1 and len(manifest) == 1 else "taken"


@place("shard: the file is a pickle", "ShardReader, by CRC-32", "CorruptSampleError")
def _(ground: Ground, evil: bytes) -> None:
    shards = ground.folder / "shards"
    shutil.copytree(ground.prepared / "shards" / "test", shards)
    manifest = Manifest.open(shards)
    Path(manifest.shard_path(0)).write_bytes(evil)
    ShardReader(manifest).read(0)


@place("shard: an image is a pickle, CRC-32 agreeing", "decode_rgb", "UndecodableError")
def _(ground: Ground, evil: bytes) -> None:
    decode_rgb(evil)


@place("manifest.arrow", "Manifest.open", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "manifest.arrow").write_bytes(evil)
    Manifest.open(ground.folder)


@place("manifest.arrow with a valid checksum and a pickled extension type", "Manifest.open", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    write_extension(ground.folder / "manifest.arrow", evil, {"schema_version": "1"})
    Manifest.open(ground.folder)


@place("label table", "LabelTable.open", "LabelError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "t.arrow").write_bytes(evil)
    LabelTable.open(ground.folder / "t.arrow")


@place("label table with a valid checksum and a pickled extension type", "LabelTable.open", "LabelError")
def _(ground: Ground, evil: bytes) -> None:
    about = {"kind": "label_table", "schema_version": 1}
    write_extension(ground.folder / "t.arrow", evil, {"paml": json.dumps(about)})
    LabelTable.open(ground.folder / "t.arrow")


def write_extension(path: Path, evil: bytes, metadata: dict[str, str]) -> None:
    """An Arrow file with a column of the type that pyarrow before 14.0.1 unpickled, with a valid checksum."""
    metadata_of_type = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": evil}
    schema = pa.schema(
        [pa.field("key", pa.int64(), metadata=metadata_of_type)], metadata={**CHECKSUM_PLACEHOLDER, **metadata}
    )
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array([1])], schema=schema))
    write_checksum(str(path))


@place("annotation CSV", "build_label_table", "LabelError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "a.csv").write_bytes(evil)
    (ground.folder / "classes.txt").write_text("/m/00\n")
    build_label_table(str(ground.folder / "a.csv"), str(ground.folder / "classes.txt"), str(ground.folder / "t"))


@place("class list, descriptions", "read_classes", "LabelError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "classes.txt").write_bytes(evil)
    read_classes(str(ground.folder / "classes.txt"))


@place("verdict CSV", "apply_verdicts", "LabelError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "v.csv").write_bytes(evil)
    table = LabelTable.open(ground.prepared / "labels" / "test.arrow")
    apply_verdicts(table, [str(ground.folder / "v.csv")], str(ground.folder / "new.arrow"))


@place("table, CSV", "read_table", "LabelError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "own.csv").write_bytes(evil)
    read_table(str(ground.folder / "own.csv"), None, TableSettings())


@place("table, Parquet", "read_table", "LabelError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "own.parquet").write_bytes(evil)
    read_table(str(ground.folder / "own.parquet"), None, TableSettings())


@place("table, Parquet: pickles in its cells, a pickled extension type", "read_table", "LabelError")
def _(ground: Ground, evil: bytes) -> None:
    metadata_of_type = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": evil}
    schema = pa.schema(
        [pa.field("image", pa.binary(), metadata=metadata_of_type), ("class", pa.binary()), ("state", pa.binary())]
    )
    table = pa.table([pa.array([evil])] * 3, schema=schema).replace_schema_metadata({"pandas": evil})
    pq.write_table(table, ground.folder / "own.parquet")
    read_table(str(ground.folder / "own.parquet"), None, TableSettings())


@place("class priors, CSV and Parquet", "read_prior", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "p.csv").write_bytes(evil)
    with pytest.raises(PamlError):
        read_prior(str(ground.folder / "p.csv"), CLASSES)
    (ground.folder / "p.parquet").write_bytes(evil)
    read_prior(str(ground.folder / "p.parquet"), CLASSES)


@place("boxes, CSV", "read_boxes", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "b.csv").write_bytes(evil)
    read_boxes(str(ground.folder / "b.csv"), ["a"], ["b"])


@place("image list of a release (images.csv)", "flickr_parts", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "images.csv").write_bytes(evil)
    flickr_parts(str(ground.folder / "images.csv"))


@place("note of what a release's archive unpacked to", "fetch_release", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "2017_11").mkdir()
    (ground.folder / "2017_11" / ".x.tar.gz.json").write_bytes(evil)
    _is_unpacked(str(ground.folder), Archive("x.tar.gz", 1, "0" * 32, ("a.csv",)))


@place("COCO's annotations, JSON", "read_coco", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "instances_train2014.json").write_bytes(evil)
    read_coco(str(ground.folder), None, CocoSettings())


@place("VOC's annotations, XML", "read_voc", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    for name in ("ImageSets/Main", "Annotations"):
        (ground.folder / name).mkdir(parents=True)
    (ground.folder / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    (ground.folder / "Annotations" / "a.xml").write_bytes(evil)
    read_voc(str(ground.folder), None, VocSettings())


@place("Label Studio export, JSON", "read_label_studio", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "tasks.json").write_bytes(evil)
    read_label_studio(str(ground.folder / "tasks.json"), None, LabelStudioSettings())


@place("FiftyOne data set, samples.json", "read_fiftyone", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    for name in ("metadata.json", "samples.json"):
        (ground.folder / name).write_bytes(evil)
    read_fiftyone(str(ground.folder), None, FiftyOneSettings())


@place("Hugging Face data set, Parquet", "read_hf", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "train.parquet").write_bytes(evil)
    read_hf(str(ground.folder / "train.parquet"), None, HFSettings())


@place("labels in tars: .cls and .json are pickles", "read_webdataset", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    with tarfile.open(ground.folder / "train-0.tar", "w") as tar:
        for suffix in ("jpg", "cls", "json"):
            info = tarfile.TarInfo(f"a.{suffix}")
            info.size = len(evil)
            tar.addfile(info, io.BytesIO(evil))
    read_webdataset(str(ground.folder), None, WebDatasetSettings())


@place("embeddings: vectors.npy, keys.npy, Parquet", "open_embeddings", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    table = LabelTable.open(ground.prepared / "labels" / "test.arrow")
    for name in ("vectors.npy", "keys.npy", "v.parquet"):
        (ground.folder / name).write_bytes(evil)
    settings = DataSettings(root=str(ground.folder), embeddings=str(ground.folder / "vectors.npy"))
    with pytest.raises(PamlError):
        open_embeddings(settings, "test", table)
    np.save(ground.folder / "vectors.npy", np.ones((2, 3), np.float32))
    np.save(ground.folder / "keys.npy", np.array([evil, evil], object), allow_pickle=True)
    with pytest.raises(PamlError):
        open_embeddings(settings, "test", table)
    open_embeddings(dataclasses.replace(settings, embeddings=str(ground.folder / "v.parquet")), "test", table)


@place("images as files", "write_shards", "rejected and counted")
def _(ground: Ground, evil: bytes) -> str:
    (ground.folder / "a.jpg").write_bytes(evil)
    source = [("a", str(ground.folder / "a.jpg")), ("b", jpeg_image("test", 1))]
    report = write_shards(source, ground.folder / "out", ShardSettings(size=16), workers=1)
    return "rejected and counted" if (report.written, report.rejected) == (1, 1) else "taken"


@place("images in tars: the archive, a member", "tar_parts, write_shards", "rejected and counted")
def _(ground: Ground, evil: bytes) -> str:
    (ground.folder / "in").mkdir()
    (ground.folder / "in" / "x.tar").write_bytes(evil)
    with tarfile.open(ground.folder / "in" / "y.tar", "w") as tar:
        for name, data in (("a.jpg", evil), ("b.jpg", jpeg_image("test", 0))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = read_parts(tar_parts(ground.folder / "in"))
    report = write_shards(source, ground.folder / "out", ShardSettings(size=16), workers=1, expected_count=2)
    return "rejected and counted" if (report.written, report.rejected) == (1, 2) else "taken"


@place("the shard writer's plan.json", "write_shards", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    source = [("b", jpeg_image("test", 1))]
    with pytest.raises(RuntimeError, match="stop"):
        write_shards(stopping(source), ground.folder / "out", ShardSettings(size=16), workers=1, expected_count=2)
    (plan,) = (ground.folder / "out").rglob("plan.json")
    plan.write_bytes(evil)
    write_shards(source, ground.folder / "out", ShardSettings(size=16), workers=1, expected_count=2)


def stopping(source: list[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    yield from source
    raise RuntimeError("stop")


@place("the shard writer's spills", "read_spill", "DamagedSpillError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "x.spill").write_bytes(evil)
    read_spill(str(ground.folder / "x.spill"))


@place("features cache: features.json, features.f16", "with_features", "computed anew")
def _(ground: Ground, evil: bytes) -> str:
    changes = {"model": {"train_from": "stage3"}, "data": {"features_dir": str(ground.folder / "features")}}
    settings = tiny_settings(ground.prepared, ground.folder, **changes)
    from paml.training.data import open_data

    data = open_data(settings.data)
    state = state_of(settings, data, World())
    first = cached(state, data)
    assert first.train.features is not None
    before = np.array(first.train.features.plain)
    for name in ("features.json", "features.f16"):
        for path in (ground.folder / "features").rglob(name):
            path.write_bytes(evil)
        lines: list[str] = []
        again = cached(state_of(settings, data, World()), data, lines)
        assert again.train.features is not None
        if not any("computing the features" in line for line in lines):
            return f"{name} used"
        np.testing.assert_array_equal(again.train.features.plain, before)
    return "computed anew"


@place("sweep.json, trials/*.json", "claim_sweep, read_trials", "DataError")
def _(ground: Ground, evil: bytes) -> None:
    sweep: Sweep = plan(tiny_sweep(ground.prepared, ground.folder))
    place = Path(sweep.folder)
    (place / "trials").mkdir(parents=True)
    (place / "sweep.json").write_bytes(evil)
    with pytest.raises(PamlError):
        claim_sweep(sweep)
    (place / "trials" / "0001.json").write_bytes(evil)
    read_trials(sweep)


@place("a recipe that another names (base)", "yaml.safe_load", "SettingsError")
def _(ground: Ground, evil: bytes) -> None:
    (ground.folder / "base.yaml").write_bytes(evil)
    base_settings(TuneSettings(base=str(ground.folder / "base.yaml"), space={"seed": [1, 2]}))


@place(REMOTE[0], "ShardCache, by CRC-32 and SHA-256", "fetched anew")
def _(ground: Ground, evil: bytes) -> str:
    manifest = Manifest.open(remote_shards(ground))
    cache = ground.folder / "cache"
    sound = ShardReader(manifest, str(cache)).read(0)
    for path in (cache / "shards").glob("*.tar"):
        path.write_bytes(evil)
    return "fetched anew" if ShardReader(manifest, str(cache)).read(0) == sound else "used"


@place(REMOTE[1], "storage.local_copy", "fetched anew")
def _(ground: Ground, evil: bytes) -> str:
    url = remote_shards(ground)
    Manifest.open(url)
    planted = list(Path(os.environ["PAML_CACHE"]).glob("*manifest.arrow"))
    assert planted
    for path in planted:
        path.write_bytes(evil)
    return "fetched anew" if len(Manifest.open(url)) else "used"


def remote_shards(ground: Ground) -> str:
    """Shards in the bucket."""
    assert ground.s3 is not None
    url = f"{ground.s3}/shards"
    source = [(key_of("test", n), jpeg_image("test", n)) for n in range(4)]
    write_shards(source, url, ShardSettings(size=16, samples_per_shard=4), workers=1)
    return url


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, with a model folder; tests must not write to it."""
    from paml.inference.predictor import ModelInfo, write_model_folder

    settings = tiny_settings(prepared, tmp_path_factory.mktemp("runs"), epochs=2)
    result = run(settings)
    assert result is not None
    folder = Path(settings.run.storage) / settings.run.name
    (folder / "run.json").write_text(json.dumps({"settings": flatten(settings)}))
    name = list_checkpoints(str(folder))[-1]
    network = load_model(str(folder), settings, name)
    write_model_folder(str(folder / "model"), network, ModelInfo(settings.model, 5.0, CLASSES, CLASSES, 32), None)
    return folder


def payloads(marker: Path) -> dict[str, bytes]:
    """The plain pickle, as written by torch.save, and as a numpy object array."""
    plain = pickle.dumps(Evil(str(marker)))
    zipped, array = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("archive/data.pkl", plain)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    np.save(array, np.array([Evil(str(marker))], object), allow_pickle=True)
    return {"pickle": plain, "torch": zipped.getvalue(), "numpy": array.getvalue()}


def test_the_pickles_work_if_they_are_unpickled(tmp_path: Path) -> None:
    for kind, data in payloads(tmp_path / "marker").items():
        if kind == "pickle":
            pickle.loads(data).close()
        elif kind == "torch":
            torch.load(io.BytesIO(data), weights_only=False).close()
        else:
            np.load(io.BytesIO(data), allow_pickle=True)[0].close()
        assert (tmp_path / "marker").exists(), kind
        (tmp_path / "marker").unlink()


@pytest.mark.parametrize("case", PLACES, ids=lambda case: case.what)
def test_a_planted_pickle_is_never_unpickled(
    case: Place,
    prepared: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    marker = tmp_path / "marker"
    for kind, evil in payloads(marker).items():
        if case.what in REMOTE:
            monkeypatch.setenv("PAML_CACHE", str(tmp_path / f"cache-{kind}"))
        s3 = request.getfixturevalue("s3") if case.what in REMOTE else None
        ground = Ground(tmp_path / kind, prepared, tmp_path / f"{kind}-run", tmp_path / f"{kind}-run" / "model", s3)
        ground.folder.mkdir()
        shutil.copytree(trained, ground.run)
        assert case.plant(ground, evil) == case.ends, kind
        assert not marker.exists(), kind


def as_table() -> str:
    """The cases as Markdown."""
    rows = [f"| {case.what} | {case.reader} | {case.ends} |" for case in PLACES]
    return "\n".join(["| pickle in place of | read by | outcome |", "|---|---|---|", *rows])


def test_the_security_page_lists_these_cases() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    shown = text.partition("<!-- places: begin -->\n")[2].partition("\n<!-- places: end -->")[0]
    assert shown == as_table(), f"put this table into docs/security.md:\n{as_table()}"


DANGEROUS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load",
    "dill.loads", "joblib.load", "marshal.load", "marshal.loads", "shelve.open", "np.load", "numpy.load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "pandas.read_pickle",
    "os.system", "os.popen", "eval", "exec", "pa.deserialize", "torch.jit.load", "torch.hub.load",
    "mlflow.pyfunc.load_model",
}  # fmt: skip


def test_no_code_of_paml_unpickles_or_executes_its_input() -> None:
    found = []
    for path in sorted((ROOT / "paml").rglob("*.py")) + sorted((ROOT / "jobs").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, options = ast.unparse(node.func), {option.arg: ast.unparse(option.value) for option in node.keywords}
            unsafe_torch = name == "torch.load" and options.get("weights_only") != "True"
            if name in DANGEROUS or unsafe_torch or options.get("shell") == "True" or "allow_pickle" in options:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not found
