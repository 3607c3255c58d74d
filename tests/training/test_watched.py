"""The maps kept by epoch are those that the epoch's own weights give, of labels that are truly there."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from paml.data.decode import decode_rgb
from paml.models.cam import build_model
from paml.shards.reader import ShardReader
from paml.training.checkpoint import committed, read_checkpoint
from paml.training.data import open_split
from paml.training.loop import train
from paml.training.settings import TrainSettings
from paml.training.watched import COUNT, kept_maps, watched_labels
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


def test_maps_are_those_of_the_epochs_weights(trained: TrainSettings) -> None:
    folder = f"{trained.run.storage}/{trained.run.name}"
    split = open_split(trained.data, "validation", "labels/validation.arrow", images="observed")
    labels = watched_labels(split, SIZE, trained.seed)
    model = build_model(trained.model, len(CLASSES)).eval()
    for epoch, checkpoint in enumerate(committed(folder)[-2:], 1):
        model.load_state_dict(read_checkpoint(folder, checkpoint, groups=("weights",)).tensors["weights"])
        kept = kept_maps(folder, epoch)
        assert kept is not None
        assert len(kept) == len(labels) == COUNT
        for (scores, logit), label in zip(kept, labels, strict=True):
            mean, std = (torch.tensor(values) for values in (trained.model.pixel_mean, trained.model.pixel_std))
            image = (torch.from_numpy(label.pixels) / 255 - mean) / std
            with torch.inference_mode():
                raw = model.maps(image.permute(2, 0, 1)[None])[0, label.cls].double().numpy()
            boosted = np.where(raw > 0, 3 * raw, raw)
            np.testing.assert_allclose(scores, boosted, rtol=1e-4, atol=1e-5)
            assert logit == pytest.approx(boosted.mean(), rel=1e-4, abs=1e-5)
    assert kept_maps(folder, 3) is None


def test_labels_are_positives_of_distinct_classes_and_images(trained: TrainSettings) -> None:
    split = open_split(trained.data, "validation", "labels/validation.arrow", images="observed")
    labels = watched_labels(split, SIZE, 0)
    assert len({label.cls for label in labels}) == COUNT
    assert len({label.pixels.tobytes() for label in labels}) == COUNT
    reader = ShardReader(split.manifest)
    of_pixels = {decode_rgb(reader.read(int(index))).tobytes(): at for at, index in enumerate(split.samples.index)}
    for label in labels:
        states = split.table.lookup(split.samples.row[[of_pixels[label.pixels.tobytes()]]])
        assert states.state[states.cls == label.cls].tolist() == [1]
    same, other = watched_labels(split, SIZE, 0), watched_labels(split, SIZE, 1)
    assert [label.cls for label in same] == [label.cls for label in labels]
    assert [label.pixels.tobytes() for label in other] != [label.pixels.tobytes() for label in labels]


def test_training_on_features_keeps_no_maps(prepared: Path, tmp_path: Path) -> None:
    settings = tiny_settings(prepared, tmp_path, epochs=1)
    last = list(build_model(settings.model, 1).backbone.named_children())[-1][0]
    settings = dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, train_from=last),
        data=dataclasses.replace(settings.data, features_dir=str(tmp_path / "features")),
    )
    train(settings, World(), quiet())
    assert not (tmp_path / settings.run.name / "maps").exists()
