"""The public functions of `import paml`."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import paml
from paml.errors import DataError, PamlError, SettingsError
from paml.runs.folder import settings_of_run
from paml.settings import flatten
from tests.helpers.prepared import CLASSES, jpeg_image, tiny_settings


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> paml.Run:
    folder = tmp_path_factory.mktemp("api")
    data = shutil.copytree(prepared, folder / "mine")
    settings = flatten(tiny_settings(data, folder / "runs")) | {"run.name": None}
    return paml.train(settings, epochs=2)


def test_public_names_are_listed_and_importable() -> None:
    for name in paml.__all__:
        assert getattr(paml, name) is not None
        assert name in dir(paml)
    with pytest.raises(AttributeError, match="nothing"):
        paml.nothing  # noqa: B018  # pyright: ignore


def test_a_run_has_settings_history_and_scores(run: paml.Run) -> None:
    assert run.settings.epochs == 2
    assert [metrics["epoch"] for metrics in run.history] == [1, 2]
    best = max(run.history, key=lambda metrics: metrics["val/mAP"])
    assert run.best_epoch == best["epoch"]
    scores = run.scores[run.settings.boost.eval]
    assert 0 < scores.map <= 1
    assert f"{100 * scores.map:.2f}" in repr(run)
    assert run.folder in repr(run)


def test_a_run_has_scores_per_class(run: paml.Run) -> None:
    table = run.class_scores().to_pandas()
    assert list(table["mid"]) == list(CLASSES)
    expected = run.scores[run.settings.boost.eval].per_class
    np.testing.assert_array_equal(table["ap"].to_numpy(float), expected)
    with pytest.raises(DataError, match="alpha"):
        run.class_scores(alpha=7)


def test_a_run_opens_again(run: paml.Run, tmp_path: Path) -> None:
    again = paml.Run.open(run.folder)
    assert again.result.best == run.result.best
    assert len(again.history) == len(run.history)
    assert again.settings.loss == run.settings.loss
    assert repr(again) == repr(run)
    with pytest.raises(DataError, match=r"run\.json"):
        paml.Run.open(str(tmp_path))


def test_runs_predict(run: paml.Run) -> None:
    image = jpeg_image("test", 0)
    first, second = run.predictor(), paml.load(f"{run.folder}@best:alpha=5", device="cpu")
    assert first.classes == CLASSES
    assert first.digest() == second.digest()
    assert first.predict(image) == second.predict(image)


def test_runs_are_named_after_the_data(run: paml.Run) -> None:
    assert (run.settings.run.name, run.settings.run.experiment) == ("mine", "mine")
    second = paml.train(run.settings, **{"run.name": None, "epochs": 1})
    assert Path(second.folder).name == "mine-2"
    assert settings_of_run(second.folder).run.name == "mine-2"


def test_a_taken_name_is_refused(run: paml.Run) -> None:
    with pytest.raises(SettingsError, match=r"run\.resume"):
        paml.train(run.settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss.nam": "an"}, r"'loss\.nam'.*loss\.name"),
        ({"loss": {"nam": "an"}}, r"'loss\.nam'.*loss\.name"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": "many"}, "epochs"),
        ({"run.trackers": ["mlfow"]}, "'mlfow'.*mlflow"),
        ([1], "list"),
    ],
)
def test_mistakes_in_settings_are_one_error(prepared: Path, tmp_path: Path, settings: dict, message: str) -> None:
    base = {"data.root": str(prepared), "run.storage": str(tmp_path), "run.name": "x"}
    with pytest.raises(SettingsError, match=message):
        paml.train(base | settings if isinstance(settings, dict) else settings)
    assert not (tmp_path / "x").exists()


def test_missing_data_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(PamlError, match=str(tmp_path)):
        paml.train({"data.root": str(tmp_path), "run.storage": str(tmp_path / "runs")})
    with pytest.raises(SettingsError, match=r"data.root.*`paml prepare`.*`paml demo`"):
        paml.train()
