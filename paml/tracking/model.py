"""Packages a model folder as an MLflow model without pickles, and starts MLflow's servers: of a model, or its pages."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from paml import storage
from paml.errors import SettingsError
from paml.runs.journal import Journal
from paml.tracking.mlflow_sink import bounded_calls, default_tracking_uri

_REQUIRED = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "pyarrow",
    "pillow",
    "safetensors",
    "simplejpeg",
    "matplotlib",
    "mlflow",
    "pandas",
)
"""Packages that inference needs; the installed versions become requirements of the model."""
_FILES = ("model.json", "weights.safetensors", "calibration.json")


def log_model(journal: Journal, *, model: str) -> None:
    """Package a model folder, local or s3:// (`paml.inference.predictor`), and journal it. See `save_model`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(Path(temporary, "model"))
        save_model(folder, model=model)
        journal.model(folder)


def save_model(folder: str, *, model: str) -> None:
    """Write the MLflow model of a model folder to the local `folder`, which must not exist.

    It contains the files of `model`, paml's code and a code file for MLflow. Its input is a table with a column
    `image` of encoded images (JPEG, PNG, ...; base64 in JSON), its output for each image a list of {class, name,
    score}, highest first. Parameters are `top` (length of the list) and `maps` (true adds `map`, a base64 PNG).
    """
    with bounded_calls(5), warnings.catch_warnings(), tempfile.TemporaryDirectory() as temporary:
        warnings.simplefilter("ignore", UserWarning)  # advice on type hints; the signature below has the types
        import mlflow.pyfunc
        from mlflow.models import ModelSignature
        from mlflow.types import ParamSchema, ParamSpec
        from mlflow.types.schema import AnyType, ColSpec, DataType, Schema
        from PIL import Image

        content, gray = Path(temporary, "model"), io.BytesIO()
        Image.new("RGB", (16, 16), (128, 128, 128)).save(gray, "PNG")
        content.mkdir()
        for name in _FILES:
            if storage.exists(path := storage.join(model, name)):
                storage.copy(path, str(content / name))
        tracking = Path(__file__).parent
        package = Path(temporary, "paml")
        shutil.copytree(tracking.parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        mlflow.pyfunc.save_model(
            path=folder,
            python_model=str(tracking / "model_code.py"),
            artifacts={"model": str(content)},
            code_paths=[str(package)],
            signature=ModelSignature(
                Schema([ColSpec(DataType.binary, "image")]),
                Schema([ColSpec(AnyType())]),
                ParamSchema([ParamSpec("top", DataType.long, 5), ParamSpec("maps", DataType.boolean, False)]),
            ),
            input_example=({"image": [gray.getvalue()]}, {"top": 5, "maps": False}),
            # without local parts such as +cu132, which no index has
            pip_requirements=[f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in _REQUIRED],
        )
        for cache in Path(folder).rglob("__pycache__"):  # MLflow loads the model while it saves it
            shutil.rmtree(cache)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The model to serve, and its address."""

    model: str
    """A run (FOLDER[@best|newest|step-*][:alpha=A]), a model folder (model.json) or an MLflow model, local or s3://."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the server, which asks for no password, to the network."""
    port: int = 5001
    """Port to listen on."""


def serve_model(settings: ServeSettings) -> int:
    """Serve until Ctrl-C. Returns the server's exit status. Raises PamlError if the model cannot be opened."""
    from paml.inference.predictor import open_predictor, write_model_folder

    print(f"preparing {settings.model} for MLflow's scoring server", flush=True)
    predictor = open_predictor(settings.model)
    with tempfile.TemporaryDirectory(prefix="paml-serve-") as folder:
        plain, packed = str(Path(folder, "model")), str(Path(folder, "mlflow"))
        write_model_folder(plain, predictor.network, predictor.info, predictor.calibration)
        save_model(packed, model=plain)
        address = ["--host", settings.host, "--port", str(settings.port)]
        print(f"POST http://{settings.host}:{settings.port}/invocations (Ctrl-C stops the server)", flush=True)
        return _run(["models", "serve", "--model-uri", packed, "--env-manager", "local", *address])


def open_ui(storage: str = "runs", port: int = 5000) -> int:
    """Serve MLflow's pages until Ctrl-C. Raises SettingsError if there is no store.

    Args:
        storage: folder of the runs; its store is mlflow.db, unless MLFLOW_TRACKING_URI names another one.
        port: port to listen on.
    """
    uri = default_tracking_uri(storage)
    if uri.startswith("http"):
        print(f"MLflow is already served at {uri}")
        return 0
    database = uri.removeprefix("sqlite:///")
    if uri.startswith("sqlite:") and not os.path.exists(database):
        raise SettingsError(
            f"{database} does not exist: train first (`paml demo`), or set --storage to the runs' folder"
        )
    print(f"MLflow: http://127.0.0.1:{port} (Ctrl-C stops it; --port if the port is in use)", flush=True)
    return _run(["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri", uri])


def _run(arguments: Sequence[str]) -> int:
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        # MLflow starts `uvicorn` by name: this Python's, also if its environment is not activated
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]),
    }
    command = [sys.executable, "-m", "mlflow", *arguments]
    # A Ctrl-C while MLflow starts would print its traceback; once it has started, its server handles the signal.
    ignore_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with subprocess.Popen(command, env=environment, preexec_fn=ignore_interrupts) as server:
        try:
            return server.wait()
        except KeyboardInterrupt:
            server.terminate()
            server.wait()
            return 0
