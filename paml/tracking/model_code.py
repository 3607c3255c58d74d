"""Code file of a logged model: MLflow runs it instead of unpickling an object."""

from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class ImageClassifier(PythonModel):
    """uint8 images [N, H, W, 3] in, float32 scores [N, K] out."""

    def load_context(self, context):
        from paml.models import load_for_inference

        self.scores = load_for_inference(context.artifacts["model"])

    def predict(self, context, model_input: np.ndarray, params=None) -> Any:
        return self.scores(model_input)


set_model(ImageClassifier())
