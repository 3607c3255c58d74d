"""The `paml` command: arguments in, one call, exit status out.

Help comes from text files that `paml.cli.generate` writes, so `--help` imports no library.
"""

import difflib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from paml import __version__
from paml.cli.commands import COMMANDS
from paml.errors import PamlError, UsageError

HELP = Path(__file__).parent / "help"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns its exit status: 0, 1 for an error that the user can fix, 2 for bad arguments. Such errors are printed as
    one message; all others end in a traceback.
    """
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout, 0)
        if not output.poll(0):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again at exit
        return 128 + signal.SIGPIPE  # the reader has seen enough, as in `paml recipes | head -1`


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(version())
        return 0
    name = arguments.pop(0) if arguments and arguments[0] not in ("-h", "--help") else ""
    if name and name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        suggestion = f"did you mean {close[0]}?" if close else "`paml --help` lists the commands"
        print(f"paml: error: there is no command {name!r}; {suggestion}", file=sys.stderr)
        return 2
    own = arguments[:1] if name == "submit" else arguments  # its later arguments belong to another command
    if not name or {"-h", "--help"} & set(own):
        print((HELP / f"{name or 'paml'}.txt").read_text(), end="")
        return 0
    command = COMMANDS[name]
    try:
        return command.run(f"paml {name}", arguments)
    except PamlError as error:
        message = getattr(error, "strerror", None) or error  # an OSError's message without its number
        print(f"paml {name}: error: {message}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt as stop:
        print(f"paml {name}: stopped", file=sys.stderr, flush=True)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def main_with_recipe(command: str, recipe: str, arguments: Sequence[str]) -> int:
    """Run a command with a recipe unless the arguments name one with --config; prints which settings it starts from."""
    options = [argument.partition("=")[0] for argument in arguments]
    if "--config" not in options:
        arguments = [f"--config={recipe}", *arguments]
    if not {"-h", "--help", "--print_config"} & set(options):
        print(f"$ paml {command} {' '.join(arguments)}", flush=True)
    return main([command, *arguments])


def version() -> str:
    """The version, with the commit if paml runs from a git checkout or was built from one."""
    package = Path(__file__).resolve().parents[1]
    commit = ""
    if (package.parent / ".git").exists():
        git = ["git", "-C", str(package.parent), "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    elif (package / "COMMIT").exists():
        commit = (package / "COMMIT").read_text().strip()
    return f"paml {__version__}" + (f" (commit {commit})" if commit else "")
