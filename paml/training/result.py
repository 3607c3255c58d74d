"""The result of a run."""

import dataclasses
from typing import Any

import numpy as np

from paml.metrics import Pairs, Scores


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a run. Scores are by alpha, written as `f"{alpha:g}"`."""

    best: dict[str, dict[str, Any]]
    """For each alpha the best epoch: `epoch`, its validation mAP as `map`, and `checkpoint`."""
    test: dict[str, Scores]
    """Test scores of each alpha at its best epoch; empty if the test split is not scored."""
    history: list[dict[str, float]]
    """Metrics of each epoch."""
    test_pairs: dict[str, Pairs] = dataclasses.field(default_factory=dict)
    """The scored pairs of the test split. Not part of `to_json`, like `test_digests`."""
    test_digests: dict[str, str] = dataclasses.field(default_factory=dict)
    """Digests of the shards and labels that `test_pairs` were scored on."""

    def to_json(self) -> dict[str, Any]:
        """The result as values of JSON."""
        test = {
            alpha: {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in vars(scores).items()}
            for alpha, scores in self.test.items()
        }
        return {"best": self.best, "test": test, "history": self.history}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Result":
        """The inverse of `to_json`."""
        test = {}
        for alpha, values in content["test"].items():
            arrays = {name: np.array(value) for name, value in values.items() if isinstance(value, list)}
            test[alpha] = Scores(**(values | arrays))
        return cls(content["best"], test, content["history"])
