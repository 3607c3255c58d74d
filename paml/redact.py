"""Credentials in URLs are never printed, logged or stored: `scheme://user:password@host` and `?password=…`."""

import re
from collections.abc import Mapping
from typing import Any

from paml.errors import SettingsError

_USER = re.compile(r"(?<=://)[^/\s@'\"]*@")
_PARAMETER = re.compile(
    r"([?&][\w.%-]*(?:password|passwd|pwd|token(?!iz)|secret|signature|credential|api[_-]?key|access[_-]?key)[\w.%-]*="
    r"|[?&](?:sig|key)=)[^&#\s'\"]+",
    re.IGNORECASE,
)
"""Query parameters with these words in their names, and `sig` of Azure's signatures."""


def redact_credentials(text: str | None) -> str:
    """The text without the user, password and secret parameters of the URLs in it. Secret parameters become `***`."""
    return _PARAMETER.sub(r"\1***", _USER.sub("", text or ""))


def refuse_credentials(values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise SettingsError, without repeating it, for a value that is an S3 URL with credentials.

    values: settings by name, possibly nested. Settings are stored with a run, in its checkpoints and in trackers.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            refuse_credentials(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            refuse_credentials({str(number): item for number, item in enumerate(value)}, f"{prefix}{name}.")
        elif isinstance(value, str) and value.startswith("s3://") and redact_credentials(value) != value:
            raise SettingsError(
                f"{prefix}{name} is an S3 URL with credentials (…@… or ?…=…), which would be stored with the settings: "
                "use s3://bucket/folder, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
