"""Recipes: YAML files of settings. Their comments state the command, what to expect and where the values come from."""

import difflib
import os
from pathlib import Path

from paml.errors import SettingsError

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of the recipes that come with paml, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_recipe(name: str) -> str:
    """Path of a recipe, given as a path or by the name of one that comes with paml.

    Raises SettingsError if there is neither a file nor a recipe of this name.
    """
    if os.path.exists(name):
        return name
    path = FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    if path.parent == FOLDER and path.exists():
        return str(path)
    close = difflib.get_close_matches(name, recipe_names(), n=3)
    suggestion = f"; did you mean {' or '.join(close)}?" if close else " (`paml recipes` lists them)"
    raise SettingsError(f"there is no file and no recipe {name!r}{suggestion}")


def summary(name: str) -> str:
    """First comment line of a recipe."""
    first = Path(find_recipe(name)).read_text().partition("\n")[0]
    return first.removeprefix("#").strip()
