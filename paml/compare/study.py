"""Optuna: the next point of a sweep, and plots of its trials."""

import dataclasses
import io
import random
import warnings
from collections.abc import Sequence
from typing import Any

from paml.compare.space import Axis, Trial, format_value

MIN_TRIALS_FOR_IMPORTANCE = 10
_RANDOM_TRIALS = 10
_SCORE = "Validation mAP, %"
_OPTUNA_STATES = {"running": "RUNNING", "finished": "COMPLETE", "stopped": "PRUNED"}


def suggest_point(axes: Sequence[Axis], number: int, seed: int, trials: Sequence[Trial]) -> dict[str, Any]:
    """The point that Optuna's tree-structured Parzen estimator suggests for trial `number`, given the other trials.

    The first ten are random. Stopped trials count by their scores so far, running ones as bad, to make parallel trials
    differ; failed ones are ignored.
    """
    import optuna

    sampler_seed = random.Random(f"{seed}-{number}").randrange(2**31)
    sampler = optuna.samplers.TPESampler(seed=sampler_seed, n_startup_trials=_RANDOM_TRIALS, constant_liar=True)
    study = _new_study(sampler)
    for trial in trials:
        if trial.state == "running" or (trial.state in _OPTUNA_STATES and trial.scores):
            score = trial.score if trial.state == "finished" else None
            study.add_trial(_optuna_trial(axes, trial, _OPTUNA_STATES[trial.state], score))
    params = study.ask({axis.name: _distribution(axis) for axis in axes}).params
    return {axis.name: _decode(axis, params[axis.name]) for axis in axes}


def plot_trials(axes: Sequence[Axis], trials: Sequence[Trial]) -> dict[str, bytes]:
    """Name -> PNG file: parallel coordinates, score by setting, and fANOVA importance (from ten trials on).

    A trial's score is its best validation mAP in percent; of a stopped trial, up to the epoch where it was stopped.
    axes: those that all trials have. Nothing is drawn for fewer than two trials with a score.
    """
    scored = [trial for trial in trials if trial.scores]
    if len(scored) < 2:
        return {}
    import matplotlib as mpl
    import optuna
    from matplotlib import pyplot as plt
    from optuna.visualization import matplotlib as plots

    plt.switch_backend("agg")  # without windows
    with warnings.catch_warnings(), mpl.rc_context():  # Optuna changes the style
        warnings.simplefilter("ignore")
        methods = list(dict.fromkeys(trial.method for trial in scored))
        if len(methods) > 1:
            axes = [Axis("method", "choice", tuple(methods)), *axes]
            scored = [dataclasses.replace(trial, point={"method": trial.method} | trial.point) for trial in scored]
        study = _new_study()
        study.add_trials([_optuna_trial(axes, trial, "COMPLETE", 100 * trial.score) for trial in scored])
        names = sorted(axis.name for axis in axes)  # the order of Optuna
        plot = plots.plot_parallel_coordinate(study, target_name=_SCORE)
        plot.set_xticks(plot.get_xticks(), [_SCORE, *(name.replace(", ", ",\n") for name in names)], rotation=0)
        plot.set_title(f"{len(scored)} trials")
        files = {"parallel_coordinates.png": _save(2.4 * len(axes) + 3, 5)}
        plots.plot_slice(study, target_name=_SCORE)
        plt.gcf().suptitle("Validation mAP by setting")
        files["score_by_setting.png"] = _save(4 * len(axes), 4.2)
        if len(scored) >= MIN_TRIALS_FOR_IMPORTANCE and len({trial.score for trial in scored}) > 1:
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            plot = plots.plot_param_importances(study, evaluator=evaluator)
            plot.set_title("Importance of the settings (fANOVA)", loc="left")
            plot.set(xlabel="Share of the variance of validation mAP", ylabel="")
            if (legend := plot.get_legend()) is not None:
                legend.remove()
            files["importance.png"] = _save(8, 1.8 + 0.5 * len(axes))
    return files


def _new_study(sampler: Any = None) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=sampler)


def _save(width: float, height: float) -> bytes:
    from matplotlib import pyplot as plt

    figure, buffer = plt.gcf(), io.BytesIO()
    figure.set_size_inches(width, height)
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def _optuna_trial(axes: Sequence[Axis], trial: Trial, state: str, value: float | None) -> Any:
    import optuna

    return optuna.trial.create_trial(
        state=optuna.trial.TrialState[state],
        value=value,
        params={
            axis.name: format_value(trial.point[axis.name]) if axis.kind == "choice" else trial.point[axis.name]
            for axis in axes
        },
        distributions={axis.name: _distribution(axis) for axis in axes},
        intermediate_values=dict(enumerate(trial.scores, 1)),
    )


def _distribution(axis: Axis) -> Any:
    from optuna import distributions

    if axis.kind == "choice":  # as text, since Optuna takes no lists
        return distributions.CategoricalDistribution([format_value(value) for value in axis.values])
    if axis.kind == "int":
        return distributions.IntDistribution(int(axis.low), int(axis.high), step=int(axis.step or 1))
    high = axis.low + axis.num_steps * axis.step if axis.step else axis.high
    return distributions.FloatDistribution(axis.low, high, log=axis.kind == "log_uniform", step=axis.step)


def _decode(axis: Axis, value: Any) -> Any:
    if axis.kind == "choice":
        return next(choice for choice in axis.values if format_value(choice) == value)
    return axis.round(value)
