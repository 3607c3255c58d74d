"""The code file of a packaged model. MLflow runs it instead of unpickling an object."""

import base64
import binascii
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class ImageClassifier(PythonModel):
    """Maps encoded images in the column `image` to lists of {class, name, score}, highest first.

    If the model is calibrated, `above_threshold` tells whether the score reaches the threshold of its class (null if
    there is none). With the parameter `maps`, `map` is the class activation map over the image as a base64 PNG; all
    maps of an image share one color scale.
    """

    def load_context(self, context):
        from paml.inference.predictor import open_predictor

        self.predictor = open_predictor(context.artifacts["model"])

    def predict(self, context, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Raises MlflowException, which the server answers without a traceback, for an image that cannot be decoded."""
        from paml.data.decode import UndecodableError

        params = params or {}
        top, maps = int(params.get("top", 5)), bool(params.get("maps", False))
        if top < 1:
            raise MlflowException.invalid_parameter_value(f"top is {top}; it must be at least 1")
        predictions = []
        for row, image in enumerate(model_input["image"]):  # one by one, to bound memory
            try:
                predictions.append(self._predict_one(_image_bytes(image), top, maps))
            except UndecodableError as error:
                raise MlflowException.invalid_parameter_value(f"image {row} cannot be decoded: {error}") from error
        return predictions

    def _predict_one(self, data: bytes, top: int, maps: bool) -> list[dict[str, Any]]:
        pixels = self.predictor.decode(data)
        output = self.predictor.forward(pixels[None], with_maps=maps)
        classes = self.predictor.top_classes(output.scores_BK[0], top)
        rows: list[dict[str, Any]] = [{"class": one.class_id, "name": one.name, "score": one.score} for one in classes]
        if self.predictor.calibration is not None:
            for row, one in zip(rows, classes, strict=True):
                row["above_threshold"] = one.above_threshold
        if output.maps_BKHW is not None:
            from paml.plots import map_limit, map_png

            maps_KHW = output.maps_BKHW[0][[one.index for one in classes]]
            for row, map_HW in zip(rows, maps_KHW, strict=True):
                row["map"] = base64.b64encode(map_png(pixels, map_HW, map_limit(list(maps_KHW)))).decode()
        return rows


def _image_bytes(image: bytes | str) -> bytes:
    """The encoded image. MLflow decodes base64 in `dataframe_records` and `dataframe_split`, but not in `inputs`; no
    image file consists of base64 characters alone."""
    data = image.encode() if isinstance(image, str) else bytes(image)
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error:
        return data


set_model(ImageClassifier())
