"""What every job does the same way: settings in, one call, exit status out."""

import argparse
import difflib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from paml.errors import PamlError, SettingsError
from paml.labels.states import LabelError
from paml.secrets import refuse_keys
from paml.storage import StorageError

T = TypeVar("T")
MENDABLE = (PamlError, LabelError)
"""Their messages say what to do, so they are shown alone."""


def read_settings(kind: type[T], description: str, default_config: str | None = None) -> T:
    """Settings from the command line: --config FILE and dotted options, with --help and --print_config.

    `default_config` is a recipe taken where --config is not given. Exits with status 2 and the message where
    a setting is unknown or refused.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    files: list[str | os.PathLike] = []
    given = any(argument.split("=")[0] == "--config" for argument in sys.argv[1:])
    if default_config and not given and os.path.exists(default_config):
        files.append(default_config)
    parser = ArgumentParser(description=description, default_config_files=files)
    parser.add_argument("--config", action="config", help="a YAML file of settings; options after it win")
    parser.add_class_arguments(kind, as_group=False)
    parsed = parser.parse_args()
    parsed.pop("config", None)
    try:
        refuse_keys(parsed.as_dict())
        return kind(**parser.instantiate(parsed).as_dict())
    except MENDABLE as error:
        parser.error(str(error))


def checked_settings(kind: type[T], values: Mapping[str, Any], where: str, known: Mapping[str, Any]) -> T:
    """Settings from values by dotted name, read and checked as those of a recipe; what is absent takes its default.

    known: every dotted name there is. Raises SettingsError that begins with `where` and names what is wrong.
    """
    refuse_unknown(values, known, where)
    parser = _parser(kind)
    try:
        refuse_keys(values)
        return kind(**parser.instantiate(parser.parse_object(dict(values))).as_dict())
    except (argparse.ArgumentError, *MENDABLE) as error:
        raise SettingsError(f"{where}: {error}") from error


def refuse_unknown(names: Iterable[str], known: Mapping[str, Any], where: str) -> None:
    """Raise SettingsError that begins with `where` for a dotted name that is not among `known`."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            like = f"; like it are {', '.join(close)}" if close else ""
            raise SettingsError(f"{where}: there is no setting {name!r}{like} (--help of the training job lists all)")


@functools.cache
def _parser(kind: type) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False)
    return parser


def run_job(work: Callable[[], int | None]) -> int:
    """Run a job; errors that the user can mend end in one message and status 1, all others in a traceback."""
    try:
        return work() or 0
    except StorageError as error:
        print(f"error: {error.strerror or error}", file=sys.stderr, flush=True)
    except MENDABLE as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 1
