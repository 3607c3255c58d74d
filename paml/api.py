"""The functions behind `import paml`: prepare data, train, and load a trained model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from paml.distributed import cluster
from paml.errors import SettingsError
from paml.inference.predictor import Predictor, open_predictor
from paml.pipeline import train_and_report
from paml.runs import folder
from paml.settings import flatten, settings_from_values
from paml.training.settings import TrainSettings, with_absolute_paths

if TYPE_CHECKING:
    import torch

    from paml.preparation.settings import PrepareSettings

T = TypeVar("T")


class Run(folder.Run):
    """A finished run. `Run.open(folder)` opens one."""

    def predictor(self, *, device: "torch.device | str | None" = None) -> Predictor:
        """The predictor of the best epoch; see `load`."""
        return load(self.folder, device=device)


def train(settings: TrainSettings | Mapping[str, Any] | None = None, **overrides: Any) -> Run:
    """Train, score the test split with the best epoch, and return the run.

    Settings are given as a `TrainSettings`, or by their dotted names as in recipes:

        paml.train({"data.root": "data/mine", "loss.name": "ll-r"}, epochs=5)

    `overrides` win over `settings`. `workers.num_workers` 0 (default) trains in this process, a larger number trains
    with Ray. Without `run.name` the run is named after the data folder. Raises PamlError for mistakes in settings or
    data.
    """
    settings = with_absolute_paths(_settings(TrainSettings, settings, overrides, "paml.train"), cluster.base_folder())
    if settings.workers.num_workers == 0:
        done = train_and_report(settings)
    else:
        from paml.distributed.ray_train import connect, train_on_ray

        done = train_and_report(settings, launch=train_on_ray, connect=lambda: connect(settings.workers))
    return Run(done.folder, done.settings, done.result)


def prepare(settings: "PrepareSettings | Mapping[str, Any] | None" = None, **overrides: Any) -> None:
    """Write the shards and label tables of a data set, as `paml prepare` does.

    Settings are a `PrepareSettings` or dotted names, as in `train`. Raises PamlError for mistakes in settings or data.
    """
    from paml.distributed.prepare import run_prepare
    from paml.preparation.settings import PrepareSettings

    run_prepare(_settings(PrepareSettings, settings, overrides, "paml.prepare"))


def load(path: str, *, device: "torch.device | str | None" = None) -> Predictor:
    """Load a trained model from a run folder, a model folder or a spec such as `runs/mine@best:alpha=5`.

    `device` defaults to the GPU if there is one. Raises PamlError if there is no model.
    """
    import torch

    return open_predictor(path, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _settings(kind: type[T], settings: T | Mapping[str, Any] | None, overrides: Mapping[str, Any], where: str) -> T:
    if not isinstance(settings, kind | Mapping | None):
        raise SettingsError(f"{where}: settings is a {type(settings).__name__}; pass a {kind.__name__} or a mapping")
    if isinstance(settings, kind) and not overrides:
        return settings
    values = flatten(settings or {}) | flatten(overrides)
    return settings_from_values(kind, values, where)
