"""Score a checkpoint of a run on any split, after training."""

import dataclasses
from collections.abc import Callable

from paml.errors import SettingsError
from paml.losses.prior import write_prior
from paml.metrics import Scores, score_table, write_per_class
from paml.runs.spec import open_runs, training_split_of
from paml.training.data import eval_loader, open_split
from paml.training.evaluate import mean_scores, score_pairs, scores_by_alpha
from paml.training.hooks import terminal_progress
from paml.training.state import autocast_dtype
from paml.training.world import current_world


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What to score."""

    run: str
    """Run folder."""
    checkpoint: str = "best"
    """best (by validation mAP at the run's boost.eval), newest, or a name such as step-000001234."""
    split: str = "test"
    """Split of the prepared data."""
    root: str | None = None
    """Prepared data folder; null uses the run's data.root."""
    alphas: tuple[float, ...] = ()
    """Boosts to score with; the default is those that the run scored."""
    per_class: str | None = None
    """Parquet file for the per-class table of the first alpha; null writes none."""
    prior_out: str | None = None
    """File, CSV or .parquet, for the mean score of each class over the training images: the priors that
    loss.p_asl.prior_file of another run can use. null writes none."""

    def __post_init__(self) -> None:
        if any(alpha < 1 for alpha in self.alphas):
            raise SettingsError(f"alphas is {self.alphas}; each must be at least 1 (1: no boost)")


def evaluate(settings: EvaluateSettings, log: Callable[[str], None] = print) -> dict[str, Scores]:
    """Score, log the table and return the scores by row name, such as "alpha 5". Raises PamlError."""
    world = current_world()
    (opened,) = open_runs({settings.run: f"{settings.run}@{settings.checkpoint}"}, world.device)
    run, model, autocast = opened.settings, opened.model, autocast_dtype(opened.settings.precision, world.device)
    data = dataclasses.replace(run.data, root=settings.root or run.data.root)
    split = open_split(data, settings.split, f"labels/{settings.split}.arrow", images="observed")
    train, image_size = training_split_of(opened, split, settings.root)
    progress = terminal_progress(settings.split, len(split.samples))
    pairs = score_pairs(
        model,
        eval_loader(data, split, image_size, world, batch_size=run.eval_batch_size),
        alphas=settings.alphas or run.boost.scored,
        world=world,
        autocast=autocast,
        on_batch=progress.update,
    )
    progress.close()
    if settings.prior_out is not None:
        prior_K = mean_scores(
            model,
            eval_loader(data, train, image_size, world, batch_size=run.eval_batch_size),
            alpha=run.boost.eval,
            world=world,
            autocast=autocast,
        )
        write_prior(settings.prior_out, train.table.classes, prior_K)
        log(f"wrote the priors of {len(prior_K):,} classes to {settings.prior_out}")
    by_alpha = scores_by_alpha(pairs, run.metrics, train.table)
    rows = {f"alpha {alpha:g}": scores for alpha, scores in by_alpha.items()}
    log(f"{settings.run}, {opened.checkpoint}, {settings.split}, in percent\n{score_table(rows)}")
    if settings.per_class is not None:
        write_per_class(settings.per_class, next(iter(rows.values())), split.table.classes, split.table.names)
    return rows
