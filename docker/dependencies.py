"""Print what a pyproject.toml asks for, and what those of the named extras ask for that it has, one a line."""

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path


def dependencies(pyproject: str, extras: Sequence[str] = ()) -> list[str]:
    """The requirements of the project itself, then those of `extras`; one that it does not have adds nothing."""
    project = tomllib.loads(Path(pyproject).read_text())["project"]
    optional = project.get("optional-dependencies", {})
    return [*project["dependencies"], *(line for extra in extras for line in optional.get(extra, []))]


if __name__ == "__main__":
    print("\n".join(dependencies(sys.argv[1], sys.argv[2:])))
