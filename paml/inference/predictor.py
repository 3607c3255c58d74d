"""A trained model that predicts classes of images, opened from a run, a model folder or an MLflow model.

A model folder holds all that a trained model needs, without the run and its data: weights.safetensors, model.json
(`ModelInfo`) and, after calibration, calibration.json. Nothing in it is unpickled.
"""

import dataclasses
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, overload

import numpy as np
import torch

from paml import storage
from paml.data.decode import UndecodableError, decode_into, resize_into
from paml.errors import DataError, SettingsError
from paml.metrics.calibration import Calibration
from paml.models import CamClassifier, ModelSettings, build_model
from paml.models.backbones import check_takes_images
from paml.models.inference import Inference
from paml.parsing import parse_errors_as, read_json
from paml.runs.folder import settings_of_run
from paml.runs.spec import choose_checkpoint, load_model, parse_run
from paml.sources.fetch import read_object
from paml.training.data import open_split
from paml.training.state import autocast_dtype

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

Precision = Literal["auto", "bf16", "fp16", "fp32"]
ImageInput = Union[str, "os.PathLike[str]", bytes, np.ndarray, "PILImage"]
"""A path (local or s3://), an encoded image, an array uint8 [H, W, 3] (RGB), or a PIL image."""
MAX_SIDE = 1 << 14
"""Largest image size of a model, in pixels."""
_BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """The description of a model that its weights need: model.json of a model folder."""

    model: ModelSettings
    alpha: float
    """Boost of the maps in scoring."""
    classes: tuple[str, ...]
    """MIDs, in the order of the head's maps."""
    names: tuple[str, ...]
    """Display names, in the same order; they may repeat."""
    image_size: int
    """Side in pixels to which images of any shape are resized."""
    run: str | None = None
    """Name of the run that trained the model."""
    checkpoint: str | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any], path: str) -> "ModelInfo":
        """The inverse of `dataclasses.asdict`. Raises DataError that names `path` if a value is missing or invalid."""
        with parse_errors_as(path, "copy the model again"):
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["model"].items()}
            classes, names, size = tuple(values["classes"]), tuple(values["names"]), int(values["image_size"])
            run, checkpoint = values.get("run"), values.get("checkpoint")
            info = cls(ModelSettings(**fields), float(values["alpha"]), classes, names, size, run, checkpoint)
            if not 1 <= info.image_size <= MAX_SIDE or not info.alpha >= 1:
                raise ValueError(f"image_size {info.image_size}, alpha {info.alpha}")
            if not all(isinstance(text, str) for text in info.classes + info.names):
                raise TypeError("a class or its name is not a string")
            return info


class ModelOutput(NamedTuple):
    """Outputs for B images and K classes."""

    logits_BK: np.ndarray
    """float32, as ranked in evaluation."""
    scores_BK: np.ndarray
    """float32 probabilities, calibrated if the model has a calibration."""
    maps_BKHW: np.ndarray | None
    """float32 boosted maps, whose averages are the logits; None unless requested."""


@dataclasses.dataclass(frozen=True)
class ClassPrediction:
    """A predicted class of an image."""

    class_id: str
    name: str
    score: float
    """Probability, calibrated if the model has a calibration."""
    index: int
    """Position of the class in the model's outputs."""
    above_threshold: bool | None = None
    """Whether the score reaches the class's threshold; None if the class has no threshold."""


