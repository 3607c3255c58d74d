"""Code file of a logged model: MLflow runs it instead of unpickling an object."""

import base64
import binascii
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class ImageClassifier(PythonModel):
    """Encoded pictures in the column `image` in; for each a list of {class, name, score} out, highest first.

    Where the model has thresholds, `above_threshold` says whether the score reaches that of its class (None where it
    has none). With the parameter `maps` each has `map` too: the class's map over the picture, a PNG in base64; all maps
    of a picture share one scale of colours.
    """

    def load_context(self, context):
        from paml.predict.predictor import open_predictor

        self.predictor = open_predictor(context.artifacts["model"])

    def predict(self, context, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Raises ValueError, which names its row, for a picture that cannot be decoded."""
        from paml.data.decode import UndecodableError

        params = params or {}
        top, maps = int(params.get("top", 5)), bool(params.get("maps", False))
        if top < 1:
            raise ValueError(f"top is {top}; it must be at least 1")
        answers = []
        for row, image in enumerate(model_input["image"]):  # one by one: requests are small, memory stays bounded
            try:
                pixels = self.predictor.decode(_encoded(image))
            except UndecodableError as error:
                raise ValueError(f"image {row} cannot be read as a picture: {error}") from error
            answers.append(self._answer(pixels, top, maps))
        return answers

    def _answer(self, pixels: np.ndarray, top: int, maps: bool) -> list[dict[str, Any]]:
        predicted = self.predictor.predict(pixels[None], maps=maps)
        found = self.predictor.top(predicted.scores_BK[0], top)
        answer: list[dict[str, Any]] = [{"class": one.mid, "name": one.name, "score": one.score} for one in found]
        if self.predictor.calibration is not None:
            for entry, one in zip(answer, found, strict=True):
                entry["above_threshold"] = one.above_threshold
        if predicted.maps_BKHW is not None:
            from paml.explain.panel import limit_of
            from paml.predict.pictures import map_png

            own = predicted.maps_BKHW[0][[one.index for one in found]]
            for entry, scores in zip(answer, own, strict=True):
                entry["map"] = base64.b64encode(map_png(pixels, scores, limit_of(list(own)))).decode()
        return answer


def _encoded(image: bytes | str) -> bytes:
    """A picture's bytes. MLflow decodes the base64 of `dataframe_records` and `dataframe_split`, not that of `inputs`;
    no picture's own bytes are all of base64's alphabet."""
    data = image.encode() if isinstance(image, str) else bytes(image)
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error:
        return data


set_model(ImageClassifier())
