"""A training run from its settings to its scores, in this process: Ray only starts several of them.

What is computed depends on the settings and the data alone. Figures go to the journal, state to checkpoints.
"""

import dataclasses
import math
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from paml import storage
from paml.data.loader import Loader
from paml.data.plan import EpochPlan
from paml.errors import CheckpointError, NonFiniteLossError, SettingsError
from paml.losses import LOSSES
from paml.metrics import Pairs, Scores, scores, write_pairs
from paml.models.cam import CamClassifier, build_model, set_training
from paml.reading import read_facts, reading
from paml.training.allocator import keep_memory
from paml.training.checkpoint import (
    Checkpoint,
    checkpoint_name,
    newest_checkpoint,
    read_checkpoint,
    tidy,
    write_checkpoint,
)
from paml.training.data import RunData, Split, eval_loader, loss_memory, open_data, train_loader
from paml.training.evaluate import score_pairs
from paml.training.features import with_features
from paml.training.meter import PLACE, Meter, Usage
from paml.training.reject_rate import rate_warning, with_reject_rate
from paml.training.rejected import keep_rejected
from paml.training.settings import TrainSettings, refuse_other_settings
from paml.training.state import (
    COUNTS,
    TrainState,
    enter_epoch,
    load_state,
    new_state,
    save_state,
    share_corrections,
    share_rejected,
)
from paml.training.step import settle_waiting, train_step
from paml.training.watched import keep_maps, watched_labels
from paml.training.world import World

NAMED = 20
"""Bad images named in one line of the output."""


class Figures(Protocol):
    """What the loop needs of a journal."""

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Figures of one epoch."""
        ...


class Progress(Protocol):
    """A bar over the batches of one pass."""

    def update(self, n: int) -> Any:
        """`n` more images are done."""
        ...

    def close(self) -> Any:
        """The pass is over."""
        ...


class _NoProgress:
    def update(self, n: int) -> None: ...

    def close(self) -> None: ...


def _unheard(line: str) -> None: ...


def _no_bar(title: str, images: int) -> Progress:
    return _NoProgress()


def terminal_bar(title: str, images: int) -> Progress:
    """A tqdm bar where somebody watches, else nothing."""
    if not sys.stderr.isatty():
        return _NoProgress()
    from tqdm import tqdm

    return tqdm(total=images, desc=title, unit="img", leave=False, dynamic_ncols=True)


@dataclasses.dataclass(frozen=True)
class Watcher:
    """Where a run reports; but for the last three only the first worker's is called."""

    journal: Figures | None = None
    say: Callable[[str], None] = print
    bar: Callable[[str, int], Progress] = _no_bar
    epoch_done: Callable[[dict[str, float]], None] = lambda figures: None
    """Called on every worker once an epoch's checkpoint stands."""
    meter: Meter = dataclasses.field(default_factory=Meter)
    """Every worker's own."""
    at: Callable[..., None] = lambda doing, epoch, step, bounded=True: None
    """Called on every worker as it begins something: what, in which epoch (from 1), after how many steps of it, and
    whether taking too long over it means that the worker is stuck."""
    leaving: Callable[[], bool] = lambda: False
    """Called on every worker after each step of the optimiser and each epoch, with the same answer on all: whether to
    leave a checkpoint and the run."""