class Predictor:
    """Predicts classes of images; decodes, resizes and normalizes them as in evaluation. Thread-safe.

    ::

        predictor = paml.load("runs/first")
        for prediction in predictor.predict("cat.jpg"):
            print(prediction.name, prediction.score)
    """

    def __init__(
        self,
        model: CamClassifier,
        info: ModelInfo,
        calibration: Calibration | None = None,
        *,
        source: str = "",
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
    ) -> None:
        """source: what `open_predictor` opens to get the same model.

        Raises SettingsError if the network, `info` and `calibration` differ in the number of classes.
        """
        num_classes = model.head.out_channels
        calibrated_classes = num_classes if calibration is None else len(calibration.slope)
        if not num_classes == len(info.classes) == len(info.names) == calibrated_classes:
            raise SettingsError(
                f"the network has {num_classes} classes, model.json has {len(info.classes)} and the calibration "
                f"{calibrated_classes}: use the model.json and the calibration of this model"
            )
        self.info, self.calibration, self.source = info, calibration, source
        self.device = torch.device(device)
        self.network = model.to(self.device)
        self._autocast_dtype = autocast_dtype(precision, self.device)
        self._with_maps, self._without_maps = (self.inference_module(with_maps=maps) for maps in (True, False))

    @property
    def classes(self) -> tuple[str, ...]:
        """Ids (MIDs) of the K classes, in the order of the outputs."""
        return self.info.classes

    @property
    def names(self) -> tuple[str, ...]:
        """Display names of the K classes, in the same order; they may repeat."""
        return self.info.names

    @property
    def thresholds(self) -> np.ndarray:
        """float64 [K]; NaN for classes without a threshold."""
        return np.full(len(self.classes), np.nan) if self.calibration is None else self.calibration.threshold

    def __repr__(self) -> str:
        calibrated = "not calibrated" if self.calibration is None else f"calibrated ({self.calibration.method})"
        return (
            f"Predictor({self.source!r}: {self.info.model.backbone}, {len(self.classes):,} classes, "
            f"{self.info.image_size} px, alpha {self.info.alpha:g}, {calibrated}, {self.device})"
        )

    @overload
    def predict(self, images: ImageInput, top: int = 5) -> list[ClassPrediction]: ...
    @overload
    def predict(self, images: list[Any] | tuple[Any, ...], top: int = 5) -> list[list[ClassPrediction]]: ...
    def predict(self, images: Any, top: int = 5) -> Any:
        """The `top` classes of an image, highest score first: list[ClassPrediction].

        For a list, a tuple or an array [B, H, W, 3] of images, a list with one such list per image. An image is any
        ImageInput. Raises DataError if an image is missing, cannot be decoded, or is an array of another type or shape.
        """
        if not isinstance(images, (list, tuple)) and not (isinstance(images, np.ndarray) and images.ndim == 4):
            return self.predict([images], top)[0]
        predictions: list[list[ClassPrediction]] = []
        for start in range(0, len(images), _BATCH_SIZE):
            pixels_BHWC = np.stack([self.read_image(image) for image in images[start : start + _BATCH_SIZE]])
            predictions += [self.top_classes(scores_K, top) for scores_K in self.forward(pixels_BHWC).scores_BK]
        return predictions

    def maps(self, image: ImageInput) -> np.ndarray:
        """Class activation maps of an image, float32 [K, h, w], boosted as in scoring; each averages to a logit."""
        output = self.forward(self.read_image(image)[None], with_maps=True)
        assert output.maps_BKHW is not None
        return output.maps_BKHW[0]

    @torch.inference_mode()
    def forward(self, pixels_BHWC: np.ndarray, *, with_maps: bool = False) -> ModelOutput:
        """Run the network on uint8 images [B, H, W, 3], B ≥ 1, without resizing. Raises ValueError."""
        if pixels_BHWC.dtype != np.uint8 or pixels_BHWC.ndim != 4 or pixels_BHWC.shape[3] != 3:
            raise ValueError(f"images are {pixels_BHWC.dtype} {pixels_BHWC.shape}; pass uint8 [B, H, W, 3]")
        images = torch.from_numpy(pixels_BHWC).to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None):
            outputs = (self._with_maps if with_maps else self._without_maps)(images)
        logits, scores, *maps = (values.float().cpu().numpy() for values in outputs)
        return ModelOutput(logits, scores, maps[0] if maps else None)

    def top_classes(self, scores_K: np.ndarray, count: int) -> list[ClassPrediction]:
        """The `count` classes of the highest scores, float [K], in descending order; ties go to the lower index."""
        top, thresholds = [], self.thresholds
        for index in np.argsort(-scores_K, kind="stable")[:count].tolist():
            score, threshold = float(scores_K[index]), thresholds[index]
            above = bool(score >= threshold) if np.isfinite(threshold) else None
            top.append(ClassPrediction(self.classes[index], self.names[index], score, index, above))
        return top

    def read_image(self, image: ImageInput) -> np.ndarray:
        """Decode and resize an image to uint8 [S, S, 3]. Raises DataError."""
        if isinstance(image, (str, os.PathLike)):
            try:
                return self.decode(read_image_file(image))
            except UndecodableError as error:
                raise DataError(f"{os.fspath(image)} cannot be decoded as an image: {error}") from error
        if isinstance(image, bytes):
            return self.decode(image)
        from PIL import Image, ImageOps

        if isinstance(image, Image.Image):
            if image.mode.startswith(("I", "F")):
                raise DataError(f"the image has mode {image.mode}, whose range is unknown: pass its file, or 8 bits")
            image = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise DataError(f"the image is an array {pixels.dtype} {list(pixels.shape)}: pass uint8 RGB [H, W, 3]")
        out = np.empty((self.info.image_size, self.info.image_size, 3), np.uint8)
        resize_into(np.array(pixels, order="C"), out)
        return out

    def decode(self, data: bytes | memoryview, out: np.ndarray | None = None) -> np.ndarray:
        """Decode and resize one image to uint8 [S, S, 3], into `out` if given. Raises UndecodableError."""
        if out is None:
            out = np.empty((self.info.image_size, self.info.image_size, 3), np.uint8)
        decode_into(data, out)
        return out

    def inference_module(self, *, with_maps: bool) -> Inference:
        """The network with normalization, boost and calibration; modules of one predictor share the weights."""
        fitted = self.calibration
        slope, offset = (None, None) if fitted is None else (fitted.slope.tolist(), fitted.offset.tolist())
        return Inference(self.network, alpha=self.info.alpha, slope=slope, offset=offset, with_maps=with_maps).eval()

    def digest(self) -> str:
        """SHA-256 (hex) of all that determines the scores: weights, boost, classes, image size and calibration."""
        info = {**dataclasses.asdict(self.info), "run": None, "checkpoint": None}
        digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().contiguous().cpu().numpy().tobytes())
        if self.calibration is not None:
            digest.update(self.calibration.slope.tobytes() + self.calibration.offset.tobytes())
            digest.update(self.calibration.threshold.tobytes())
        return digest.hexdigest()


