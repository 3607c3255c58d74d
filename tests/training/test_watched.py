"""Maps of positive labels are saved after each epoch, computed with its weights."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from paml.data.decode import decode_rgb
from paml.models.cam import build_model
from paml.shards.reader import ShardReader
from paml.training.checkpoint import list_checkpoints, read_checkpoint
from paml.training.data import open_split
from paml.training.loop import train
from paml.training.settings import TrainSettings
from paml.training.watched import COUNT, load_maps, watched_labels
from paml.training.world import World
from tests.helpers.prepared import CLASSES, SIZE, tiny_settings
from tests.helpers.runs import quiet


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    settings = tiny_settings(
        prepared, tmp_path_factory.mktemp("watched"), boost={"eval": 3.0}, epochs=2, checkpoint={"keep": 10}
    )
    train(settings, World(), quiet())
    return settings


def test_maps_are_computed_with_the_weights_of_the_epoch(trained: TrainSettings) -> None:
    folder = trained.run.folder
    split = open_split(trained.data, "validation", "labels/validation.arrow", images="observed")
    labels = watched_labels(split, SIZE, trained.seed)
    model = build_model(trained.model, len(CLASSES)).eval()
    for epoch, checkpoint in enumerate(list_checkpoints(folder)[-2:], 1):
        model.load_state_dict(read_checkpoint(folder, checkpoint, groups=("weights",)).tensors["weights"])
        maps = load_maps(folder, epoch)
        assert maps is not None
        assert len(maps) == len(labels) == COUNT
        for (scores, logit), label in zip(maps, labels, strict=True):
            mean, std = (torch.tensor(values) for values in (model.info.mean, model.info.std))
            image = (torch.from_numpy(label.pixels) / 255 - mean) / std
            with torch.inference_mode():
                raw = model.maps(image.permute(2, 0, 1)[None])[0, label.cls].double().numpy()
            boosted = np.where(raw > 0, 3 * raw, raw)
            np.testing.assert_allclose(scores, boosted, rtol=1e-4, atol=1e-5)
            assert logit == pytest.approx(boosted.mean(), rel=1e-4, abs=1e-5)
    assert load_maps(folder, 3) is None


def test_labels_are_positives_of_distinct_classes_and_images(trained: TrainSettings) -> None:
    split = open_split(trained.data, "validation", "labels/validation.arrow", images="observed")
    labels = watched_labels(split, SIZE, 0)
    assert len({label.cls for label in labels}) == COUNT
    assert len({label.pixels.tobytes() for label in labels}) == COUNT
    reader = ShardReader(split.manifest)
    position_of = {
        decode_rgb(reader.read(int(index))).tobytes(): position for position, index in enumerate(split.samples.index)
    }
    for label in labels:
        states = split.table.lookup(split.samples.row[[position_of[label.pixels.tobytes()]]])
        assert states.state[states.cls == label.cls].tolist() == [1]
    same, other = watched_labels(split, SIZE, 0), watched_labels(split, SIZE, 1)
    assert [label.cls for label in same] == [label.cls for label in labels]
    assert [label.pixels.tobytes() for label in other] != [label.pixels.tobytes() for label in labels]


def test_training_on_features_saves_no_maps(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(prepared, tmp_path, epochs=1)
    last = list(build_model(settings.model, 1).backbone.named_children())[-1][0]
    settings = dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, train_from=last),
        data=dataclasses.replace(settings.data, features_dir=str(tmp_path / "features")),
    )
    train(settings, World(), quiet())
    assert not (tmp_path / "tiny" / "maps").exists()
