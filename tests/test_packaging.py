"""The package as it is installed: what it declares, and that a wheel works without the checkout."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.helpers.jobs import environment

ROOT = Path(__file__).parents[1]


def declared(*extras: str) -> set[str]:
    """Normalized names of the required distributions and those of extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {normalized(re.split(r"[\[<>=!~; ]", line)[0]) for line in lines}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_packages() -> dict[str, set[str]]:
    """Top-level packages that paml imports, outside of the standard library, and the files that do."""
    files: dict[str, set[str]] = {}
    for path in sorted((ROOT / "paml").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                files.setdefault(name.partition(".")[0], set()).add(str(path.relative_to(ROOT)))
    return {name: where for name, where in files.items() if name not in sys.stdlib_module_names and name != "paml"}


def test_every_import_is_declared_and_every_requirement_is_imported():
    distributions = packages_distributions()
    imported = {name: {normalized(each) for each in distributions[name]} for name in imported_packages()}
    requirements = declared("export", "heif")
    undeclared = {name for name, candidates in imported.items() if not candidates & requirements}
    assert undeclared <= {"botocore"}, "botocore comes with boto3; all others belong in pyproject.toml"
    unused = declared() - set().union(*imported.values())
    assert not unused


def test_extras_hold_only_what_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    docker = (ROOT / "docker" / "Dockerfile").read_text()
    for used in re.findall(r"dependencies\.py pyproject\.toml ?([a-z ]*) >", docker):
        assert set(used.split()) <= extras.keys()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_wheel_in_an_empty_environment_runs_the_demo(tmp_path: Path):
    """The environment holds the wheel, and the locked packages by a .pth line."""
    source, dist = tmp_path / "source", tmp_path / "dist"  # not in the checkout, which may hold an older build
    shutil.copytree(ROOT / "paml", source / "paml", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(dist), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = dist.glob("paml-*.whl")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(wheel)], check=True, timeout=120)

    folder = tmp_path / "env"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    (packages / "locked.pth").write_text(sysconfig.get_path("purelib") + "\n")

    work = tmp_path / "work"
    work.mkdir()
    variables = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    variables |= {"PATH": f"{folder / 'bin'}{os.pathsep}{variables['PATH']}", "HOME": str(tmp_path)}

    def run(*command: str, seconds: float = 120.0) -> str:
        done = subprocess.run(
            command,
            cwd=work,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    assert run(str(python), "-c", "import paml; print(paml.__file__)").strip() == str(packages / "paml" / "__init__.py")
    assert re.fullmatch(r"paml 0\.2\.0( \(commit [0-9a-f]{12}\))?", run("paml", "--version").strip())
    assert "openimages_v3" in run("paml", "recipes")
    assert "--loss.reject_rate_step" in run("paml", "train", "--help")
    output = run("paml", "demo", "--scale", "0.05", "--epochs", "1", seconds=1500)
    assert "LL-R + BoostLU" in output
    assert (work / "runs" / "demo.png").stat().st_size > 10_000
    assert (work / "runs" / "mlflow.db").exists()
