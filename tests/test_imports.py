"""Imports go one way, from the public functions down to storage, and heavy libraries stay where they belong."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVELS = (
    {"errors", "storage", "redact", "parsing", "checksum", "spreadsheet", "tasks", "progress", "html", "plots"}
    | {"recipes", "settings"},
    {"labels", "sources", "shards"},
    {"data", "models", "losses", "metrics"},
    {"training"},
    {"runs"},
    {"explain", "audit", "inference"},
    {"tracking", "preparation", "compare", "report", "pipeline"},
    {"distributed"},
    {"api", "cli", "demo", "__main__"},
)
"""Packages and modules of paml, low to high. An import may not go up."""
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
RAY = {"paml.distributed"}
MLFLOW = {f"paml.tracking.{name}" for name in ("mlflow_sink", "model", "model_code", "registry")}
WITHOUT_TORCH = {"paml.labels", "paml.sources", "paml.shards", "paml.storage", "paml.parsing"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted((ROOT / "paml").rglob("*.py"))}


def imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Full names of what a module imports, without imports for type checkers; `lazy` includes those in functions."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            if lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(child)

    yield from walk(tree(path))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def paml_modules(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """The modules of paml that a module imports."""
    for name in imports(path, lazy=lazy):
        if name.split(".")[0] == "paml":
            yield name if name in FILES else name.rpartition(".")[0]


def part(module: str) -> str:
    """The package or module right below paml; empty for paml itself."""
    return [*module.split("."), ""][1]


def within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_every_package_has_a_level() -> None:
    assert {part(module) for module in FILES} - {""} <= LEVEL.keys()


def test_no_import_goes_up() -> None:
    upward = {
        f"{module} imports {target}"
        for module, path in FILES.items()
        if part(module)
        for target in paml_modules(path)
        if part(target) and LEVEL[part(target)] > LEVEL[part(module)]
    }
    assert sorted(upward) == []


def test_no_modules_import_each_other() -> None:
    graph = {module: set(paml_modules(path)) & FILES.keys() - {module} for module, path in FILES.items()}
    graph["paml"] = set()  # its exports are lazy
    while True:  # remove modules that import nothing or that nothing imports
        imported = set().union(*graph.values())
        ends = {module for module, targets in graph.items() if not targets or module not in imported}
        if not ends:
            break
        graph = {module: targets - ends for module, targets in graph.items() if module not in ends}
    assert {module: sorted(targets) for module, targets in graph.items()} == {}


@pytest.mark.parametrize(("library", "allowed"), [("ray", RAY), ("mlflow", MLFLOW)])
def test_libraries_stay_in_their_modules(library: str, allowed: set[str]) -> None:
    users = {module for module, path in FILES.items() if library in {name.split(".")[0] for name in imports(path)}}
    assert {module for module in users if not within(module, allowed)} == set()
    assert users


def test_labels_and_shards_do_not_import_torch() -> None:
    users = {module for module, path in FILES.items() if "torch" in {name.split(".")[0] for name in imports(path)}}
    assert {module for module in users if within(module, WITHOUT_TORCH)} == set()


def test_trackers_are_named_by_their_own_modules_only() -> None:
    """Comments and docstrings may mention them; a string may name the default tracker."""
    allowed = MLFLOW | {"paml.tracking"}
    users = set()
    for module, path in FILES.items():
        nodes = list(ast.walk(tree(path)))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        if any("mlflow" in name.lower() for name in names):
            users.add(module)
    assert {module for module in users if module not in allowed} == set()


@pytest.mark.parametrize("module", ["paml", "paml.labels", "paml.shards", "paml.tracking", "paml.runs.journal"])
def test_importing_does_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'ray', 'mlflow'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
