"""Score a checkpoint of a run on any split, long after training."""

import dataclasses
import json
from collections.abc import Callable

from paml import storage
from paml.data.device import Normaliser
from paml.errors import DataError, SettingsError
from paml.metrics import Scores, score_table, scores, write_per_class
from paml.models.cam import ModelSettings, build_model
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
    """The settings that a run was begun with. Raises DataError where there is no run."""
    try:
        facts = json.loads(storage.read_bytes(storage.join(run_folder, "run.json")))
    except FileNotFoundError as error:
        raise DataError(f"{run_folder} holds no run (run.json is missing): give the folder <storage>/<name>") from error
    return unflatten(TrainSettings, facts["settings"])


def evaluate(settings: EvaluateSettings, say: Callable[[str], None] = print) -> dict[str, Scores]:
    """Score and print the table; returns the scores by row name. Raises PamlError."""
    run = settings_of_run(settings.run)
    data = dataclasses.replace(run.data, root=settings.root or run.data.root)
    split = open_split(data, settings.split, f"labels/{settings.split}.arrow", images="observed")
    train = open_split(data, data.train_split, data.train_labels, images=data.images)
    same_classes(train.table, split.table)

    names = committed(settings.run)
    if not names:
        raise DataError(f"{settings.run} has no whole checkpoint yet")
    newest = read_checkpoint(settings.run, names[-1], groups=())
    name = {"newest": names[-1], "best": _best(newest.facts, run)}.get(settings.checkpoint, settings.checkpoint)
    if name not in names:
        raise SettingsError(f"checkpoint {name!r} is not in {settings.run}; there are {', '.join(names)}")
    if newest.facts["num_classes"] != split.table.num_classes:
        raise SettingsError(
            f"{split.table.path} has {split.table.num_classes} classes, the head of {settings.run} has "
            f"{newest.facts['num_classes']}: score with tables of the classes that the run was trained on"
        )
    group = "averaged" if run.optimiser.average else "weights"
    checkpoint = read_checkpoint(settings.run, name, groups=(group,))

    world: World = current_world()
    untrained: ModelSettings = dataclasses.replace(run.model, weights=None)
    model = build_model(untrained, split.table.num_classes)
    model.load_state_dict(checkpoint.tensors[group])
    model.to(world.device)
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


def _best(facts: dict, run: TrainSettings) -> str:
    best = facts["best"].get(f"{run.boost.eval:g}")
    return best["checkpoint"] if best else "none"
