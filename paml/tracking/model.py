"""A model folder as an MLflow model that holds no pickle, to be loaded or served."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from paml import storage
from paml.tracking.journal import Journal
from paml.tracking.view import own_calls

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
_FILES = ("model.json", "weights.safetensors", "calibration.json")


def final_model(
    journal: Journal, *, model: str, name: str = "final_model", requirements: Sequence[str] | None = None
) -> None:
    """Builds the MLflow model of a model folder and journals it; the follower logs it to the server.

    `model`: a folder as `paml.predict.predictor` writes it, local or S3. See `save_model`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out = str(Path(temporary, name))
        save_model(out, model=model, requirements=requirements)
        journal.model(out, name)


def save_model(folder: str, *, model: str, requirements: Sequence[str] | None = None) -> None:
    """Writes the MLflow model of a model folder to the local `folder`, which must not exist.

    It holds the files of `model`, paml's own code and a code file that MLflow runs. It takes a table with a column
    `image` of encoded pictures (JPEG, PNG, …; base64 in JSON) and gives for each a list of {class, name, score},
    highest first; parameters are `top` (how many) and `maps` (true adds `map`, a PNG in base64, to each).
    `requirements` default to the installed versions of what inference needs.
    """
    with own_calls(5), warnings.catch_warnings(), tempfile.TemporaryDirectory() as temporary:
        # Advice on type hints and on missing input examples; the signature below says what they would.
        warnings.simplefilter("ignore", UserWarning)
        import mlflow.pyfunc
        from mlflow.models import ModelSignature
        from mlflow.types import ParamSchema, ParamSpec
        from mlflow.types.schema import AnyType, ColSpec, DataType, Schema

        content = Path(temporary, "model")
        content.mkdir()
        for name in _FILES:
            if storage.exists(path := storage.join(model, name)):
                storage.copy_to_local(path, str(content / name))
        here = Path(__file__).parent
        package = Path(temporary, "paml")
        shutil.copytree(here.parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        mlflow.pyfunc.save_model(
            path=folder,
            python_model=str(here / "model_code.py"),
            artifacts={"model": str(content)},
            code_paths=[str(package)],
            signature=ModelSignature(
                Schema([ColSpec(DataType.binary, "image")]),
                Schema([ColSpec(AnyType())]),
                ParamSchema([ParamSpec("top", DataType.long, 5), ParamSpec("maps", DataType.boolean, False)]),
            ),
            input_example=({"image": [_example()]}, {"top": 5, "maps": False}),
            pip_requirements=list(requirements) if requirements is not None else installed_requirements(),
        )
        # MLflow loads the model while it saves it, and leaves what Python compiled.
        for cache in Path(folder).rglob("__pycache__"):
            shutil.rmtree(cache)


def _example() -> bytes:
    """A grey picture."""
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (16, 16), (128, 128, 128)).save(out, "PNG")
    return out.getvalue()


def installed_requirements() -> list[str]:
    """Installed versions of what inference needs, without local parts (`+cu132`), which no index has."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in _REQUIRED]
