"""A self-contained HTML page to review label issues: image, map and answers. It opens from a file, without a server.

Text from data (keys, MIDs, names) is in a JSON block that none of its characters can end, and the script inserts it as
text. The content policy allows only the page's own style and script, by their hashes.
"""

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from paml.html import content_policy, jpeg_thumbnail, script_json
from paml.spreadsheet import FORMULA_PREFIXES

THUMBNAIL_SIDE = 256
"""Longest side of an image in pixels; smaller images are not enlarged."""
MAX_THUMBNAIL_BYTES = 34_000
"""Keeps a page of 1,000 issues below 50 MB."""


def thumbnail(pixels: np.ndarray) -> bytes:
    """JPEG of an image, uint8 [H, W, 3], for the page."""
    return jpeg_thumbnail(pixels, THUMBNAIL_SIDE, MAX_THUMBNAIL_BYTES)


def map_grays(map_HW: np.ndarray) -> np.ndarray:
    """uint8 [H, W]: 0 for scores up to 0, 255 for the highest score; all 0 if no score is positive.

    Maps are scaled one by one: they show where the evidence is, and the score shows how strong it is.
    """
    highest = float(map_HW.max())
    if highest <= 0:
        return np.zeros(map_HW.shape, np.uint8)
    return np.round(255 * np.clip(map_HW / highest, 0, 1)).astype(np.uint8)


def page_html(
    title: str, issues: Sequence[Mapping[str, Any]], thumbnails: Sequence[bytes], maps: Sequence[np.ndarray]
) -> str:
    """The page.

    issues: for each key, mid, name, kind, rank, score, probability, state, evidence (a line of text) and image
    (position in `thumbnails`, JPEG). maps: uint8 [h, w] for each issue.
    """
    rows = [
        {**issue, "map": base64.b64encode(grays.tobytes()).decode(), "map_size": list(grays.shape)}
        for issue, grays in zip(issues, maps, strict=True)
    ]
    identity = json.dumps([title, *([issue["key"], issue["mid"]] for issue in issues)])
    data = {
        "title": title,
        "id": hashlib.sha256(identity.encode()).hexdigest()[:16],  # the browser stores verdicts under it
        "formula_prefixes": FORMULA_PREFIXES,
        "issues": rows,
        "thumbnails": [base64.b64encode(image).decode() for image in thumbnails],
    }
    template, script = _asset("page.html"), _asset("page.js")
    style = template.split("<style>", 1)[1].split("</style>", 1)[0]
    filled = template.replace("/*policy*/", content_policy(style, script), 1).replace("/*script*/", script, 1)
    before, after = filled.split("/*data*/", 1)
    return before + script_json(data) + after


@functools.cache
def _asset(name: str) -> str:
    return resources.files("paml.audit").joinpath(name).read_text("utf-8")
