"""Export of a model to files that need no paml: ONNX and torch.export programs, each with and without maps.

Input `images`: uint8 RGB [B, S, S, 3], any B ≥ 1, resized to the S of model.json without keeping the aspect ratio.
Normalization, boost and calibration are part of the file. Outputs: `logits` and `scores`, float32 [B, K], and in files
with maps `maps`, float32 [B, K, h, w], whose averages over h·w are the logits.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch

from paml import storage
from paml.errors import PamlError, SettingsError
from paml.inference.predictor import open_predictor, write_model_folder
from paml.models.inference import Inference

Format = Literal["onnx", "torch"]
OPSET = 18
"""Opset of ONNX files; onnxruntime 1.14 and later read it."""
TOLERANCE = 1e-4
"""Largest allowed difference from the checkpoint, see `max_difference`."""
_TESTED_BATCH_SIZES = (1, 3)
_ANY_BATCH = ({0: torch.export.Dim("B", min=1)},)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Which model to export, and to which formats."""

    model: str = "runs/openimages-v3"
    """A run (FOLDER[@best|newest|step-*][:alpha=A]), a model folder (model.json) or an MLflow model, local or s3://."""
    out: str = "runs/export"
    """Output folder for model.onnx, model-maps.onnx, model.pt2, model-maps.pt2 and the model folder's files, local or
    s3://."""
    formats: tuple[Format, ...] = ("onnx", "torch")
    """onnx (install it with `pip install 'paml[export]'`), torch or both."""

    def __post_init__(self) -> None:
        if not self.formats or set(self.formats) - {"onnx", "torch"}:
            raise SettingsError(f"formats is {list(self.formats)}; allowed are onnx, torch")


class ExportError(PamlError):
    """An export failed, or the exported file does not reproduce the checkpoint's outputs."""


def export(settings: ExportSettings, log: Callable[[str], None] = print) -> list[str]:
    """Write the files, each checked against the checkpoint first; returns their paths.

    Raises ExportError if torch cannot convert the network or a file differs from the checkpoint by more than TOLERANCE,
    SettingsError if a package is not installed, and the errors of `open_predictor`.
    """
    if os.path.realpath(settings.out) == os.path.realpath(settings.model):
        raise SettingsError(f"out is {settings.out!r}, the exported model's own folder: name another folder")
    predictor = open_predictor(settings.model)
    packages = ("onnx", "onnxruntime", "onnxscript") if "onnx" in settings.formats else ()
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise SettingsError(
            f"{', '.join(missing)} is not installed: pip install 'paml[export]', or set --formats '[torch]'"
        )
    storage.ensure_writable(settings.out)
    converters = {"onnx": ("onnx", write_onnx, run_onnx), "torch": ("pt2", write_program, run_program)}
    size, written = predictor.info.image_size, []
    for with_maps, kind in itertools.product((False, True), settings.formats):
        module, (suffix, write, run) = predictor.inference_module(with_maps=with_maps), converters[kind]
        path = storage.join(settings.out, f"model{'-maps' if with_maps else ''}.{suffix}")
        with tempfile.TemporaryDirectory(prefix="paml-") as folder:
            local = os.path.join(folder, f"model.{suffix}")
            try:
                write(module, size, local)
            except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
                raise ExportError(f"torch cannot convert this network to {kind}: {error}") from error
            difference = max_difference(module, size, functools.partial(run, local))
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"{path} was not written: its outputs differ from {settings.model} by {difference:.2g}, "
                    f"{TOLERANCE:g} is allowed. Use the other format, and report this as a bug"
                )
            storage.copy(local, path)
        log(f"{path}: within {difference:.1e} of the checkpoint, {storage.size_of(path):,} bytes")
        written.append(path)
    write_model_folder(settings.out, predictor.network, predictor.info, predictor.calibration)
    log(f"{settings.out}: classes and image size are in model.json; paml predict --model accepts the folder")
    return written


@contextlib.contextmanager
def _silenced_exporters() -> Iterator[None]:
    """Hide the exporters' warnings, which are for their developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)


@_silenced_exporters()
def write_onnx(module: Inference, size: int, path: str) -> None:
    """Write one self-contained local ONNX file. Raises OnnxExporterError or RuntimeError if torch cannot."""
    program = torch.onnx.export(
        module,
        (_example_images(size),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits", "scores"] + ["maps"] * module.with_maps,
        dynamic_shapes=_ANY_BATCH,
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=False)


@_silenced_exporters()
def write_program(module: Inference, size: int, path: str) -> None:
    """Write one local file for torch.export.load. Raises RuntimeError if torch cannot trace the network."""
    program = torch.export.export(module, (_example_images(size),), dynamic_shapes=_ANY_BATCH, strict=False)
    torch.export.save(program, path)


def _example_images(size: int) -> torch.Tensor:
    """Two images, because torch would specialize on a batch size of one."""
    return torch.zeros(2, size, size, 3, dtype=torch.uint8)


def run_onnx(path: str, images: np.ndarray) -> list[np.ndarray]:
    """Outputs of an ONNX file, computed by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [np.asarray(values) for values in session.run(None, {"images": images})]


def run_program(path: str, images: np.ndarray) -> list[np.ndarray]:
    """Outputs of a torch.export file."""
    with torch.inference_mode():
        return [values.numpy() for values in torch.export.load(path).module()(torch.from_numpy(images))]


@torch.inference_mode()
def max_difference(module: Inference, size: int, run: Callable[[np.ndarray], list[np.ndarray]]) -> float:
    """Largest difference between `run` and the module on images of noise and plain colors, in two batch sizes.

    Absolute for scores. Relative for logits above 1, and for maps relative to the batch's largest value if it is above
    1, because their cells are sums of many canceling terms, which two libraries round differently.
    """
    largest = 0.0
    for count in _TESTED_BATCH_SIZES:
        rng = np.random.default_rng(count)
        images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        images[:, : size // 2] = rng.integers(0, 256, (count, 1, 1, 3), dtype=np.uint8)
        outputs = [values.numpy() for values in module(torch.from_numpy(images))]
        for expected, actual in zip(outputs, run(images), strict=True):
            if actual.shape != expected.shape or not np.isfinite(actual).all():
                return float("inf")
            scale = np.maximum(1, np.abs(expected).max() if expected.ndim == 4 else np.abs(expected))
            largest = max(largest, float((np.abs(actual - expected) / scale).max()))
    return largest
