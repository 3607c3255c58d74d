"""Settings dataclasses from command lines, recipes and mappings, read by jsonargparse."""

import argparse
import dataclasses
import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from paml.errors import PamlError, SettingsError, UsageError
from paml.recipes import find_recipe
from paml.redact import refuse_credentials

T = TypeVar("T")


def read_settings(kind: Callable[..., T], arguments: Sequence[str], prog: str = "paml") -> T:
    """Settings from a command line. Raises UsageError; see `parse_arguments`."""
    try:
        return kind(**parse_arguments(kind, arguments, prog))
    except PamlError as error:
        raise UsageError(str(error)) from error


def parse_arguments(target: Callable, arguments: Sequence[str], prog: str = "paml") -> dict[str, Any]:
    """Keyword arguments of a settings class, or of a function, from a command line.

    The arguments are dotted options (`--loss.name ll-r`) and `--config`, which takes a YAML file or the name of a
    recipe; what comes later wins. `--print_config` prints the result as YAML and exits. Raises UsageError.
    """
    parser = make_parser(target, prog)
    try:
        arguments = _with_recipe_paths(arguments)
        arguments.sort(key=lambda argument: argument.partition("=")[0] == "--print_config")  # after all other options
        values = parser.parse_args(arguments)
        values.pop("config", None)
        refuse_credentials(values.as_dict())
        return parser.instantiate(values).as_dict()
    except (argparse.ArgumentError, PamlError) as error:
        raise UsageError(_one_line(error, parser, arguments)) from error


def settings_from_values(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Settings from values by dotted name, checked as those of a recipe; absent ones take their default.

    Raises SettingsError, whose message begins with `where`.
    """
    check_known(values, flatten(kind()), where)
    parser = _cached_parser(kind)
    try:
        refuse_credentials(values)
        parsed = parser.parse_object(dict(values))
        parsed.pop("config", None)
        return kind(**parser.instantiate(parsed).as_dict())
    except (argparse.ArgumentError, PamlError) as error:
        raise SettingsError(f"{where}: {_one_line(error, parser, ())}") from error


def check_known(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise SettingsError, whose message begins with `where`, for a dotted name that is not among `known`."""
    known = list(known)
    for name in names:
        if name not in known:
            raise SettingsError(f"{where}: there is no setting {name!r}{_suggestion(name, known)}")


def make_parser(target: Callable, prog: str) -> Any:
    """The jsonargparse parser of a settings class or a function, without --help."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, exit_on_error=False, add_help=False, allow_abbrev=False)
    if inspect.isclass(target):
        parser.add_argument("--config", action="config", help="A YAML file of settings, or the name of a recipe.")
        parser.add_class_arguments(target, as_group=False)
    else:
        parser.add_function_arguments(target, as_group=False, as_positional=True)
    return parser


@functools.cache
def _cached_parser(kind: type) -> Any:
    return make_parser(kind, "paml")


def flatten(settings: object, prefix: str = "") -> dict[str, Any]:
    """Values by dotted name, of a settings dataclass or of nested mappings such as a recipe."""
    values: Any = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else settings  # pyright: ignore
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def unflatten(kind: type, flat: dict[str, Any]) -> Any:
    """The settings dataclass with the values of `flat`; absent ones take their default. The inverse of `flatten`."""
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            prefix = field.name + "."
            inner = {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}
            values[field.name] = unflatten(hints[field.name], inner)  # pyright: ignore
        elif field.name in flat:
            value = flat[field.name]
            is_tuple = typing.get_origin(hints[field.name]) is tuple
            values[field.name] = tuple(value) if isinstance(value, list) and is_tuple else value
    return kind(**values)


def type_name(hint: Any) -> str:
    """A type as people write its values: `int | null`, `an | ll-r`, `list of str`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(one) for one in inner)
    if origin is typing.Literal:
        return " | ".join(str(one) for one in inner)
    if origin is not None and inner and issubclass(origin, Mapping):
        return f"mapping of {type_name(inner[0])} to {type_name(inner[1])}"
    if origin is tuple and inner[-1] is not ...:
        return f"[{', '.join(type_name(one) for one in inner)}]"
    if origin is not None and inner:
        return f"list of {type_name(inner[0])}"
    return {bool: "true | false", type(None): "null"}.get(hint) or getattr(hint, "__name__", str(hint))


def _with_recipe_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the name of a recipe after --config replaced by its path."""
    resolved: list[str] = []
    for argument in arguments:
        if argument.startswith("--config="):
            argument = f"--config={find_recipe(argument.removeprefix('--config='))}"
        elif resolved and resolved[-1] == "--config":
            argument = find_recipe(argument)
        resolved.append(argument)
    return resolved


def _one_line(error: Exception, parser: Any, arguments: Sequence[str]) -> str:
    """jsonargparse's message in one line, with the setting's name, its value, its type, and names close to it."""
    text = str(error)
    if isinstance(error, PamlError):
        return text
    options = list(parser._option_string_actions)
    if match := re.match(r"unrecognized arguments: (.*)", text):
        names = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
        unknown = [name for name in names if name not in options]
        if not unknown:
            return f"unexpected argument {match[1]}"
        return f"there is no option {unknown[0]}{_suggestion(unknown[0], options)}"
    if match := re.search(r"Group '(.+?)' does not accept option '(.+?)'", text):
        name = f"{match[1]}.{match[2]}"
        return f"there is no setting {name!r}{_suggestion(name, [option[2:] for option in options])}"
    action = None
    if match := re.match(r'Parser key "(.+?)":', text):
        action = parser._option_string_actions.get(f"--{match[1]}")
    value = re.search(r"(?:Got|Given) value: (.*)", text, re.DOTALL)
    if action is not None and value and hasattr(action, "_typehint"):
        return f"{action.dest} is {value[1].strip()!r}; expected {type_name(action._typehint)}"
    return " ".join(text.split())


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else " (--help lists all)"
