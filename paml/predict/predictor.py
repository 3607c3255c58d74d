"""A trained model ready for pictures, opened from a run, a model folder or an MLflow model.

A model folder is all that a trained model needs, without the run and its data: weights.safetensors, model.json
(`ModelFacts`) and, once made, calibration.json. Nothing in it is unpickled.
"""

import contextlib
import dataclasses
import hashlib
import json
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from paml import storage
from paml.data.decode import decode_into
from paml.errors import DataError, PamlError, SettingsError
from paml.explain.runs import parse_run
from paml.metrics.calibration import Calibration
from paml.models.cam import CamClassifier, ModelSettings, build_model
from paml.models.inference import Inference
from paml.reading import MISSHAPEN, read_facts, reading
from paml.training.data import open_split
from paml.training.score_run import choose_checkpoint, load_model, settings_of_run
from paml.training.settings import TrainSettings
from paml.training.state import autocast_of

Precision = Literal["auto", "bf16", "fp16", "fp32"]
MAX_SIDE = 1 << 14
"""Pixels that a side of a model's pictures may have."""


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What one must know of a model beside its weights; model.json of a model folder."""

    model: ModelSettings
    alpha: float
    """Boost of the maps in scoring."""
    classes: tuple[str, ...]
    """MIDs, in the order of the head's maps."""
    names: tuple[str, ...]
    """Display names, in the same order; they may repeat."""
    image_size: int
    """Side in pixels that pictures are brought to, whatever their shape."""
    run: str | None = None
    """Name of the run that trained it."""
    checkpoint: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it in what JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any], where: str) -> "ModelFacts":
        """What `to_json` made. Raises DataError that names the file where something is missing."""
        with reading(where, "copy the whole model again"):
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["model"].items()}
            found = cls(
                ModelSettings(**fields),
                float(facts["alpha"]),
                tuple(facts["classes"]),
                tuple(facts["names"]),
                int(facts["image_size"]),
                facts.get("run"),
                facts.get("checkpoint"),
            )
            if not 1 <= found.image_size <= MAX_SIDE or not found.alpha >= 1:
                raise ValueError(f"pictures of {found.image_size} pixels, alpha {found.alpha}")
            if not all(isinstance(text, str) for text in found.classes + found.names):
                raise TypeError("a class or its name is no text")
            return found


class Predicted(NamedTuple):
    """Of b pictures and K classes."""

    logits_BK: np.ndarray
    """float32, as evaluation ranks them."""
    scores_BK: np.ndarray
    """float32 probabilities, calibrated where the model is."""
    maps_BKHW: np.ndarray | None
    """float32 boosted maps, whose averages are the logits; None unless asked for."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A class of one picture."""

    index: int
    mid: str
    name: str
    score: float
    above_threshold: bool | None
    """Whether the score reaches the class's threshold; None where the class has none."""


class Predictor:
    """Decodes, resizes and normalises as evaluation does, and scores in float32 unless told otherwise.

    Threads may share it: nothing in it changes.
    """

    def __init__(
        self,
        model: CamClassifier,
        facts: ModelFacts,
        calibration: Calibration | None = None,
        *,
        source: str = "",
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
    ) -> None:
        """`source` opens this very model again.

        Raises SettingsError where the number of classes of the network and of `facts` or `calibration` differ.
        """
        num_classes = model.head.out_channels
        described = len(facts.classes) if calibration is None else len(calibration.slope)
        if not num_classes == len(facts.classes) == len(facts.names) == described:
            raise SettingsError(
                f"the network has {num_classes} classes, its description {len(facts.classes)}, {described} in the "
                "calibration: take the description and calibration of this very model"
            )
        self.facts, self.calibration, self.source = facts, calibration, source
        self.device = torch.device(device)
        self.network = model.to(self.device)
        self._autocast = autocast_of(precision, self.device)
        self._with_maps, self._without = self.inference(with_maps=True), self.inference(with_maps=False)

    def inference(self, *, with_maps: bool) -> Inference:
        """The module that does the work; modules of one predictor share the network."""
        return Inference(
            self.network,
            mean=self.facts.model.pixel_mean,
            std=self.facts.model.pixel_std,
            alpha=self.facts.alpha,
            slope=None if self.calibration is None else self.calibration.slope.tolist(),
            offset=None if self.calibration is None else self.calibration.offset.tolist(),
            with_maps=with_maps,
        ).eval()

    def digest(self) -> str:
        """SHA-256 (hex) of all that decides a score: weights, boost, classes, size and calibration."""
        facts = {**self.facts.to_json(), "run": None, "checkpoint": None}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().contiguous().cpu().numpy().tobytes())
        if self.calibration is not None:
            digest.update(self.calibration.slope.tobytes() + self.calibration.offset.tobytes())
            digest.update(self.calibration.threshold.tobytes())
        return digest.hexdigest()

    def decode(self, data: bytes | memoryview, out: np.ndarray | None = None) -> np.ndarray:
        """One encoded picture to uint8 [S, S, 3], in `out` where given. Raises UndecodableError."""
        if out is None:
            out = np.empty((self.facts.image_size, self.facts.image_size, 3), np.uint8)
        decode_into(data, out)
        return out

    @torch.inference_mode()
    def predict(self, pixels_BHWC: np.ndarray, *, maps: bool = False) -> Predicted:
        """Of uint8 pictures [B, H, W, 3], B ≥ 1, of the model's own size or any other. Raises ValueError."""
        if pixels_BHWC.dtype != np.uint8 or pixels_BHWC.ndim != 4 or pixels_BHWC.shape[3] != 3:
            raise ValueError(f"pictures are {pixels_BHWC.dtype} {pixels_BHWC.shape}; uint8 [B, H, W, 3] is needed")
        images = torch.from_numpy(pixels_BHWC).to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            found = (self._with_maps if maps else self._without)(images)
        logits, scores, *rest = (values.float().cpu().numpy() for values in found)
        return Predicted(logits, scores, rest[0] if rest else None)

    def top(self, scores_K: np.ndarray, count: int) -> list[Found]:
        """The `count` classes of the highest scores, highest first, of float [K]; ties go to the lower index."""
        thresholds = None if self.calibration is None else self.calibration.threshold
        found = []
        for index in np.argsort(-scores_K, kind="stable")[:count].tolist():
            above = None
            if thresholds is not None and np.isfinite(thresholds[index]):
                above = bool(scores_K[index] >= thresholds[index])
            found.append(
                Found(index, self.facts.classes[index], self.facts.names[index], float(scores_K[index]), above)
            )
        return found


