"""Adds the commit to a build from a git checkout, for `paml --version`; all else is in pyproject.toml."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithCommit(build_py):
    """Write paml/COMMIT into the build."""

    def run(self) -> None:
        super().run()
        git = ["git", "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout
        if commit and not self.editable_mode:
            Path(self.build_lib, "paml", "COMMIT").write_text(commit)


setup(cmdclass={"build_py": BuildWithCommit})
