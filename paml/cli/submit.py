"""`paml submit`: the `ray job submit` line of a command."""

import json
import os
import shlex
import subprocess
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path

from paml.cli.commands import COMMANDS
from paml.errors import UsageError

LOCAL_ADDRESS = "http://127.0.0.1:8265"
TOKEN_FILE = Path("~/.ray/auth_token")


def submit(arguments: Sequence[str]) -> int:
    """Print the line and, without --dry_run, run it. Returns its exit status."""
    environment, line = submit_line(arguments, os.environ)
    shown = [f"{name}={value}" for name, value in environment.items()] + [shlex.join(line)]
    print("$ " + " ".join(shown), flush=True)
    if "--dry_run" in arguments[: _start(arguments)]:
        return 0
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    return subprocess.run([*ray, *line[1:]], env=os.environ | environment, check=False).returncode


def submit_line(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """(additions to the environment, words of the line). Raises UsageError if `arguments` name no command of paml."""
    start = _start(arguments)
    options = [option for option in arguments[:start] if option != "--dry_run"]
    command = list(arguments[start:])
    python = "python"
    if _is_local(environment.get("RAY_API_SERVER_ADDRESS", LOCAL_ADDRESS)):
        # The job starts in the head's folder: PAML_HOME makes its relative paths those of this one.
        python = sys.executable
        command = _with_absolute_config(command)
        options += ["--runtime-env-json", json.dumps({"env_vars": {"PAML_HOME": os.getcwd()}})]
    elif not any(option.startswith("--working-dir") for option in options) and Path("paml/__main__.py").exists():
        options += ["--working-dir", "."]
    token = environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH")
    has_token = bool(token) or TOKEN_FILE.expanduser().exists()
    additions = {"RAY_AUTH_MODE": "token"} if has_token and "RAY_AUTH_MODE" not in environment else {}
    return additions, ["ray", "job", "submit", *options, "--", python, "-m", "paml", *command]


def _start(arguments: Sequence[str]) -> int:
    """Index of the command."""
    for index, word in enumerate(arguments):
        if word in COMMANDS:
            return index
    raise UsageError("name a command, as in `paml submit train --config openimages_v3`")


def _is_local(address: str) -> bool:
    return urllib.parse.urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")


def _with_absolute_config(command: list[str]) -> list[str]:
    """The command with the file after --config at its absolute path; names of recipes remain."""
    absolute = []
    for word in command:
        name = word.removeprefix("--config=")
        if (word != name or absolute[-1:] == ["--config"]) and os.path.exists(name):
            word = word.removesuffix(name) + os.path.abspath(name)
        absolute.append(word)
    return absolute
