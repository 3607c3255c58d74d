"""The commands of `paml`: what each does, and the names of its settings and its function, imported when it runs."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One command. `settings` and `function` are written "module:name"."""

    summary: str
    """One line in the list of commands."""
    details: str = ""
    """More for the command's own help."""
    examples: tuple[str, ...] = ()
    function: str
    """Takes the settings or, without `settings`, its own parameters from the command line."""
    settings: str | None = None
    raw: bool = False
    """Whether the function takes the list of arguments unparsed."""

    @property
    def target(self) -> Callable:
        """What defines the options: the settings class or the function."""
        return _load(self.settings or self.function)

    def run(self, prog: str, arguments: Sequence[str]) -> int:
        """Run it. Returns the exit status. Raises UsageError for bad arguments, and what the function raises."""
        if self.raw:
            return _load(self.function)(arguments) or 0
        from paml.settings import parse_arguments, read_settings

        if self.settings is not None:
            settings = read_settings(self.target, arguments, prog)
            status = _load(self.function)(settings)
        else:
            status = self.target(**parse_arguments(self.target, arguments, prog))
        return status if isinstance(status, int) else 0


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


COMMANDS: dict[str, Command] = {
    "prepare": Command(
        summary="Turn images and labels into WebDataset shards and label tables",
        details="A stopped preparation continues with the same command. `--plan true` prints what it would take. On a "
        "Ray cluster (RAY_ADDRESS, or `paml submit prepare …`) the work is divided into tasks.",
        examples=(
            "paml prepare --images photos --labels labels.csv --out data/mine",
            "paml prepare --labels 2017_11 --images images --out data/mine --shards.size 448",
            "paml prepare --config openimages_v3_data --plan true",
        ),
        settings="paml.preparation.settings:PrepareSettings",
        function="paml.distributed.prepare:run_prepare",
    ),
    "train": Command(
        summary="Train a classifier from partial labels",
        details="Trains in this process unless `--workers.num_workers N` asks for N workers of Ray Train. A stopped "
        "run continues with `--run.resume true`.",
        examples=(
            "paml train --data.root data/mine",
            "paml train --config openimages_v3 --workers.num_workers 8",
            "paml train --data.root data/mine --loss.name ll-ct --boost.train 3 --print_config > recipe.yaml",
        ),
        settings="paml.training.settings:TrainSettings",
        function="paml.api:train",
    ),
    "evaluate": Command(
        summary="Score a run's checkpoint on a split",
        details="Prints mAP, the mAP of the five class groups and micro-averaged metrics, over annotated pairs.",
        examples=("paml evaluate --run runs/mine --split test --alphas '[1, 5]'",),
        settings="paml.runs.evaluate:EvaluateSettings",
        function="paml.runs.evaluate:evaluate",
    ),
    "tune": Command(
        summary="Search for the best settings with Ray Tune, on the validation split",
        details="Writes a table of trials, plots and the best recipe; `paml train` with that recipe scores the test "
        "split, once. The same command continues a stopped search: finished trials are reused, the others resume from "
        "their checkpoints. `--plan true` prints what would be trained.",
        examples=(
            "paml tune --config tune_demo --trials 20",
            "paml submit tune --config tune_openimages",
        ),
        settings="paml.compare.settings:TuneSettings",
        function="paml.distributed.tune:run_tune",
    ),
    "compare": Command(
        summary="Train methods and seeds under one budget and print a table of scores",
        details="A method is a mapping of dotted settings. Its key `rows` scores one training with several alphas: "
        "{loss.name: an, boost.train: 1, rows: {AN: 1, AN + boost: 5}}. The same command continues a stopped "
        "comparison and retries what failed.",
        examples=("paml submit compare --config compare_coco18",),
        settings="paml.compare.settings:CompareSettings",
        function="paml.distributed.compare:run_compare",
    ),
    "predict": Command(
        summary="Predict classes of one image, or of shards, a folder or a bucket",
        details="A stopped prediction continues with the same command. On a Ray cluster the images are divided into "
        "tasks (`paml submit predict …`).",
        examples=(
            "paml predict --model runs/mine --image cat.jpg --show out.png",
            "paml predict --model runs/mine --images data/mine/shards/test --out scores/test --bulk.top 20",
            "paml predict --model runs/mine --images s3://bucket/photos --out s3://bucket/scores --bulk.top null",
        ),
        settings="paml.distributed.predict:PredictSettings",
        function="paml.distributed.predict:run_predict",
    ),
    "calibrate": Command(
        summary="Calibrate a run's scores and choose a threshold per class for a target precision",
        details="Fits on the validation split. The result is stored with the run's checkpoint and model; predictions, "
        "exports and the served model use it. It is valid for pairs annotated as those it was fitted on: on Open "
        "Images, for pairs that people verified.",
        examples=(
            "paml calibrate --run runs/mine --check test",
            "paml calibrate --run 'runs/mine@best:alpha=5' --calibration.method temperature "
            "--calibration.precision 0.95",
        ),
        settings="paml.inference.calibrate:CalibrateSettings",
        function="paml.pipeline:calibrate_and_report",
    ),
    "export": Command(
        summary="Export a model to ONNX and torch.export files, checked against the checkpoint",
        details="The files take uint8 RGB images [B, S, S, 3] (S is image_size in model.json) and return logits, "
        "scores and, if asked for, class activation maps.",
        examples=(
            "paml export --model runs/mine --out runs/mine-export",
            "paml export --model 'runs/mine@best:alpha=5' --out s3://bucket/model --formats '[onnx]'",
        ),
        settings="paml.inference.export:ExportSettings",
        function="paml.inference.export:export",
    ),
    "export-fiftyone": Command(
        summary="Write predictions, true labels and maps as a data set that FiftyOne opens",
        details="Maps are heatmaps; they need a prediction with --bulk.maps.",
        examples=(
            "paml export-fiftyone --predictions scores/test --labels data/mine/labels/test.arrow --out fiftyone/test",
        ),
        settings="paml.inference.fiftyone_export:FiftyOneExportSettings",
        function="paml.inference.fiftyone_export:export_fiftyone",
    ),
    "serve": Command(
        summary="Serve a run or model folder over HTTP with MLflow's scoring server",
        details="POST /invocations takes encoded images and returns classes, names and scores.",
        examples=("paml serve --model runs/mine --port 5001",),
        settings="paml.tracking.model:ServeSettings",
        function="paml.tracking.model:serve_model",
    ),
    "register": Command(
        summary="Register a run's model in MLflow as candidate, and as champion if it scores higher",
        details="`paml train --run.register NAME` does the same at the end of a run.",
        examples=("paml register --run runs/mine --name birds",),
        settings="paml.tracking.registry:RegisterSettings",
        function="paml.tracking.registry:register_run",
    ),
    "explain": Command(
        summary="Compare the class activation maps of two or more runs on the same images",
        details="Writes one row per label (Parquet), a summary and figures: similarity of the maps, their "
        "highest and lowest scores, maps next to the images, rejected labels by epoch.",
        examples=("paml explain --runs '{AN: runs/an, AN + boost: \"runs/an:alpha=5\", LL-R + BoostLU: runs/llr}'",),
        settings="paml.explain.analysis:ExplainSettings",
        function="paml.explain.analysis:explain",
    ),
    "audit": Command(
        summary="List labels to review: likely missing positives and likely wrong labels",
        details="Writes them as Parquet, CSV and an HTML page where a person answers yes, no or skip. The page exports "
        "the verdicts as CSV, which `paml prepare --verdicts` or `paml labels apply-verdicts` merges. With --image_url "
        "it also writes tasks for Label Studio, whose JSON export `paml prepare --verdicts` reads.",
        examples=(
            "paml audit --run runs/mine --out runs/audit",
            "paml audit --run runs/mine --image_url 'https://host/images/{key}.jpg'",
        ),
        settings="paml.audit.audit:AuditSettings",
        function="paml.audit.audit:audit",
    ),
    "labels": Command(
        summary="Inspect label tables, and filter, merge, split or convert them",
        examples=(
            "paml labels info data/mine/labels/train.arrow",
            "paml labels filter all.arrow some.arrow --classes mids.txt",
            "paml labels apply-verdicts train.arrow verdicts.csv reviewed.arrow",
        ),
        function="paml.labels.command:main",
        raw=True,
    ),
    "verify": Command(
        summary="Check shards against their manifest and name the images that are lost",
        examples=("paml verify data/mine/shards/train",),
        function="paml.cli.actions:verify",
    ),
    "demo": Command(
        summary="Generate a small data set, train two methods on it through Ray and compare them",
        details="Writes to ./data/demo and ./runs and downloads nothing. A backbone first learns single digits, in "
        "place of ImageNet weights. Then AN (assume negative) and LL-R + BoostLU train on the same sparse labels, each "
        "by `ray job submit` on a Ray of the demo's own.",
        examples=("paml demo", "paml demo --scale 0.1 --epochs 1"),
        function="paml.demo:demo",
    ),
    "ui": Command(
        summary="Open MLflow's pages on the runs of a folder",
        examples=("paml ui", "paml ui --storage s3://bucket/runs --port 5050"),
        function="paml.tracking.model:open_ui",
    ),
    "submit": Command(
        summary="Run a paml command as a Ray job",
        details="Prints and runs `ray job submit … -- PYTHON -m paml COMMAND …`. On this machine's Ray it uses this "
        "Python, and relative paths are relative to the current folder. On another machine's (RAY_API_SERVER_ADDRESS) "
        "it uses the `python` there and, from a checkout of paml, uploads the checkout. It asks for a token if this "
        "machine has one.\n\nOptions before the command: --dry_run prints the line only; all others, such as "
        "--working-dir and --no-wait, are those of `ray job submit`.",
        examples=("paml submit train --config openimages_v3 --workers.num_workers 8", "paml submit --dry_run train"),
        function="paml.cli.submit:submit",
        raw=True,
    ),
    "recipes": Command(
        summary="List the recipes that --config takes by name, or print one",
        examples=("paml recipes", "paml recipes openimages_v3"),
        function="paml.cli.actions:recipes",
        raw=True,
    ),
    "sync": Command(
        summary="Send what a tracker lacks of a run's journal",
        details="For a run whose tracking server was unreachable, or that was copied to another place.",
        examples=("paml sync runs/mine --tracking_uri http://127.0.0.1:5000",),
        function="paml.cli.actions:sync",
    ),
}
