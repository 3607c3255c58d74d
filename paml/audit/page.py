"""One self-contained HTML page of the finds: photo, map, answers; it works from a file and asks no server.

Everything that comes from elsewhere (keys, MIDs, names) stands in a JSON block that no character in it can end,
and the script puts it in as text. The policy allows the own script and style, by their digests, and nothing else.
"""

import base64
import functools
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from paml.spreadsheet import FORMULA_MARKS

THUMBNAIL_SIDE = 256
"""Longest side of a picture, pixels; smaller ones stay as they are."""
PICTURE_BYTES = 34_000
"""A picture is compressed until it has no more, so that 1,000 finds stay below 50 MB."""
_QUALITIES = (82, 72, 60, 48, 36, 24, 12)


def thumbnail(pixels: np.ndarray) -> bytes:
    """JPEG of uint8 [H, W, 3], its longest side at most THUMBNAIL_SIDE, of PICTURE_BYTES at most where JPEG can."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    data = b""
    for quality in _QUALITIES:
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=quality, optimize=True)
        data = out.getvalue()
        if len(data) <= PICTURE_BYTES:
            break
    return data


def map_greys(map_HW: np.ndarray) -> np.ndarray:
    """uint8 [H, W]: 0 for scores up to 0, 255 for the highest; all 0 where no score is positive. A map shows where the
    evidence lies, not how strong it is: that is the score's to say."""
    top = float(map_HW.max())
    if top <= 0:
        return np.zeros(map_HW.shape, np.uint8)
    return np.round(255 * np.clip(map_HW / top, 0, 1)).astype(np.uint8)


def page_html(
    title: str, finds: Sequence[Mapping[str, Any]], pictures: Sequence[bytes], maps: Sequence[np.ndarray]
) -> str:
    """The page.

    finds: for each its key, mid, name, kind, rank, score, probability, state, evidence (a line of text) and picture (a
    place in `pictures`, JPEG). maps: uint8 [h, w] for each find.
    """
    rows = [
        {**find, "map": base64.b64encode(greys.tobytes()).decode(), "map_size": list(greys.shape)}
        for find, greys in zip(finds, maps, strict=True)
    ]
    asked = json.dumps([title, *([find["key"], find["mid"]] for find in finds)])
    data = {
        "title": title,
        "id": hashlib.sha256(asked.encode()).hexdigest()[:16],  # a browser keeps the answers under it
        "formula_marks": FORMULA_MARKS,
        "finds": rows,
        "pictures": [base64.b64encode(picture).decode() for picture in pictures],
    }
    template, script = _asset("page.html"), _asset("page.js")
    style = template.split("<style>", 1)[1].split("</style>", 1)[0]
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    filled = template.replace("/*policy*/", policy, 1).replace("/*script*/", script, 1)
    before, after = filled.split("/*data*/", 1)
    return before + script_json(data) + after


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: no character in it ends the element or begins a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _asset(name: str) -> str:
    return resources.files("paml.audit").joinpath(name).read_text("utf-8")
