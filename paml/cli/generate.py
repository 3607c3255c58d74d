"""Write the help texts of all commands from their settings: `python -m paml.cli.generate` (`make help-text`)."""

import argparse
import re
import textwrap
from typing import Any

import yaml

from paml.cli import HELP
from paml.cli.commands import COMMANDS, Command
from paml.labels.command import add_subcommands
from paml.settings import make_parser, type_name

WIDTH = 100
OVERVIEW = """\
Usage: paml COMMAND [OPTIONS]

Multi-label image classifiers from partial labels.

Commands:
{commands}

Options:
  --version  Print the version and the commit.

Examples:
  paml demo
  paml train --data.root data/mine
  paml train --help

`paml COMMAND --help` lists a command's options.
"""
CONFIG_OPTIONS = """\
Settings from files
  --config FILE | RECIPE
      A YAML file of settings, or the name of a recipe (`paml recipes`). Options after it win.
  --print_config
      Print all settings as YAML and exit."""


def all_help() -> dict[str, str]:
    """File name to text of every help page."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    pages = {f"{name}.txt": _page(name, command) for name, command in COMMANDS.items()}
    return {"paml.txt": OVERVIEW.format(commands=commands), **pages}


def _page(name: str, command: Command) -> str:
    usage, options = "[ARGUMENTS]", ""
    if name == "labels":
        usage, options = "COMMAND ...", _subcommands()
    elif not command.raw:
        parser = make_parser(command.target, f"paml {name}")
        positional = [action.dest.upper() for action in parser._actions if not action.option_strings]
        usage, options = " ".join([*positional, "[OPTIONS]"]), _options(parser)
    text = [f"Usage: paml {name} {usage}", f"{command.summary}."]
    text += [_filled(paragraph) for paragraph in command.details.split("\n\n") if paragraph]
    text.append("\n".join(["Examples:", *(f"  {example}" for example in command.examples)]))
    return "\n\n".join([*text, options]).rstrip("\n") + "\n"


def _options(parser: Any) -> str:
    """Every option by group: its name, type and default, and its description."""
    sections = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if hasattr(action, "_typehint")]
        if not actions:
            continue
        if not actions[0].option_strings:
            title = "Arguments"
        elif "." not in actions[0].dest:
            title = "Options"
        else:
            title = f"{actions[0].dest.rpartition('.')[0]}: {' '.join(group.title.split())}"
        sections.append("\n".join([_filled(title), *map(_option, actions)]))
    if "--config" in parser._option_string_actions:
        sections.append(CONFIG_OPTIONS)
    return "\n\n".join(sections)


def _option(action: Any) -> str:
    name = action.option_strings[0] if action.option_strings else str(action.metavar or action.dest).upper()
    kind = f" {type_name(action._typehint)}" if hasattr(action, "_typehint") else ""
    default = "required" if action.required or not action.option_strings else f"default: {_value(action.default)}"
    return f"  {name}{kind} ({default})\n{_description(action.help)}"


def _subcommands() -> str:
    """The subcommands of `paml labels` with their arguments."""
    parser = argparse.ArgumentParser(prog="paml labels")
    add_subcommands(parser)
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    sections = []
    for subparser in subparsers.choices.values():
        usage = " ".join(subparser.format_usage().removeprefix("usage: ").replace("[-h] ", "").split())
        head = [_filled(usage), _description(subparser.description, "  ")]
        sections.append("\n".join([*head, *map(_option, subparser._actions[1:])]))
    return "\n\n".join(sections)


def _description(text: str | None, indent: str = "      ") -> str:
    """A sentence or more, indented."""
    words = " ".join((text or "").split())
    if not re.match(r"\w\b", words):  # not a symbol
        words = words[:1].upper() + words[1:]
    return _filled(words if words.endswith(".") else f"{words}.", indent)


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _value(value: Any) -> str:
    """A default as one writes it in YAML."""
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def main() -> None:
    """Write the pages; remove those of commands that no longer exist."""
    pages = all_help()
    for path in HELP.glob("*.txt"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        (HELP / name).write_text(text)
    print(f"{len(pages)} pages in {HELP}")


if __name__ == "__main__":
    main()
