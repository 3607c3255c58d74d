"""The final model as an MLflow model that holds no pickle."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paml import storage
from paml.tracking.journal import Journal, plain
from paml.tracking.view import own_calls

_REQUIRED = ("torch", "torchvision", "numpy", "pyarrow", "pillow", "safetensors", "mlflow")


def final_model(
    journal: Journal,
    *,
    weights: str,
    description: Mapping[str, Any],
    num_classes: int,
    name: str = "final_model",
    requirements: Sequence[str] | None = None,
) -> None:
    """Builds the MLflow model of a run's weights and journals it; the follower logs it to the server.

    The model holds `weights` (a safetensors file, local or S3), `description` as model.json, paml's own code
    and a code file that calls `paml.models.load_for_inference` on the folder of the first two. It takes uint8
    images [N, H, W, 3] and gives float32 scores [N, num_classes]. `requirements` default to the installed
    versions of what inference needs.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out = str(Path(temporary, name))
        save_model(out, weights=weights, description=description, num_classes=num_classes, requirements=requirements)
        journal.model(out, name)


def save_model(
    folder: str,
    *,
    weights: str,
    description: Mapping[str, Any],
    num_classes: int,
    requirements: Sequence[str] | None = None,
) -> None:
    """Writes the MLflow model of `final_model` to a local folder, which must not exist."""
    import numpy as np

    with own_calls(5), warnings.catch_warnings(), tempfile.TemporaryDirectory() as temporary:
        # Advice to give an input example; the signature below says what it would.
        warnings.simplefilter("ignore", UserWarning)
        import mlflow.pyfunc
        from mlflow.models import ModelSignature
        from mlflow.types.schema import Schema, TensorSpec

        content = Path(temporary, "model")
        content.mkdir()
        storage.copy_to_local(weights, str(content / "weights.safetensors"))
        (content / "model.json").write_text(json.dumps(plain(description), indent=1))
        here = Path(__file__).parent
        package = Path(temporary, "paml")
        shutil.copytree(here.parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        mlflow.pyfunc.save_model(
            path=folder,
            python_model=str(here / "model_code.py"),
            artifacts={"model": str(content)},
            code_paths=[str(package)],
            signature=ModelSignature(
                Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))]),
                Schema([TensorSpec(np.dtype(np.float32), (-1, num_classes))]),
            ),
            pip_requirements=list(requirements) if requirements is not None else installed_requirements(),
        )
        # MLflow loads the model while it saves it, and leaves what Python compiled.
        for cache in Path(folder).rglob("__pycache__"):
            shutil.rmtree(cache)


def installed_requirements() -> list[str]:
    """Installed versions of what inference needs, without local parts (`+cu132`), which no index has."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in _REQUIRED]
