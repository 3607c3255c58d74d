"""Training and calibration with everything around them: trackers, report and registration."""

from collections.abc import Callable, Mapping

from paml.inference.calibrate import CalibrateSettings, calibrate_run
from paml.metrics.calibration import Calibration
from paml.report import report_run, run_note
from paml.runs.folder import Run, settings_of_run
from paml.runs.journal import Journal
from paml.runs.train import RunContext, train
from paml.tracking import Trackers, registry, sink_of, start_trackers, try_sync
from paml.tracking.model import log_model
from paml.training.result import Result
from paml.training.settings import TrainSettings


def train_and_report(
    settings: TrainSettings,
    *,
    launch: Callable[[TrainSettings], Result] | None = None,
    connect: Callable[[], None] | None = None,
    log: Callable[[str], None] = print,
    tags: Mapping[str, str] | None = None,
    resume_hint: str | None = None,
) -> Run:
    """Train as `paml.runs.train.train` does, with the trackers and registration that `settings.run` names.

    The journal also receives a note, score tables, plots and the final model. Arguments and errors are those of
    `paml.runs.train.train`.
    """
    for name in settings.run.trackers:
        sink_of(name)
    trackers = Trackers([])

    def start(context: RunContext) -> Callable[[float], object]:
        nonlocal trackers
        context.journal.note(run_note(context))
        trackers = start_trackers(settings.run.trackers, context.folder)
        return trackers.close

    run = train(
        settings,
        launch=launch,
        connect=connect,
        on_start=start,
        on_end=report_run,
        log=log,
        tags=tags,
        resume_hint=resume_hint,
    )
    for link in trackers.links():
        log(f"tracked: {link}")
    if settings.run.register is not None:
        register = registry.RegisterSettings(run=run.folder, name=settings.run.register)
        if trackers.undelivered:
            log(f"not registered, because the tracker is unreachable; later: {register.command}")
        else:
            registry.register_run(register, log)
    return run


def calibrate_and_report(settings: CalibrateSettings, log: Callable[[str], None] = print) -> Calibration:
    """Calibrate a run as `paml.inference.calibrate.calibrate_run` does, and send model and metrics to its trackers."""

    def publish(run_folder: str, model: str | None) -> None:
        if model is not None and settings_of_run(run_folder).data.embeddings is None:
            log_model(Journal(run_folder, "calibrate"), model=model)
        for tracker in settings_of_run(run_folder).run.trackers:
            if (report := try_sync(run_folder, tracker, log)) is not None:
                log(f"tracked: {report.sink.link()}")

    return calibrate_run(settings, log, publish)
