"""A finished run's model in MLflow's registry, compared with the champion by its test score."""

import dataclasses
import shlex
from collections.abc import Callable

from paml.errors import DataError, SettingsError
from paml.metrics import read_pairs
from paml.secrets import without_keys
from paml.tracking.registry import Registered, TestScore, register_model
from paml.training.loop import Result, pairs_path
from paml.training.score_run import settings_of_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegisterSettings:
    """Which run's model, under which name."""

    run: str = "runs/openimages-v3"
    """Folder of a finished run."""
    name: str = "paml"
    """Name in the registry."""
    tracking_uri: str | None = None
    """MLflow server or store; null takes MLFLOW_TRACKING_URI, else the store that the run was sent to last."""

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("/:'\""):
            raise SettingsError(f"name is {self.name!r}; MLflow wants a name without / and : (and paml without quotes)")

    @property
    def command(self) -> str:
        """What does the same later."""
        return f"python jobs/register.py --run {shlex.quote(self.run)} --name {shlex.quote(self.name)}"


def register_run(settings: RegisterSettings, say: Callable[[str], None] = print) -> Registered:
    """Register the run's final model and say what became of it. Raises DataError, and what `register_model` does."""
    done = register_model(settings.run, settings.name, score_of_run(settings.run), settings.tracking_uri)
    shown = without_keys(done.tracking_uri)
    say(
        f"{settings.run} is version {done.version} of {settings.name} in {shown}: the candidate, "
        f"{'and the champion' if done.champion else 'not the champion'} ({done.why})"
    )
    return done


def score_of_run(run_folder: str) -> TestScore:
    """The score of a finished run on its test, by its own boost. Raises DataError where it was not scored."""
    alpha = f"{settings_of_run(run_folder).boost.eval:g}"
    try:
        result = Result.read(run_folder)
        scores = result.test[alpha]
        _, about = read_pairs(pairs_path(run_folder, alpha))
    except (FileNotFoundError, KeyError) as error:
        raise DataError(
            f"{run_folder} has no test score of alpha {alpha}, so it cannot be compared: let the run end, with a "
            "data.test_split"
        ) from error
    return TestScore(f"{about['split']}-{about['labels']}"[:200], scores.convention, scores.map)
