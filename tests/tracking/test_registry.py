"""Candidate and champion in a real MLflow store."""

import dataclasses
import math
from pathlib import Path

import pytest

from paml.errors import DataError
from paml.runs.journal import Journal
from paml.tracking.registry import TestScore, register_model

SCORE = TestScore("images-labels", "one mean", 0.5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def a_run(folder: Path, content: str = "a") -> str:
    """A run's journal with a model."""
    journal = Journal(str(folder / "run"), "driver")
    journal.run(experiment="registry", name=folder.name)
    journal.status("FINISHED")
    return add_model(folder, content)


def add_model(folder: Path, content: str) -> str:
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "MLmodel").write_text("flavors: {}\n")
    (folder / "model" / "weights").write_text(content)
    Journal(str(folder / "run"), "driver").model(str(folder / "model"))
    return str(folder / "run")


def test_a_better_model_on_the_same_test_split_becomes_champion(tmp_path: Path, store: str) -> None:
    from mlflow import MlflowClient

    first, second, third = (a_run(tmp_path / name) for name in ("first", "second", "third"))

    def aliases() -> dict[str, str]:
        return {name: str(v) for name, v in MlflowClient(store).get_registered_model("birds").aliases.items()}

    registered = register_model(first, "birds", SCORE, store)
    assert (registered.version, registered.champion) == ("1", True)
    assert aliases() == {"candidate": "1", "champion": "1"}
    registered = register_model(second, "birds", dataclasses.replace(SCORE, map=0.5), store)
    assert (registered.version, registered.champion) == ("2", False)
    assert "50.00 % against 50.00 %" in registered.reason
    assert aliases() == {"candidate": "2", "champion": "1"}
    registered = register_model(third, "birds", dataclasses.replace(SCORE, map=0.51), store)
    assert (registered.version, registered.champion) == ("3", True)
    assert aliases() == {"candidate": "3", "champion": "3"}
    assert register_model(third, "birds", dataclasses.replace(SCORE, map=0.51), store).version == "3"
    assert len(MlflowClient(store).search_model_versions("name = 'birds'")) == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"test": "other"}, "another test split"),
        ({"convention": "another mean"}, "another convention: one mean"),
        ({"map": math.nan}, "nan % against 50.00 %"),
    ],
)
def test_a_model_that_cannot_be_compared_stays_candidate(
    tmp_path: Path, store: str, changes: dict, reason: str
) -> None:
    name = f"cats-{next(iter(changes))}"
    assert register_model(a_run(tmp_path / "first"), name, SCORE, store).champion
    score = dataclasses.replace(SCORE, **({"map": 0.9} | changes))
    registered = register_model(a_run(tmp_path / "second"), name, score, store)
    assert (registered.version, registered.champion) == ("2", False)
    assert reason in registered.reason


def test_a_recalibrated_model_is_a_new_version(tmp_path: Path, store: str) -> None:
    run = a_run(tmp_path / "first")
    assert register_model(run, "dogs", SCORE, store).version == "1"
    add_model(tmp_path / "first", "calibrated")
    assert register_model(run, "dogs", SCORE, store).version == "2"


def test_a_run_without_a_model_is_refused(tmp_path: Path, store: str) -> None:
    Journal(str(tmp_path / "run"), "driver").run(experiment="registry", name="none")
    with pytest.raises(DataError, match="no final model"):
        register_model(str(tmp_path / "run"), "none", SCORE, store)
