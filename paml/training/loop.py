"""Trains a model from settings to test scores, in this process. Ray starts several of these.

The result depends on the settings and the data only. Metrics go to the journal, state to checkpoints.
"""

import dataclasses
import math
import time

import torch

from paml.data.loader import Loader
from paml.errors import CheckpointError, NonFiniteLossError, SettingsError
from paml.losses import LOSSES
from paml.metrics import Pairs, Scores
from paml.models.cam import build_model, set_training
from paml.parsing import parse_errors_as
from paml.training.allocator import retain_freed_memory
from paml.training.checkpoint import (
    checkpoint_name,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from paml.training.data import RunData, Split, eval_loader, open_data, train_loader
from paml.training.embeddings import with_embeddings
from paml.training.epoch_metrics import epoch_line, epoch_metrics, score_metrics, usage_metrics
from paml.training.evaluate import score_pairs, scores_by_alpha
from paml.training.features import with_features
from paml.training.hooks import RunHooks, RunPreempted
from paml.training.meter import POSITION
from paml.training.reject_rate import rate_warning, with_reject_rate
from paml.training.rejected import save_rejected
from paml.training.result import Result
from paml.training.settings import TrainSettings, check_same_settings
from paml.training.state import (
    TrainState,
    enter_epoch,
    load_state,
    save_state,
    share_corrections,
    share_rejected,
)
from paml.training.step import flush_pending, train_step
from paml.training.watched import save_maps, watched_labels
from paml.training.world import World

MAX_NAMED = 20
"""Unreadable images named in one log line."""


def train(settings: TrainSettings, world: World, hooks: RunHooks, data: RunData | None = None) -> Result:
    """Train, evaluate every epoch, and score the test split with the best one.

    Continues from the latest complete checkpoint in the run folder. The caller decides whether a run may be resumed
    (`paml.runs.folder.claim_run`).

    data: the data of `settings.data` if they are open.
    Raises PamlError for user errors, RunPreempted if `hooks.should_stop` returned true.
    """
    if world.device.type == "cpu":
        retain_freed_memory()
    run_folder = settings.run.folder
    data = data or open_data(settings.data)
    if not world.first:
        hooks = dataclasses.replace(hooks, record_metrics=RunHooks.record_metrics, log=lambda line: None)
    settings = with_reject_rate(with_embeddings(settings, data), data, hooks.log)
    model = build_model(settings.model, len(data.classes), seed=settings.seed)
    state = TrainState(settings, world, model, data)
    POSITION.run, POSITION.rank = settings.run.name or "", world.rank
    _resume(state, run_folder, hooks)
    hooks.on_position("computing features, or waiting for them", state.epoch, state.step, bounded=False)
    data = with_features(settings, data, model, world, hooks)
    hooks.on_position("preparing the first epoch", state.epoch, state.step)
    _log_summary(state, data, hooks)
    shows_maps = world.first and not model.on_features  # there are no images to draw maps on
    watched = watched_labels(data.validation, data.image_size, settings.seed) if shows_maps else []

    while state.epoch <= settings.all_epochs and not _out_of_patience(state):
        started, first_step = time.monotonic(), state.step
        _train_epoch(state, data, run_folder, hooks)
        seconds = time.monotonic() - started
        usage = hooks.meter.end_epoch()
        metrics = epoch_metrics(state, data, seconds, first_step) | usage_metrics(world, usage)
        val_scores, _ = _evaluate(state, data.validation, data, hooks, f"epoch {state.epoch} validation")
        metrics |= score_metrics(val_scores, "val", "groups")
        hooks.on_position("reporting the epoch", state.epoch, state.step)
        if watched:
            save_maps(run_folder, state.epoch, watched, state.eval_model, settings.boost.eval)
        hooks.record_metrics(metrics, state.epoch)
        if world.first:
            hooks.meter.epoch_metrics(metrics | {"epoch": state.epoch})
        hooks.on_position("writing a checkpoint", state.epoch, state.step)
        _end_epoch(state, run_folder, val_scores, metrics, hooks)
        hooks.log(epoch_line(state, metrics))
        hooks.on_position("reporting the epoch", state.epoch - 1, state.steps_per_epoch)
        hooks.on_epoch_end(state.history[-1])
        if hooks.should_stop():
            raise RunPreempted

    if data.test is None or not state.best:
        return Result(state.best, {}, state.history)
    test_scores, test_pairs = _score_test(state, data.test, data, run_folder, hooks)
    digests = {"split": data.test.manifest.digest, "labels": data.test.table.digest}
    return Result(state.best, test_scores, state.history, test_pairs, digests)


def _resume(state: TrainState, run_folder: str, hooks: RunHooks) -> None:
    """Load the latest complete checkpoint, if any. Raises SettingsError for one of other settings or data."""
    checkpoint, problems = newest_checkpoint(run_folder)
    for problem in problems:
        hooks.log(f"skipped a damaged checkpoint: {problem}")
    if checkpoint is None:
        return
    where, hint = f"{run_folder}/checkpoints", "remove the latest checkpoint, or start a run with another run.name"
    with parse_errors_as(where, hint, CheckpointError):
        stored, num_classes = checkpoint.facts["data"], checkpoint.facts["num_classes"]
        check_same_settings(checkpoint.facts["settings"], state.settings)
        changed = [name for name, digest in state.data_digests.items() if stored.get(name) != digest]
    if num_classes != state.num_classes:
        raise SettingsError(
            f"the label table has {state.num_classes} classes, but the checkpoint has {num_classes}: use the label "
            "table that the run was started with"
        )
    if changed:
        raise SettingsError(
            f"the {' and the '.join(changed)} in data.root have changed since the run was started: restore them, or "
            "set another run.name"
        )
    with parse_errors_as(where, hint, CheckpointError, (RuntimeError,)):  # tensors of another model
        load_state(state, checkpoint)
    hooks.log(
        f"resuming at epoch {state.epoch}, step {state.step} of {state.steps_per_epoch} "
        f"({checkpoint_name(state.optimizer_step)})"
    )


def _log_summary(state: TrainState, data: RunData, hooks: RunHooks) -> None:
    settings, samples = state.settings, data.train.samples
    dtype = str(state.autocast or torch.float32).removeprefix("torch.")
    hooks.log(
        f"{len(samples):,} training images ({samples.unlabeled:,} images without labels and {samples.missing:,} "
        f"labeled images that are not in the shards are skipped), {state.num_classes:,} classes, {data.input_text}, "
        f"{state.steps_per_epoch} steps of {settings.batch_size} per epoch, {state.world.size} worker(s) on "
        f"{state.world.device.type} in {dtype}"
    )
    warning = rate_warning(settings, data)
    if warning:
        hooks.log(f"warning: {warning}")


def _train_epoch(state: TrainState, data: RunData, run_folder: str, hooks: RunHooks) -> None:
    """The rest of the current epoch, from `state.step` on."""
    settings, meter, every_steps = state.settings, hooks.meter, state.settings.checkpoint.every_steps
    set_training(state.model, settings.model, head_only=state.phase.head_only)
    state.network.training = True
    needs_probe = LOSSES[settings.loss.name].rejects and data.train.truth is None
    loader = train_loader(
        settings,
        data,
        state.world,
        epoch=state.epoch,
        start=state.step,
        overlay=state.overlay,
        probe_fraction=settings.data.probe_fraction if needs_probe else 0.0,
    )
    progress = hooks.progress(f"epoch {state.epoch}/{settings.all_epochs}", len(loader) * settings.batch_size)
    try:
        hooks.on_position("waiting for a batch", state.epoch, state.step)
        for batch in meter.waiting(loader):
            POSITION.epoch, POSITION.step, updates_before = state.epoch, state.step, state.optimizer_step
            hooks.on_position("computing a step", state.epoch, state.step)
            train_step(state, batch, last=state.step + 1 == state.steps_per_epoch)
            meter.step(len(batch), loader.reader.cache.take_traffic())
            progress.update(settings.batch_size)
            if state.optimizer_step > updates_before and state.step < state.steps_per_epoch:
                stop = hooks.should_stop()
                if stop or (every_steps and state.optimizer_step % every_steps == 0):
                    hooks.on_position("writing a checkpoint", state.epoch, state.step)
                    with meter.checkpoint():
                        _save(state, run_folder)
                if stop:
                    raise RunPreempted
            hooks.on_position("waiting for a batch", state.epoch, state.step)
    finally:
        progress.close()
    meter.step(0, loader.reader.cache.take_traffic())
    flush_pending(state)
    share_corrections(state)
    share_rejected(state)
    if state.world.first:
        save_rejected(run_folder, state.epoch, state.rejected)
    if state.loss_state is not None and not state.phase.head_only:
        state.loss_state.end_epoch(state.loss_epoch)
    _log_bad_images(state, loader, f"epoch {state.epoch}", hooks)


def _log_bad_images(state: TrainState, loader: Loader, title: str, hooks: RunHooks) -> None:
    """Log the unreadable images of all workers."""
    bad = [sample for part in state.world.gather_objects(loader.bad) for sample in part]
    if bad:
        named = "; ".join(f"{sample.key} ({sample.reason})" for sample in bad[:MAX_NAMED])
        more = f"; and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
        hooks.log(f"{title}: skipped {len(bad)} unreadable images: {named}{more}")


def _save(state: TrainState, run_folder: str) -> None:
    """Write a checkpoint; all workers must call it. Raises NonFiniteLossError instead of saving non-finite weights."""
    flush_pending(state)
    if not all(bool(torch.isfinite(weight).all()) for weight in state.model.parameters()):
        raise NonFiniteLossError(
            f"the weights after step {state.step} of epoch {state.epoch} are not finite: lower "
            "optimizer.learning_rate or set optimizer.clip_norm"
        )
    checkpoint = save_state(state)
    if checkpoint is not None:
        name = write_checkpoint(run_folder, state.optimizer_step, checkpoint)
        best = {best["checkpoint"] for best in state.best.values()}
        prune_checkpoints(run_folder, newest=name, keep=state.settings.checkpoint.keep, also_keep=best)
    state.world.barrier()


def _evaluate(
    state: TrainState, split: Split, data: RunData, hooks: RunHooks, title: str
) -> tuple[dict[float, Scores], dict[float, Pairs]]:
    """Scores and scored pairs of a split for each alpha, on every worker."""
    settings = state.settings
    state.world.broadcast_buffers(state.eval_model)
    loader = eval_loader(settings.data, split, data.image_size, state.world, batch_size=settings.eval_batch_size)
    progress = hooks.progress(title, -(-len(split.samples) // state.world.size))

    def on_batch(images: int) -> None:
        progress.update(images)
        hooks.on_position("evaluating", state.epoch, state.step)

    hooks.on_position("evaluating", state.epoch, state.step)
    pairs = score_pairs(
        state.eval_model,
        loader,
        alphas=settings.boost.scored,
        world=state.world,
        autocast=state.autocast,
        on_batch=on_batch,
    )
    progress.close()
    _log_bad_images(state, loader, title, hooks)
    return scores_by_alpha(pairs, settings.metrics, data.train.table), pairs


def _end_epoch(
    state: TrainState, run_folder: str, val_scores: dict[float, Scores], metrics: dict[str, float], hooks: RunHooks
) -> None:
    """Update the best epoch of each alpha, enter the next epoch, and write a checkpoint."""
    for alpha, score in () if state.phase.head_only else val_scores.items():
        best = state.best.get(f"{alpha:g}")
        if best is None or score.map > best["map"] or math.isnan(best["map"]):
            name = checkpoint_name(state.optimizer_step)
            state.best[f"{alpha:g}"] = {"epoch": state.epoch, "map": score.map, "checkpoint": name}
    state.history.append({"epoch": state.epoch, **metrics})
    state.loss_sum.zero_()
    state.counts.zero_()
    enter_epoch(state, state.epoch + 1)
    with hooks.meter.checkpoint():
        _save(state, run_folder)


def _out_of_patience(state: TrainState) -> bool:
    patience, best = state.settings.patience, state.best.get(f"{state.settings.boost.eval:g}")
    return patience is not None and best is not None and state.epoch - 1 - best["epoch"] >= patience


def _score_test(
    state: TrainState, split: Split, data: RunData, run_folder: str, hooks: RunHooks
) -> tuple[dict[str, Scores], dict[str, Pairs]]:
    """Score the test split for each alpha with the weights of its best epoch."""
    test_scores: dict[str, Scores] = {}
    test_pairs: dict[str, Pairs] = {}
    by_checkpoint: dict[str, tuple[dict[float, Scores], dict[float, Pairs]]] = {}
    for alpha in state.settings.boost.scored:
        name = state.best[f"{alpha:g}"]["checkpoint"]
        if name not in by_checkpoint:
            group = "weights" if state.ema_model is None else "ema"
            checkpoint = read_checkpoint(run_folder, name, groups=(group,))
            state.eval_model.load_state_dict(checkpoint.tensors[group])
            by_checkpoint[name] = _evaluate(state, split, data, hooks, "test")
        by_alpha, pairs = by_checkpoint[name]
        test_scores[f"{alpha:g}"], test_pairs[f"{alpha:g}"] = by_alpha[alpha], pairs[alpha]
    metrics = score_metrics({float(alpha): score for alpha, score in test_scores.items()}, "test", "test")
    hooks.record_metrics(metrics, state.best[f"{state.settings.boost.eval:g}"]["epoch"])
    return test_scores, test_pairs
