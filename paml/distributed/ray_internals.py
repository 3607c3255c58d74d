"""The private APIs of Ray that paml uses. No other module imports any.

They may change with each minor version of Ray, so pyproject.toml has the same bounds as this module.
"""

import ray

from paml.errors import PamlError

SUPPORTED = ">=2.50,<2.61"


def check_version(installed: str) -> None:
    """Raise PamlError for a version that is not supported."""
    if not (2, 50) <= tuple(map(int, installed.split(".")[:2])) < (2, 61):
        raise PamlError(
            f"Ray {installed} is installed, but paml needs {SUPPORTED}: pip install "
            f"'ray[default,train,tune]{SUPPORTED}' on all nodes"
        )


check_version(ray.__version__)

from ray._private.state import state as _state  # noqa: E402
from ray.train.v2._internal.execution.callback import ControllerCallback  # noqa: E402

__all__ = ["ControllerCallback", "check_version", "draining_nodes"]


def draining_nodes() -> set[str]:
    """Ray's ids of the nodes that will be removed: preempted, or drained by `ray drain-node`.

    Ray Train's own preemption watcher asks the same.
    """
    return set(_state.get_draining_nodes())