def open_predictor(
    model: str, *, device: torch.device | str = "cpu", precision: Precision = "fp32", calibrated: bool = True
) -> Predictor:
    """Open a run (FOLDER[@best|newest|step-*][:alpha=A]), a model folder or an MLflow model, local or s3://.

    With `calibrated` the calibration made for this very checkpoint and alpha is used where there is one. Raises
    DataError, SettingsError, CheckpointError.
    """
    for folder in (model, storage.join(model, "artifacts", "model")):
        if storage.exists(storage.join(folder, "model.json")):
            network, facts = _read_folder(folder)
            source, path = folder, storage.join(folder, "calibration.json")
            break
    else:
        network, facts, source, path = _read_run(model)
    calibration = Calibration.read(path) if calibrated and storage.exists(path) else None
    return Predictor(network, facts, calibration, source=source, device=device, precision=precision)


def calibration_path(run_folder: str, checkpoint: str, alpha: float) -> str:
    """Where the calibration of a checkpoint of a run lies, for one alpha."""
    return storage.join(run_folder, "calibration", f"{checkpoint}-alpha-{alpha:g}.json")


def write_model_folder(folder: str, network: CamClassifier, facts: ModelFacts, calibration: Calibration | None) -> None:
    """Write a model folder, local or s3://; model.json, by which it is known, comes last."""
    from safetensors.torch import save

    weights = {name: value.detach().contiguous().cpu() for name, value in network.state_dict().items()}
    storage.write_bytes(storage.join(folder, "weights.safetensors"), save(weights))
    if calibration is not None:
        calibration.write(storage.join(folder, "calibration.json"))
    else:
        storage.delete(storage.join(folder, "calibration.json"))
    storage.write_bytes(storage.join(folder, "model.json"), json.dumps(facts.to_json(), indent=1).encode())


def model_folder(run_folder: str) -> tuple[str, ModelFacts] | None:
    """The model folder that a finished run holds, and what it describes; None where there is none yet."""
    folder = storage.join(run_folder, "model")
    path = storage.join(folder, "model.json")
    return (folder, _read_facts(path)) if storage.exists(path) else None


def _read_folder(folder: str) -> tuple[CamClassifier, ModelFacts]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    where = storage.join(folder, "model.json")
    facts = _read_facts(where)
    path = storage.join(folder, "weights.safetensors")
    try:
        network = build_model(dataclasses.replace(facts.model, weights=None), len(facts.classes))
        network.load_state_dict(load(storage.read_bytes(path)))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: copy the whole model folder again") from error
    except (SafetensorError, RuntimeError, *MISSHAPEN) as error:
        if isinstance(error, PamlError):
            raise
        raise DataError(f"{path} does not fit {where}: copy the whole model folder again ({error})") from error
    return network.eval(), facts


def _read_facts(path: str) -> ModelFacts:
    return ModelFacts.from_json(read_facts(path, "copy the whole model again"), path)


def _read_run(spec: str) -> tuple[CamClassifier, ModelFacts, str, str]:
    """(network, facts, what opens the same checkpoint again, place of its calibration)."""
    folder, which, alpha = parse_run(spec)
    try:
        settings = settings_of_run(folder)
    except DataError as error:
        raise DataError(
            f"{folder} holds neither a run (run.json) nor a model (model.json): give a run's folder, as in "
            "runs/first, or that of a model"
        ) from error
    alpha = settings.boost.eval if alpha is None else alpha
    name, _ = choose_checkpoint(folder, settings, which, alpha)
    network = load_model(folder, settings, name)
    classes, names, image_size = _classes_of_run(folder, settings)
    facts = ModelFacts(settings.model, alpha, classes, names, image_size, settings.run.name, name)
    return network, facts, f"{folder}@{name}:alpha={alpha:g}", calibration_path(folder, name, alpha)


def _classes_of_run(folder: str, settings: TrainSettings) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """(MIDs, names, image size): of the model that a finished run describes, else of the training table."""
    for path in ("model/model.json", "models/final_model/artifacts/model/model.json"):
        with contextlib.suppress(FileNotFoundError):
            facts = _read_facts(storage.join(folder, path))
            return facts.classes, facts.names, facts.image_size
    data = settings.data
    train = open_split(data, data.train_split, data.train_labels, images=data.images)
    return train.table.classes, train.table.names, data.image_size or train.image_size
