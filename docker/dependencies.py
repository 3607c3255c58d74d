"""Print what a pyproject.toml asks for without its extras, one requirement a line."""

import sys
import tomllib
from pathlib import Path


def dependencies(pyproject: str) -> list[str]:
    """The requirements of the project itself."""
    return tomllib.loads(Path(pyproject).read_text())["project"]["dependencies"]


if __name__ == "__main__":
    print("\n".join(dependencies(sys.argv[1])))