class Left(Exception):
    """The run was left because `Watcher.leaving` said so; its newest checkpoint is of that moment."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run ends with, for each alpha scored."""

    best: dict[str, dict[str, Any]]
    test: dict[str, Scores]
    history: list[dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """All of it in what JSON can hold."""
        test = {
            alpha: {name: _plain(value) for name, value in vars(scored).items()} for alpha, scored in self.test.items()
        }
        return {"best": self.best, "test": test, "history": self.history}

    @classmethod
    def read(cls, run_folder: str) -> "Result":
        """What a finished run left in result.json. Raises FileNotFoundError, and DataError where it is damaged."""
        path, mend = storage.join(run_folder, "result.json"), "remove it, and resume the run to its end"
        facts = read_facts(path, mend)
        with reading(path, mend):
            return cls.from_json(facts)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "Result":
        """What `to_json` made."""
        test = {}
        for alpha, values in facts["test"].items():
            arrays = {name: np.array(value) for name, value in values.items() if isinstance(value, list)}
            test[alpha] = Scores(**(values | arrays))
        return cls(facts["best"], test, facts["history"])


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def run_folder_of(settings: TrainSettings) -> str:
    """Where all of the run lies."""
    return storage.join(settings.run.storage, settings.run.name)


def pairs_path(run_folder: str, alpha: str) -> str:
    """Where a run leaves the scored pairs of its test split, for one alpha."""
    return storage.join(run_folder, "artifacts", f"test_pairs_alpha_{alpha}.parquet")


def train(settings: TrainSettings, world: World, watcher: Watcher, last_epoch: int | None = None) -> Result:
    """Train, score every epoch, and score the test split by the best one.

    Goes on from the newest whole checkpoint of the run's folder: whether a run of this name may be taken up is
    the launcher's to decide. `last_epoch` breaks the run off after that epoch, the test split not scored; no setting,
    so that schedules keep their length and a later call goes on as the unbroken run. Raises PamlError for anything
    that the user has to mend, Left where the watcher said so.
    """
    if world.device.type == "cpu":
        keep_memory()
    run_folder = run_folder_of(settings)
    data = open_data(settings.data)
    settings = with_reject_rate(settings, data, watcher.say if world.first else _unheard)
    plan_steps = EpochPlan(data.train.samples.index, settings.batch_size).steps
    model = build_model(settings.model, len(data.classes), seed=settings.seed)
    state = new_state(settings, world, model, len(data.classes), plan_steps)
    state.data_digests = _digests(data)
    state.memory = loss_memory(settings, data, world)
    PLACE.run, PLACE.rank = settings.run.name, world.rank
    _resume(state, run_folder, watcher)
    watcher.at("computing features, or waiting for them", state.epoch, state.step, bounded=False)
    data = with_features(settings, data, model, world, say=watcher.say, bar=watcher.bar if world.first else _no_bar)
    watcher.at("looking at the labels", state.epoch, state.step)
    if world.first:
        _describe(state, data, watcher)
    share = _probe_share(settings, data)
    looking = world.first and not model.on_features  # features are no pictures
    watched = watched_labels(data.validation, data.image_size, settings.seed) if looking else []

    while state.epoch <= settings.all_epochs and not _patience_over(state):
        if last_epoch is not None and state.epoch > last_epoch:
            return Result(state.best, {}, state.history)
        started, begun_at = time.monotonic(), state.step
        _train_epoch(state, data, run_folder, share, watcher)
        seconds = time.monotonic() - started
        used = watcher.meter.end_epoch()
        figures = _epoch_figures(state, data, seconds, begun_at) | _usage_figures(state.world, used)
        scored, _ = _score(state, data.validation, data, watcher, f"epoch {state.epoch} validation")
        figures |= _score_figures(scored, "val", "groups")
        watcher.at("reporting the epoch", state.epoch, state.step)
        if watched:
            scorer = scored_model(state)
            keep_maps(run_folder, state.epoch, watched, scorer, state.normalise, settings.boost.eval)
        if world.first and watcher.journal is not None:
            watcher.journal.metrics(figures, state.epoch)
        if world.first:
            watcher.meter.figures(figures | {"epoch": state.epoch})
        watcher.at("writing a checkpoint", state.epoch, state.step)
        _end_epoch(state, run_folder, scored, figures, watcher.meter)
        if world.first:
            watcher.say(_epoch_line(state, figures))
        watcher.at("reporting the epoch", state.epoch - 1, state.steps_per_epoch)
        watcher.epoch_done(state.history[-1])
        if watcher.leaving():
            raise Left

    test = _score_best(state, data, run_folder, watcher)
    return Result(state.best, test, state.history)


def _resume(state: TrainState, run_folder: str, watcher: Watcher) -> None:
    checkpoint, faults = newest_checkpoint(run_folder)
    for fault in faults if state.world.first else ():
        watcher.say(f"passed over a checkpoint: {fault}")
    if checkpoint is None:
        return
    where, mend = f"{run_folder}/checkpoints", "remove the newest one, or begin a run of another run.name"
    with reading(where, mend, CheckpointError):
        stored, num_classes = checkpoint.facts.get("data", {}), checkpoint.facts["num_classes"]
        refuse_other_settings(checkpoint.facts["settings"], state.settings)
        other = [name for name, digest in state.data_digests.items() if stored.get(name, digest) != digest]
    if num_classes != state.num_classes:
        raise SettingsError(
            f"the label table has {state.num_classes} classes, the checkpoint's head has "
            f"{num_classes}: train on the table that the run was begun with"
        )
    if other:
        raise SettingsError(
            f"the {', '.join(other)} below data.root differ from those that the run was begun with: put the same "
            "ones back, or give the new run another run.name"
        )
    with reading(where, mend, CheckpointError, (RuntimeError,)):  # tensors of another network, or other figures
        load_state(state, checkpoint)
    if state.world.first:
        watcher.say(
            f"going on at epoch {state.epoch}, step {state.step} of {state.steps_per_epoch} "
            f"({checkpoint_name(state.optimiser_step)})"
        )


def _digests(data: RunData) -> dict[str, str]:
    """Of all that decides which image with which labels comes when."""
    return {"training images": data.train.manifest.digest, "training labels": data.train.table.digest}


def _probe_share(settings: TrainSettings, data: RunData) -> float:
    """The probe estimates what full labels would tell, so it hides nothing where there are some."""
    if data.train.truth is not None or not LOSSES[settings.loss.name].rejects:
        return 0.0
    return settings.data.probe


def _describe(state: TrainState, data: RunData, watcher: Watcher) -> None:
    settings, split = state.settings, data.train
    computed = str(state.autocast or torch.float32).removeprefix("torch.")
    watcher.say(
        f"{len(split.samples):,} training images ({split.samples.unlabelled:,} without labels left out, "
        f"{split.samples.missing:,} labelled ones have no image), {state.num_classes:,} classes, "
        f"{data.image_size} px, {state.steps_per_epoch} steps of {settings.batch_size} an epoch, "
        f"{state.world.size} worker(s) on {state.world.device.type} in {computed}"
    )
    warning = rate_warning(settings, data)
    if warning:
        watcher.say(f"warning: {warning}")


def _train_epoch(state: TrainState, data: RunData, run_folder: str, probe: float, watcher: Watcher) -> None:
    settings = state.settings
    set_training(state.model, settings.model, head_only=state.phase.head_only)
    state.network.training = True
    loader = train_loader(
        settings, data, state.world, epoch=state.epoch, start=state.step, overlay=state.overlay, probe=probe
    )
    bar = watcher.bar(f"epoch {state.epoch}/{settings.all_epochs}", len(loader) * settings.batch_size)
    every, meter = settings.checkpoint.every_steps, watcher.meter
    try:
        watcher.at("waiting for a batch", state.epoch, state.step)
        for batch in meter.waiting(loader):
            PLACE.epoch, PLACE.step, before = state.epoch, state.step, state.optimiser_step
            watcher.at("computing a step", state.epoch, state.step)
            train_step(state, batch, last=state.step + 1 == state.steps_per_epoch)
            meter.step(len(batch), loader.take_traffic())
            bar.update(settings.batch_size)
            if state.optimiser_step > before and state.step < state.steps_per_epoch:
                leaving = watcher.leaving()
                if leaving or (every and state.optimiser_step % every == 0):
                    watcher.at("writing a checkpoint", state.epoch, state.step)
                    with meter.checkpoint():
                        _save(state, run_folder)
                if leaving:
                    raise Left
            watcher.at("waiting for a batch", state.epoch, state.step)
    finally:
        bar.close()
    meter.step(0, loader.take_traffic())
    settle_waiting(state)
    share_corrections(state)
    share_rejected(state)
    if state.world.first:
        keep_rejected(run_folder, state.epoch, state.rejected)
    if state.memory is not None and not state.phase.head_only:
        state.memory.end_epoch(state.loss_epoch)
    _name_bad(state, loader, f"epoch {state.epoch}", watcher)


def _usage_figures(world: World, used: Usage) -> dict[str, float]:
    """Time that all workers lost, since the last epoch's figures, and what they read from a bucket, over all of them
    and by the node that read most; of local shards nothing."""
    found = world.gather_objects((platform.node(), used))
    seconds = max(sum(own.seconds for _, own in found), 1e-9)
    figures = {
        "train/data_wait_share": sum(own.waited_seconds for _, own in found) / seconds,
        "train/checkpoint_share": sum(own.checkpoint_seconds for _, own in found) / seconds,
    }
    total, by_node = np.zeros(4), dict[str, float]()
    for node, own in found:
        traffic = dataclasses.astuple(own.traffic)
        total += traffic
        by_node[node] = by_node.get(node, 0.0) + traffic[0]
    if not total.any():
        return figures
    return figures | {
        "data/gb_from_bucket": total[0] / 1e9,
        "data/gb_from_bucket_largest_node": max(by_node.values()) / 1e9,
        "data/cache_hits": total[1],
        "data/cache_misses": total[2],
        "data/images_past_cache": total[3],
    }


def _name_bad(state: TrainState, loader: Loader, title: str, watcher: Watcher) -> None:
    """Say which images could not be used and were left out, on whichever worker."""
    bad = [sample for own in state.world.gather_objects(loader.bad) for sample in own]
    if bad and state.world.first:
        named = "; ".join(f"{sample.key} ({sample.reason})" for sample in bad[:NAMED])
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        watcher.say(f"{title}: {len(bad)} images could not be used and were left out: {named}{more}")


def _save(state: TrainState, run_folder: str) -> str:
    """All workers must call it. Raises NonFiniteLossError rather than keep weights that are lost."""
    settle_waiting(state)
    if not all(bool(torch.isfinite(weight).all()) for weight in state.model.parameters()):
        raise NonFiniteLossError(
            f"the weights after step {state.step} of epoch {state.epoch} are not finite. Lower "
            "optimiser.learning_rate, or set optimiser.clip_norm"
        )
    checkpoint = save_state(state)
    if checkpoint is not None:
        name = write_checkpoint(run_folder, state.optimiser_step, checkpoint)
        kept = {best["checkpoint"] for best in state.best.values()}
        tidy(run_folder, newest=name, keep=state.settings.checkpoint.keep, also=kept)
    state.world.barrier()
    return checkpoint_name(state.optimiser_step)


def _epoch_figures(state: TrainState, data: RunData, seconds: float, begun_at: int) -> dict[str, float]:
    """The epoch's figures over all workers, in MLflow's names."""
    counts = dict(zip(COUNTS, state.world.sum(state.counts.clone()).tolist(), strict=True))
    loss = float(state.world.sum(state.loss_sum.clone()))
    images = max(1, counts["images"])
    share_done = (state.step - begun_at) / max(1, state.steps_per_epoch)
    figures = {
        "train/loss": loss / (images * state.num_classes),
        "train/learning_rate": state.optimiser.param_groups[0]["lr"],
        "train/images_per_second": images * share_done / max(seconds, 1e-9),
        "train/bad_images": counts["bad_images"],
        "train/workers": state.world.size,
    }
    if state.settings.linear_init.epochs:
        figures["train/head_only"] = state.phase.head_only
    if not LOSSES[state.settings.loss.name].rejects:
        return {name: float(value) for name, value in figures.items()}
    rejected = counts["rejected"]
    figures |= {
        "rejection/rejected": rejected,
        "rejection/rejected_share": rejected / max(1, counts["unobserved"]),
    }
    if LOSSES[state.settings.loss.name].corrects:
        figures["rejection/corrected_in_all"] = len(state.overlay)
    if data.train.truth is not None:
        hits = counts["rejected_false_negatives"]
        figures |= {
            "rejection/rejected_false_negatives": hits,
            "rejection/precision": hits / rejected if rejected else math.nan,
            "rejection/recall": hits / max(1, counts["false_negatives"]),
        }
    for name, hidden, hits in (
        ("probe_recall", counts["probe_positives"], counts["rejected_probe_positives"]),
        ("probe_false_rejection", counts["probe_negatives"], counts["rejected_probe_negatives"]),
    ):
        if hidden:
            figures[f"rejection/{name}"] = hits / hidden
    return {name: float(value) for name, value in figures.items()}


def scored_model(state: TrainState) -> CamClassifier:
    """The averaged weights where they are kept, else the weights."""
    return state.averaged if state.averaged is not None else state.model


def _score(
    state: TrainState, split: Split, data: RunData, watcher: Watcher, title: str
) -> tuple[dict[float, Scores], dict[float, Pairs]]:
    settings = state.settings
    model = scored_model(state)
    state.world.broadcast_buffers(model)
    loader = eval_loader(settings, split, data.image_size, state.world)
    bar = watcher.bar(title, -(-len(split.samples) // state.world.size))

    def scored_some(images: int) -> None:
        bar.update(images)
        watcher.at("scoring images", state.epoch, state.step)

    watcher.at("scoring images", state.epoch, state.step)
    pairs = score_pairs(
        model,
        loader,
        alphas=settings.boost.scored,
        world=state.world,
        normalise=state.normalise,
        autocast=state.autocast,
        watch=scored_some,
    )
    bar.close()
    _name_bad(state, loader, title, watcher)
    positives, negatives = data.train.table.class_counts()
    scored = {
        alpha: scores(
            *found[:3],
            state.num_classes,
            settings=settings.metrics,
            train_positives=positives,
            train_negatives=negatives,
        )
        for alpha, found in pairs.items()
    }
    return scored, pairs


def _score_figures(scored: dict[float, Scores], prefix: str, groups: str) -> dict[str, float]:
    figures: dict[str, float] = {}
    for place, (alpha, score) in enumerate(scored.items()):
        end = "" if place == 0 else f"_alpha_{alpha:g}"
        figures[f"{prefix}/map{end}"] = score.map
        figures[f"{prefix}/micro_ap{end}"] = score.micro_ap
        figures |= {f"{groups}/{name}{end}": value for name, value in score.groups.items()}
    return figures


def _end_epoch(
    state: TrainState, run_folder: str, scored: dict[float, Scores], figures: dict[str, float], meter: Meter
) -> None:
    """Note the best, move to the next epoch, and leave a checkpoint of both. The best is one trained end to end."""
    for alpha, score in () if state.phase.head_only else scored.items():
        best = state.best.get(f"{alpha:g}")
        if best is None or score.map > best["map"] or math.isnan(best["map"]):
            name = checkpoint_name(state.optimiser_step)
            state.best[f"{alpha:g}"] = {"epoch": state.epoch, "map": score.map, "checkpoint": name}
    state.history.append({"epoch": state.epoch, **figures})
    state.loss_sum.zero_()
    state.counts.zero_()
    enter_epoch(state, state.epoch + 1)
    with meter.checkpoint():
        _save(state, run_folder)


def _patience_over(state: TrainState) -> bool:
    patience, best = state.settings.patience, state.best.get(f"{state.settings.boost.eval:g}")
    return patience is not None and best is not None and state.epoch - 1 - best["epoch"] >= patience


def _epoch_line(state: TrainState, figures: dict[str, float]) -> str:
    head_only = figures.get("train/head_only", 0.0) > 0
    parts = [
        f"epoch {state.epoch - 1}/{state.settings.all_epochs}" + (" (head alone)" if head_only else ""),
        f"loss {figures['train/loss']:.5f}",
        f"val mAP {100 * figures['val/map']:.2f}",
    ]
    if "rejection/rejected" in figures:
        parts.append(f"rejected {figures['rejection/rejected']:,.0f}")
    if not math.isnan(figures.get("rejection/precision", math.nan)):
        parts.append(f"precision {figures['rejection/precision']:.3f}")
    if "rejection/probe_recall" in figures:
        parts.append(f"probe recall {figures['rejection/probe_recall']:.3f}")
    if figures["train/bad_images"]:
        parts.append(f"bad images {figures['train/bad_images']:.0f}")
    parts.append(f"{figures['train/images_per_second']:.1f} images/s")
    return " · ".join(parts)


def load_scored(state: TrainState, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's scored weights into the model that is scored."""
    group = "averaged" if state.averaged is not None else "weights"
    scored_model(state).load_state_dict(checkpoint.tensors[group])


def _score_best(state: TrainState, data: RunData, run_folder: str, watcher: Watcher) -> dict[str, Scores]:
    """The test split, scored once by each alpha's best epoch."""
    if data.test is None or not state.best:
        return {}
    group = "averaged" if state.averaged is not None else "weights"
    found: dict[str, Scores] = {}
    by_epoch: dict[str, tuple[dict[float, Scores], dict[float, Pairs]]] = {}
    for alpha in state.settings.boost.scored:
        best = state.best[f"{alpha:g}"]
        name = best["checkpoint"]
        if name not in by_epoch:
            load_scored(state, read_checkpoint(run_folder, name, groups=(group,)))
            by_epoch[name] = _score(state, data.test, data, watcher, "test")
        scored, pairs = by_epoch[name]
        found[f"{alpha:g}"] = scored[alpha]
        if state.world.first:
            about = {"split": data.test.manifest.digest, "labels": data.test.table.digest}
            write_pairs(pairs_path(run_folder, f"{alpha:g}"), pairs[alpha], state.num_classes, about)
    if state.world.first and watcher.journal is not None:
        ordered = {float(alpha): score for alpha, score in found.items()}
        epoch = state.best[f"{state.settings.boost.eval:g}"]["epoch"]
        watcher.journal.metrics(_score_figures(ordered, "test", "test"), epoch)
    return found
