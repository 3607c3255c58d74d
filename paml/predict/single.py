"""One photo for people: a table of its top classes, and a picture of their maps."""

from collections.abc import Callable

import numpy as np

from paml.data.decode import UndecodableError, decode_rgb
from paml.errors import DataError
from paml.predict.pictures import draw_prediction
from paml.predict.predictor import Found, Predictor
from paml.sources.fetch import read_object


def predict_photo(
    predictor: Predictor, path: str, *, top: int = 5, show: str | None = None, say: Callable[[str], None] = print
) -> list[Found]:
    """Say the `top` classes of the photo at `path` (local or s3://), and draw their maps to `show` (PNG).

    Raises DataError where the photo is missing or cannot be decoded, StorageError.
    """
    data = read_object(path)
    if isinstance(data, Exception):
        raise DataError(f"{path} is not there: name a photo (JPEG, PNG, …)")
    try:
        pixels = predictor.decode(data)
        photo = decode_rgb(data)
    except UndecodableError as error:
        raise DataError(f"{path} cannot be read as a picture ({error}): name a photo (JPEG, PNG, …)") from error
    predicted = predictor.predict(pixels[None], maps=show is not None)
    found = predictor.top(predicted.scores_BK[0], top)
    say(photo_table(found, predictor))
    if show is not None and predicted.maps_BKHW is not None:
        draw_prediction(photo, found, predicted.maps_BKHW[0][[one.index for one in found]], show)
        say(f"drawn to {show}")
    return found


def photo_table(found: list[Found], predictor: Predictor) -> str:
    """A line a class: score, name, MID; with thresholds a mark, and below what it means."""
    width = max(len(one.name) for one in found)
    lines = []
    for one in found:
        mark = {True: "  above its threshold", False: "", None: ""}[one.above_threshold]
        lines.append(f"{one.score:.4f}  {one.name.ljust(width)}  {one.mid}{mark}")
    calibration = predictor.calibration
    if calibration is None:
        lines.append("scores are not calibrated (jobs/calibrate.py): trained on partial labels they tend to be low")
    else:
        known = int(np.isfinite(calibration.threshold).sum())
        lines.append(
            f"scores are calibrated; {known} of {len(calibration.threshold)} classes have a threshold for precision "
            f"{calibration.precision:g}"
        )
    return "\n".join(lines)
