"""A model as files that need no paml: ONNX, and programs of torch.export, each with and without maps.

All take `images`, uint8 RGB [B, S, S, 3] of the size that model.json names, any B ≥ 1, brought to that size without
keeping the aspect; normalisation, boost and calibration are inside. They give `logits` and `scores`, float32 [B, K],
and those with maps also `maps`, float32 [B, K, h, w], whose averages over h·w are the logits.
"""

import contextlib
import dataclasses
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
from paml.models.inference import Inference
from paml.predict.predictor import open_predictor, write_model_folder

Format = Literal["onnx", "torch"]
OPSET = 18
"""Of the ONNX files; read by onnxruntime 1.14 and later."""
TOLERANCE = 1e-4
"""Largest difference from the checkpoint's own, see `difference`."""
_TRIED = (1, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Which model is exported, to what."""

    model: str = "runs/openimages-v3"
    """A run (FOLDER[@best|newest|step-*][:alpha=A]), a model folder (model.json) or an MLflow model, local or s3://."""
    out: str = "runs/export"
    """Folder for model.onnx, model-maps.onnx, model.pt2, model-maps.pt2 and the model folder's own files; s3:// too."""
    formats: tuple[Format, ...] = ("onnx", "torch")
    """onnx (needs the packages of `pip install 'paml[export]'`) and torch."""
    maps: Literal["both", "with", "without"] = "both"
    """Files with maps, without, or both."""
    calibrated: bool = True
    """Put the calibration, where there is one, into `scores`."""

    def __post_init__(self) -> None:
        if not self.formats or set(self.formats) - {"onnx", "torch"}:
            raise SettingsError(f"formats is {list(self.formats)}; name onnx, torch or both")
        if self.maps not in ("both", "with", "without"):
            raise SettingsError(f"maps is {self.maps!r}; allowed are both, with, without")


class ExportError(PamlError):
    """An exported file that does not give the checkpoint's scores, or that could not be made."""


def export(settings: ExportSettings, say: Callable[[str], None] = print) -> list[str]:
    """Write the files, each checked against the checkpoint first; returns their paths.

    Raises ExportError where a file differs from the checkpoint by more than TOLERANCE, SettingsError where a package
    is missing, and what `open_predictor` raises.
    """
    predictor = open_predictor(settings.model, calibrated=settings.calibrated)
    if "onnx" in settings.formats:
        _need_onnx()
    storage.ensure_writable(settings.out)
    written = []
    for with_maps in {"both": (False, True), "with": (True,), "without": (False,)}[settings.maps]:
        module = predictor.inference(with_maps=with_maps)
        for kind in settings.formats:
            suffix = {"onnx": "onnx", "torch": "pt2"}[kind]
            path = storage.join(settings.out, f"model{'-maps' if with_maps else ''}.{suffix}")
            with tempfile.TemporaryDirectory(prefix="paml-") as folder:
                local = os.path.join(folder, f"model.{suffix}")
                write, run = {"onnx": (write_onnx, run_onnx), "torch": (write_program, run_program)}[kind]
                write(module, predictor.facts.image_size, local)
                worst = difference(
                    module, predictor.facts.image_size, lambda images, run=run, at=local: run(at, images)
                )
                if not worst <= TOLERANCE:
                    raise ExportError(
                        f"{path} would differ from {settings.model} by {worst:.2g}, allowed is {TOLERANCE:g}: "
                        "nothing was written for it; export to the other format, and tell the maintainers"
                    )
                storage.upload(local, path)
            say(f"{path}: at most {worst:.1e} from the checkpoint, {storage.size_of(path):,} bytes")
            written.append(path)
    write_model_folder(settings.out, predictor.network, predictor.facts, predictor.calibration)
    say(f"{settings.out}: classes and size in model.json; the folder opens in paml, too (jobs/predict.py --model)")
    return written


def write_onnx(module: Inference, size: int, path: str) -> None:
    """One self-contained ONNX file, local. Raises ExportError where torch cannot translate the network."""
    outputs = ["logits", "scores"] + ["maps"] * module.with_maps
    with _quiet():
        try:
            program = torch.onnx.export(
                module,
                (_example(size),),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=outputs,
                dynamic_shapes=({0: torch.export.Dim("B", min=1)},),
                verbose=False,
            )
            assert program is not None
            program.save(path, external_data=False)
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise ExportError(f"torch cannot write this network as ONNX: {error}") from error


def run_onnx(path: str, images: np.ndarray) -> list[np.ndarray]:
    """Outputs of an ONNX file, by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [np.asarray(values) for values in session.run(None, {"images": images})]


def write_program(module: Inference, size: int, path: str) -> None:
    """One file that torch.export.load reads, local. Raises ExportError where torch cannot trace the network."""
    with _quiet():
        try:
            program = torch.export.export(
                module, (_example(size),), dynamic_shapes=({0: torch.export.Dim("B", min=1)},), strict=False
            )
            torch.export.save(program, path)
        except RuntimeError as error:
            raise ExportError(f"torch cannot export this network: {error}") from error


def run_program(path: str, images: np.ndarray) -> list[np.ndarray]:
    """Outputs of a file of torch.export."""
    with torch.inference_mode():
        found = torch.export.load(path).module()(torch.from_numpy(images))
    return [values.numpy() for values in found]


@torch.inference_mode()
def difference(module: Inference, size: int, run: Callable[[np.ndarray], list[np.ndarray]]) -> float:
    """Largest difference of `run` from the module on pictures of noise and of plain colours, in batches of two sizes.

    Of scores absolute; of logits relative where they are above 1; of maps relative to the largest value of the maps of
    the batch where that is above 1: their cells are sums of many terms that cancel, which two libraries round unlike.
    """
    worst = 0.0
    for count in _TRIED:
        rng = np.random.default_rng(count)
        images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        images[:, : size // 2] = rng.integers(0, 256, (count, 1, 1, 3), dtype=np.uint8)
        expected = [values.numpy() for values in module(torch.from_numpy(images))]
        for own, other in zip(expected, run(images), strict=True):
            if other.shape != own.shape or not np.isfinite(other).all():
                return float("inf")
            scale = np.maximum(1, np.abs(own).max() if own.ndim == 4 else np.abs(own))
            worst = max(worst, float((np.abs(other - own) / scale).max()))
    return worst


def _example(size: int) -> torch.Tensor:
    """Two pictures: one alone would make torch take a batch for a constant."""
    return torch.zeros(2, size, size, 3, dtype=torch.uint8)


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"the package {error.name} is not installed: pip install 'paml[export]', or export with --formats [torch]"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' advice to their developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
