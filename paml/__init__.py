"""Multi-label image classifiers from partial labels: class activation maps, BoostLU and large-loss rejection.

    import paml

    paml.prepare({...})                                      # images and labels -> shards and label tables
    run = paml.train({"data.root": "data/mine", "epochs": 5})
    predictor = run.predictor()                              # or paml.load("runs/mine")

Names are imported on first use, so `import paml` alone is fast and does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_MODULES = {
    "CamClassifier": "paml.models.cam",
    "LabelTable": "paml.labels.table",
    "LargeLoss": "paml.losses",
    "PartialAveragePrecision": "paml.metrics",
    "Run": "paml.api",
    "average_precision": "paml.metrics",
    "boost_lu": "paml.models.boost",
    "build_model": "paml.models.cam",
    "load": "paml.api",
    "make_loss": "paml.losses",
    "open_webdataset": "paml.shards",
    "prepare": "paml.api",
    "train": "paml.api",
}

__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from paml.api import Run as Run
    from paml.api import load as load
    from paml.api import prepare as prepare
    from paml.api import train as train
    from paml.labels.table import LabelTable as LabelTable
    from paml.losses import LargeLoss as LargeLoss
    from paml.losses import make_loss as make_loss
    from paml.metrics import PartialAveragePrecision as PartialAveragePrecision
    from paml.metrics import average_precision as average_precision
    from paml.models.boost import boost_lu as boost_lu
    from paml.models.cam import CamClassifier as CamClassifier
    from paml.models.cam import build_model as build_model
    from paml.shards import open_webdataset as open_webdataset


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
