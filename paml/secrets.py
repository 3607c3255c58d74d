"""Keys in addresses: `scheme://user:password@host` is never printed, noted or stored."""

import re
from collections.abc import Mapping
from typing import Any

from paml.errors import SettingsError

_USER = re.compile(r"(?<=://)[^/\s@'\"]*@")


def without_keys(text: str | None) -> str:
    """The text without the user and password of the addresses in it; what is left of an address can still be used."""
    return _USER.sub("", text or "")


def refuse_keys(values: Mapping[str, Any], where: str = "") -> None:
    """Raise SettingsError, which does not repeat it, for a value (by its dotted name) that is an S3 address with keys.

    Settings are stored with a run, in its checkpoints and in MLflow.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            refuse_keys(value, f"{where}{name}.")
        elif isinstance(value, list | tuple):
            refuse_keys({str(place): one for place, one in enumerate(value)}, f"{where}{name}.")
        elif isinstance(value, str) and value.startswith("s3://") and without_keys(value) != value:
            raise SettingsError(
                f"{where}{name} is an S3 address that holds keys (…@…), and settings are stored and shown: give "
                "s3://bucket/folder, and the keys by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
