"""Building blocks of self-contained HTML pages: inlined images and data, and a policy that allows nothing else."""

import base64
import hashlib
import io
import json
from typing import Any

import numpy as np

_JPEG_QUALITIES = (82, 72, 60, 48, 36, 24, 12)


def jpeg_thumbnail(pixels: np.ndarray, side: int, max_bytes: int) -> bytes:
    """JPEG of uint8 [H, W, 3] whose longest side is at most `side` pixels.

    The quality is lowered until the file has at most `max_bytes`, or is the lowest tried.
    """
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = b""
    for quality in _JPEG_QUALITIES:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality, optimize=True)
        data = out.getvalue()
        if len(data) <= max_bytes:
            break
    return data


def content_policy(style: str, script: str | None = None) -> str:
    """A Content-Security-Policy that allows this style and script, images in data: URLs, and nothing else."""
    allowed_script = f" script-src '{_source_hash(script)}';" if script is not None else ""
    return (
        f"default-src 'none'; img-src data:; style-src '{_source_hash(style)}';{allowed_script} "
        "base-uri 'none'; form-action 'none'"
    )


def script_json(value: Any) -> str:
    """JSON for a script element: no character in it can end the element or start a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _source_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
