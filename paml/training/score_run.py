"""Score a checkpoint of a run on any split, long after training."""

import dataclasses
from collections.abc import Callable
from typing import Any

from paml import storage
from paml.data.device import Normaliser
from paml.errors import CheckpointError, DataError, SettingsError
from paml.metrics import Scores, score_table, scores, write_per_class
from paml.models.cam import CamClassifier, build_model
from paml.reading import read_facts, reading
from paml.training.checkpoint import committed, read_checkpoint
from paml.training.data import eval_loader, open_split, same_classes
from paml.training.evaluate import score_pairs
from paml.training.loop import terminal_bar
from paml.training.settings import TrainSettings, unflatten
from paml.training.state import autocast_type
from paml.training.world import World, current_world


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What to score."""

    run: str = "runs/openimages-v3"
    """Folder of the run."""
    checkpoint: str = "best"
    """'best' (by validation, for boost.eval of the run), 'newest', or a folder's name such as step-000001234."""
    split: str = "test"
    """Split of the prepared data."""
    root: str | None = None
    """Prepared data folder; null takes the run's data.root."""
    alphas: tuple[float, ...] = ()
    """Boosts to score with; none takes those that the run scored."""
    per_class: str | None = None
    """Parquet file for the per-class table of the first alpha; null writes none."""

    def __post_init__(self) -> None:
        if any(alpha < 1 for alpha in self.alphas):
            raise SettingsError(f"alphas is {self.alphas}; each must be at least 1 (1 is no boost)")


def settings_of_run(run_folder: str) -> TrainSettings:
    """The settings that a run was begun with. Raises DataError where there is no run, or run.json is damaged."""
    path, mend = storage.join(run_folder, "run.json"), "copy the run again"
    try:
        facts = read_facts(path, mend)
    except FileNotFoundError as error:
        raise DataError(f"{run_folder} holds no run (run.json is missing): give the folder <storage>/<name>") from error
    with reading(path, mend):
        return unflatten(TrainSettings, facts["settings"])


def choose_checkpoint(run_folder: str, run: TrainSettings, which: str, alpha: float) -> tuple[str, dict[str, Any]]:
    """(name of the checkpoint, facts of the run's newest one).

    which: 'best' (by validation when scored with `alpha`, or with boost.eval where the run did not score that one),
    'newest', or a checkpoint's name. Raises DataError where there is none yet, or no best one, SettingsError for an
    unknown name.
    """
    names = committed(run_folder)
    if not names:
        raise DataError(f"{run_folder} has no whole checkpoint yet")
    facts = read_checkpoint(run_folder, names[-1], groups=()).facts
    with reading(f"{run_folder}/checkpoints/{names[-1]}", "copy the run again", CheckpointError):
        best = facts["best"].get(f"{alpha:g}", facts["best"].get(f"{run.boost.eval:g}"))
        best_name = best["checkpoint"] if best else ""
    if which == "best" and best is None:
        raise DataError(
            f"{run_folder} has no best checkpoint yet, for no epoch trained end to end is over: wait, or take newest"
        )
    name = {"newest": names[-1], "best": best_name}.get(which, which)
    if name not in names:
        raise SettingsError(f"checkpoint {name!r} is not in {run_folder}; there are {', '.join(names)}")
    return name, facts


def load_model(run_folder: str, run: TrainSettings, name: str) -> CamClassifier:
    """The network with a checkpoint's scored weights: the averaged ones where the run keeps them.

    Raises CheckpointError, also where the weights are not those of the run's network.
    """
    group = "averaged" if run.optimiser.average else "weights"
    checkpoint = read_checkpoint(run_folder, name, groups=(group,))
    where = f"{run_folder}/checkpoints/{name}"
    with reading(where, "copy the run again", CheckpointError, (RuntimeError,)):
        model = build_model(dataclasses.replace(run.model, weights=None), checkpoint.facts["num_classes"])
        model.load_state_dict(checkpoint.tensors[group])
    return model.eval()


def evaluate(settings: EvaluateSettings, say: Callable[[str], None] = print) -> dict[str, Scores]:
    """Score and print the table; returns the scores by row name. Raises PamlError."""
    run = settings_of_run(settings.run)
    data = dataclasses.replace(run.data, root=settings.root or run.data.root)
    split = open_split(data, settings.split, f"labels/{settings.split}.arrow", images="observed")
    train = open_split(data, data.train_split, data.train_labels, images=data.images)
    same_classes(train.table, split.table)

    name, facts = choose_checkpoint(settings.run, run, settings.checkpoint, run.boost.eval)
    if facts["num_classes"] != split.table.num_classes:
        raise SettingsError(
            f"{split.table.path} has {split.table.num_classes} classes, the head of {settings.run} has "
            f"{facts['num_classes']}: score with tables of the classes that the run was trained on"
        )
    world: World = current_world()
    model = load_model(settings.run, run, name).to(world.device)
    bar = terminal_bar(settings.split, len(split.samples))
    pairs = score_pairs(
        model,
        eval_loader(run, split, run.data.image_size or train.image_size, world),
        alphas=settings.alphas or run.boost.scored,
        world=world,
        normalise=Normaliser(run.model.pixel_mean, run.model.pixel_std, world.device),
        autocast=autocast_type(run, world.device),
        watch=bar.update,
    )
    bar.close()
    positives, negatives = train.table.class_counts()
    rows = {
        f"alpha {alpha:g}": scores(
            *found[:3],
            split.table.num_classes,
            settings=run.metrics,
            train_positives=positives,
            train_negatives=negatives,
        )
        for alpha, found in pairs.items()
    }
    say(f"{settings.run}, {name}, {settings.split}, in percent\n{score_table(rows)}")
    if settings.per_class is not None:
        write_per_class(settings.per_class, next(iter(rows.values())), split.table.classes, split.table.names)
    return rows