def read_image_file(path: "str | os.PathLike[str]") -> bytes:
    """The bytes of an image file, local or s3://. Raises DataError if it is missing or too large."""
    data = read_object(os.fspath(path))
    if isinstance(data, FileNotFoundError):
        raise DataError(f"{os.fspath(path)} does not exist: pass the path of an image (JPEG, PNG, …)") from data
    if isinstance(data, Exception):
        raise data
    return data


def open_predictor(
    model: "str | os.PathLike[str]",
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    calibrated: bool = True,
    takes_images: bool = True,
) -> Predictor:
    """Open a run (FOLDER[@best|newest|step-*][:alpha=A]), a model folder or an MLflow model, local or s3://.

    calibrated: use the calibration of this checkpoint and alpha, if there is one. takes_images: refuse a model of
    embeddings. Raises DataError, SettingsError, CheckpointError.
    """
    model = os.fspath(model)
    for folder in (model, storage.join(model, "artifacts", "model")):
        if storage.exists(storage.join(folder, "model.json")):
            network, info = _read_model_folder(folder)
            source, calibration_file = folder, storage.join(folder, "calibration.json")
            break
    else:
        network, info, source, calibration_file = _read_run(model)
    if takes_images:
        check_takes_images(info.model, source)
    calibration = Calibration.read(calibration_file) if calibrated and storage.exists(calibration_file) else None
    return Predictor(network, info, calibration, source=source, device=device, precision=precision)


def calibration_path(run_folder: str, checkpoint: str, alpha: float) -> str:
    """The calibration file of a run's checkpoint for one alpha."""
    return storage.join(run_folder, "calibration", f"{checkpoint}-alpha-{alpha:g}.json")


def write_model_folder(folder: str, network: CamClassifier, info: ModelInfo, calibration: Calibration | None) -> None:
    """Write a model folder, local or s3://. model.json comes last: it marks the folder as complete."""
    from safetensors.torch import save

    weights = {name: value.detach().contiguous().cpu() for name, value in network.state_dict().items()}
    storage.write_bytes(storage.join(folder, "weights.safetensors"), save(weights))
    if calibration is not None:
        calibration.write(storage.join(folder, "calibration.json"))
    else:
        storage.delete(storage.join(folder, "calibration.json"))
    storage.write_bytes(storage.join(folder, "model.json"), json.dumps(dataclasses.asdict(info), indent=1).encode())


def model_folder_of_run(run_folder: str) -> tuple[str, ModelInfo] | None:
    """(model folder of a finished run, its description); None if the run has not written one."""
    folder = storage.join(run_folder, "model")
    path = storage.join(folder, "model.json")
    return (folder, _read_info(path)) if storage.exists(path) else None


def _read_model_folder(folder: str) -> tuple[CamClassifier, ModelInfo]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    info, path = _read_info(storage.join(folder, "model.json")), storage.join(folder, "weights.safetensors")
    hint = "copy the whole model folder again"
    try:
        with parse_errors_as(path, hint, also=(SafetensorError, RuntimeError)):
            network = build_model(dataclasses.replace(info.model, weights=None), len(info.classes))
            network.load_state_dict(load(storage.read_bytes(path)))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {hint}") from error
    return network.eval(), info


def _read_info(path: str) -> ModelInfo:
    return ModelInfo.from_json(read_json(path, "copy the model again"), path)


def _read_run(spec: str) -> tuple[CamClassifier, ModelInfo, str, str]:
    """(network, info, spec of exactly this checkpoint and alpha, path of its calibration)."""
    folder, which, alpha = parse_run(spec)
    try:
        settings = settings_of_run(folder)
    except DataError as error:
        raise DataError(
            f"{folder} is neither a run (no run.json) nor a model (no model.json): pass a run folder such as "
            "runs/first, or a model folder"
        ) from error
    alpha = settings.boost.eval if alpha is None else alpha
    checkpoint, _ = choose_checkpoint(folder, settings, which, alpha)
    if finished := model_folder_of_run(folder):  # then the training data are not needed
        classes, names, image_size = finished[1].classes, finished[1].names, finished[1].image_size
    else:
        data = settings.data
        train = open_split(data, data.train_split, data.train_labels, images=data.images)
        classes, names, image_size = train.table.classes, train.table.names, data.image_size or train.image_size
    info = ModelInfo(settings.model, alpha, classes, names, image_size, settings.run.name, checkpoint)
    source = f"{folder}@{checkpoint}:alpha={alpha:g}"
    return load_model(folder, settings, checkpoint), info, source, calibration_path(folder, checkpoint, alpha)
