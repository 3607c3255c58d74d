"""The settings that follow from training on embeddings (data.embeddings)."""

import dataclasses

from paml.errors import DataError, SettingsError
from paml.models import ModelSettings
from paml.training.data import RunData
from paml.training.settings import TrainSettings


def with_embeddings(settings: TrainSettings, data: RunData) -> TrainSettings:
    """The settings with `model` for the embeddings of `data`; unchanged if it has images.

    The same data give the same settings, also when a run is resumed. Raises DataError if the splits differ in shape,
    SettingsError for a boost of vectors, which have one value per class and no map.
    """
    if settings.data.embeddings is None:
        return settings
    shapes = {split.name: split.manifest.settings["shape"] for split in data.splits}
    channels, height, width = shapes[data.train.name]
    for name, shape in shapes.items():
        if shape[0] != channels or (shape[1:] == [1, 1]) != (height * width == 1):
            raise DataError(
                f"the embeddings of {name} have shape {shape}, those of {data.train.name} {shapes[data.train.name]}: "
                "use embeddings of one network for all splits"
            )
    boost = max(settings.boost.train, *settings.boost.scored)
    if height * width == 1 and boost > 1:
        raise SettingsError(
            f"boost is {boost:g}, but the embeddings are vectors of {channels} values, without maps to boost: set "
            "boost.train and boost.eval to 1 and boost.eval_also to [], or start with --config embeddings"
        )
    return dataclasses.replace(settings, model=ModelSettings(backbone=f"embeddings/{channels}", weights=None))
