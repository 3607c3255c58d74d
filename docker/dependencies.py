"""Print the requirements of a pyproject.toml and of the given extras, one per line."""

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path


def dependencies(pyproject: str, extras: Sequence[str] = ()) -> list[str]:
    """The requirements of the project, then those of `extras`. Unknown extras are ignored."""
    project = tomllib.loads(Path(pyproject).read_text())["project"]
    optional = project.get("optional-dependencies", {})
    return [*project["dependencies"], *(line for extra in extras for line in optional.get(extra, []))]


if __name__ == "__main__":
    print("\n".join(dependencies(sys.argv[1], sys.argv[2:])))
