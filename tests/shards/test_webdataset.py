"""Shards through a stock webdataset pipeline, joined to a label table."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.writer import TarWriter

import paml
from paml.errors import DataError
from paml.labels import LabelTable
from paml.shards import Manifest, ShardReader, ShardSettings, open_webdataset, write_shards
from tests.shards.images import decoded, source

COUNT = 40
CLASSES = ("/m/a", "/m/b", "/m/c")


def table_of(keys: list[str]) -> LabelTable:
    """Image i: class i mod 3 is positive, class 2 is negative for every fifth image."""
    images = [key for number, key in enumerate(keys) for _ in range(1 + (number % 5 == 0 and number % 3 != 2))]
    classes, states = [], []
    for number in range(len(keys)):
        classes.append(CLASSES[number % 3])
        states.append(1)
        if number % 5 == 0 and number % 3 != 2:
            classes.append(CLASSES[2])
            states.append(0)
    return LabelTable.from_arrays(images, classes, states, classes=CLASSES)


def expected_states(number: int) -> list[int]:
    states = [-1, -1, -1]
    states[number % 3] = 1
    if number % 5 == 0 and number % 3 != 2:
        states[2] = 0
    return states


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    write_shards(source(COUNT), path, ShardSettings(size=32, samples_per_shard=10))
    return path


@pytest.fixture(scope="module")
def table() -> LabelTable:
    return table_of([key for key, _ in source(COUNT)])


def test_yields_images_and_dense_states(folder: Path, table: LabelTable) -> None:
    reader = ShardReader(Manifest.open(folder))
    samples = list(open_webdataset(folder, table))
    assert len(samples) == COUNT
    for index, sample in enumerate(samples):
        assert set(sample) == {"__key__", "image", "states"}
        assert sample["__key__"] == reader.manifest.key(index)
        np.testing.assert_array_equal(sample["image"], np.asarray(decoded(reader.read(index))))
        assert sample["states"].dtype == np.int8
        assert sample["states"].tolist() == expected_states(int(sample["__key__"], 16))


def test_is_a_public_name_and_passes_options(folder: Path, table: LabelTable) -> None:
    splits: list[int] = []

    def splitter(urls: Iterator[Any]) -> Iterator[Any]:
        splits.append(1)
        yield from list(urls)[:1]

    dataset = paml.open_webdataset(folder, table, decode=None, nodesplitter=splitter, shardshuffle=10)
    pairs = list(dataset.shuffle(5).to_tuple("image", "states"))
    assert splits == [1]
    assert 0 < len(pairs) < COUNT
    assert all(image[:2] == b"\xff\xd8" for image, _ in pairs)


def test_torch_data_loader_with_workers(folder: Path, table: LabelTable) -> None:
    from torch.utils.data import DataLoader

    dataset = open_webdataset(folder, table, decode="torchrgb").to_tuple("__key__", "image", "states")
    seen: dict[str, list[int]] = {}
    for keys, images, states in DataLoader(dataset, batch_size=8, num_workers=2):
        assert images.shape[1:] == (3, 32, 32)
        seen |= dict(zip(keys, states.tolist(), strict=True))
    assert seen == {key: expected_states(int(key, 16)) for key, _ in source(COUNT)}


def test_images_without_labels_are_skipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = [key for key, _ in source(COUNT)]
    with caplog.at_level(logging.WARNING):
        samples = list(open_webdataset(folder, table_of(keys[:30]), decode=None))
    assert {sample["__key__"] for sample in samples} == set(keys[:30])
    assert any("10 of 40" in record.getMessage() for record in caplog.records)


def test_no_matching_key_is_an_error_that_shows_both_sides(folder: Path) -> None:
    other = table_of(["cat.1", "cat.2"])
    key = Manifest.open(folder).key(0)
    with pytest.raises(DataError, match=rf"{key}.*cat\.1"):
        open_webdataset(folder, other)
    dataset = open_webdataset(sorted(folder.glob("*.tar")), other)
    with pytest.raises(DataError, match=rf"{key}.*cat\.1"):
        list(dataset)


def test_escaped_and_foreign_keys(tmp_path: Path) -> None:
    images = [data for _, data in source(3)]
    keys = ["a.b/c d", "50%", "käse"]
    write_shards(list(zip(keys, images, strict=True)), tmp_path / "ours", ShardSettings(size=32))
    table = table_of(keys)
    assert len(list(open_webdataset(tmp_path / "ours", table))) == 3
    assert len(list(open_webdataset(sorted((tmp_path / "ours").glob("*.tar")), table))) == 3
    with TarWriter(str(tmp_path / "others.tar")) as writer:
        for number, data in enumerate(images):
            writer.write({"__key__": f"x/{number}", "JPG": data, "txt": b"text"})
        writer.write({"__key__": "x/3", "txt": b"no image"})
    foreign = open_webdataset(tmp_path / "others.tar", table_of(["x/0", "x/1", "x/2"]))
    assert [sample["states"].tolist() for sample in foreign] == [expected_states(number) for number in range(3)]


def test_shards_in_a_bucket(
    folder: Path, table: LabelTable, s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from paml import storage

    monkeypatch.setenv("PAML_CACHE", str(tmp_path / "cache"))
    for path in folder.iterdir():
        storage.copy(str(path), f"{s3}/shards/{path.name}")
    assert len(list(open_webdataset(f"{s3}/shards", table))) == COUNT


def test_import_of_shards_needs_no_webdataset_and_no_torch() -> None:
    code = "import sys, paml.shards; sys.exit(bool({'torch', 'webdataset'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
